"""Puts fused calls in place of what reader.py found, and what the graph calls instead."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .. import autograd
from ..backends import needs, resolve
from ..layout import inverse_temperature, rows, token_ids
from .calls import example, read, where
from .found import Reading, Single, Sum, same
from .sharing import Call, Member, calls_of
from .terms import Number, numbers
from .values import Row, Scaled
from .writes import Writes


def row_numbers(
    policy: Tensor,
    reference: Tensor | None,
    index: Tensor | None,
    kinds: tuple[str, ...],
    parameter: float | None,
    temperature: float | None,
) -> tuple[Tensor, ...]:
    """One number per row for every field in `kinds` (logprob: in the shape of index)."""
    inverse = inverse_temperature(1.0 if temperature is None else temperature, policy)
    shape = policy.shape[:-1]
    # To torch's gather a negative index is an error, as to all users of ours.
    ids = None if index is None else token_ids(index.to(torch.int64), policy)
    backend = resolve(None, policy.device, needs(policy, reference, *kinds))
    y = None if reference is None else rows(reference)
    values = autograd.row_stats(rows(policy), y, ids, kinds, parameter, inverse, backend=backend)
    found, at = [], 0
    for kind in kinds:
        if kind == "logprob" and index is not None:
            found.append(values[at : at + index.shape[-1]].t().reshape(index.shape))
            at += index.shape[-1]
        else:
            found.append(values[at].reshape(shape))
            at += 1
    return tuple(found)


class Emitter:
    """Rewrites one graph; `rewritten` says what and where.

    Made, it has changed nothing yet, and the reasons of what cannot be are in `reading.missed`.
    """

    def __init__(self, graph: Graph, reading: Reading, writes: Writes) -> None:
        self.graph, self.reading, self.writes = graph, reading, writes
        self.rewritten: list[tuple[str, str]] = []
        self._forward_mode = any(n.op == "call_function" and _dual(n.target) for n in graph.nodes)
        self._wanted: list[tuple[Sum | Single, list[Number]]] = []
        members = []
        for found in reading.found:
            parts = self._computable(found)
            if isinstance(parts, str):
                reading.missed[found.node] = parts
                continue
            self._wanted.append((found, parts))
            index = found.index if isinstance(found, Single) else None
            grad = reading.grad[found.node]
            members += [Member(found.node, part, index, grad) for part in parts]
        self._calls = calls_of(members, writes)

    def run(self) -> None:
        """Rewrite all of it."""
        values: dict[Any, Node] = {}
        for call in self._calls:
            values.update(self._call(call))
        for found, parts in self._wanted:
            self._replace(found, [(p, values[found.node, p]) for p in parts])
        self._remove([found.node for found, _ in self._wanted])

    def _computable(self, found: Sum | Single) -> list[Number] | str:
        """What to compute for a node, or why that cannot be done."""
        if self._forward_mode:
            return "the graph has forward-mode AD, and the fused operators have not"
        parts = numbers(found)
        if isinstance(parts, str):
            return parts
        made_of = self._made_of(found.node)
        parts = [self._aligned(part, made_of) for part in parts]
        return (
            self._without_kernel(parts)
            or self._changed(found.node, made_of)
            or self._changed_for_backward(found.node, parts)
            or parts
        )

    def _made_of(self, node: Node) -> list[Node]:
        """The nodes that were read to know what a node is, in order."""
        found, waiting = {node}, [node]
        while waiting:
            given = [n for n in waiting.pop().all_input_nodes if n in self.reading.known]
            waiting += [n for n in given if n not in found]
            found.update(given)
        return sorted(found, key=self.writes.position.__getitem__)

    def _without_kernel(self, parts: list[Number]) -> str | None:
        for part in parts:
            given = [example(r.logits) for r in (part.policy, part.reference) if r is not None]
            if len(given) == 2 and not same(given[0].shape, given[1].shape):
                return "the two rows are broadcast against each other"
            device = given[0].device
            chosen = resolve(None, device, needs(*given, part.kind))
            if chosen == "reference" and device.type != "meta":
                dtypes = " and ".join(dict.fromkeys(str(t.dtype) for t in given))
                return f"there is no compiled kernel for {dtypes} on {device.type}"
        return None

    def _changed(self, node: Node, made_of: list[Node]) -> str | None:
        """Why what a node is made of cannot be read as late as at the node."""
        for reader in made_of:
            start, end = (self.writes.position[n] for n in (reader, node))
            for given in reader.all_input_nodes:
                if self.writes.between(given, start, end):
                    return f"{given.name} is changed in place between its use and the result"
        return None

    def _changed_for_backward(self, node: Node, parts: list[Number]) -> str | None:
        """Backward reads logits, where torch's keeps probabilities."""
        if not example(node).requires_grad:
            return None
        start, end = self.writes.position[node], len(self.writes.position)
        for part in parts:
            for row in (part.policy, part.reference):
                if row is not None and self.writes.between(row.logits, start, end):
                    return f"{row.logits.name} is changed in place before backward would read it"
        return None

    def _aligned(self, part: Number, made_of: list[Node]) -> Number:
        """Both rows at one temperature, by dividing them beforehand where theirs differ."""
        a, b = part.policy, part.reference
        if b is None or a.temperature == b.temperature:
            return part
        return replace(
            part, policy=self._quotient(a, made_of), reference=self._quotient(b, made_of)
        )

    def _quotient(self, row: Row, made_of: list[Node]) -> Row:
        """A row whose logits are those of `row`, divided by its temperature."""
        if row.temperature is None:
            return row
        for node in made_of:
            value = self.reading.known.get(node)
            if isinstance(value, Scaled) and replace(value.row, detached=row.detached) == row:
                return Row(node, None, row.detached)
        raise AssertionError(f"{row} is made of none of {made_of}")

    def _call(self, call: Call) -> dict[Any, Node]:
        first = min((m.node for m in call.members), key=self.writes.position.__getitem__)
        kinds = tuple(dict.fromkeys(m.number.kind for m in call.members))
        with self.graph.inserting_before(first):
            logits = [None if r is None else self._logits(r) for r in (call.policy, call.reference)]
            parameter = call.members[0].number.parameter
            arguments = (*logits, call.index, kinds, parameter, call.policy.temperature)
            values = self.graph.call_function(row_numbers, arguments)
            items = {k: self.graph.call_function(_item, (values, i)) for i, k in enumerate(kinds)}
        return {(m.node, m.number): items[m.number.kind] for m in call.members}

    def _remove(self, waiting: list[Node]) -> None:
        """Erase nodes, and what only they needed of what is known to do nothing but compute.

        Everything else stays: a write, an unknown operator, or what nothing needed before.
        """
        erased = set()
        while waiting:
            node = waiting.pop()
            if not node.users and node not in erased:
                waiting += [given for given in node.all_input_nodes if read(given) is not None]
                self.graph.erase_node(node)
                erased.add(node)

    def _logits(self, row: Row) -> Node:
        return self.graph.call_method("detach", (row.logits,)) if row.detached else row.logits

    def _replace(self, found: Sum | Single, parts: list[tuple[Number, Node]]) -> None:
        node, tensor = found.node, example(found.node)
        with self.graph.inserting_before(node):
            total = None
            for part, value in parts:
                if part.coefficient != 1:
                    value = self._function(torch.mul, value, part.coefficient)
                total = value if total is None else self._function(torch.add, total, value)
            assert total is not None
            if isinstance(found, Sum):
                total = self._reduced(found, total)
            elif found.squeezed:
                total = self._method("squeeze", total, -1)
            result = self._method("to", total, tensor.dtype)
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        kinds = " + ".join(dict.fromkeys(part.kind for part, _ in parts))
        self.rewritten.append((kinds, where(node)))

    def _reduced(self, found: Sum, total: Node) -> Node:
        for what, other in found.products.then:
            if what == "index":
                total = self._function(_pick, total, other)
                continue
            flat = self._method("squeeze", other, -1)
            if what == "mul":
                total = self._function(torch.mul, total, flat)
            else:
                flat = self._method("logical_not", flat) if what == "keep" else flat
                total = self._method("masked_fill", total, flat, 0.0)
        if found.dims is None:
            return self._method("unsqueeze", total, -1) if found.keepdim else total
        logits = found.products.terms[0][0][0].logits
        if found.divisor == "elements":
            return self._function(
                torch.div, self._method("mean", total), self._method("size", logits, -1)
            )
        total = self._method("sum", total, *([found.dims] if found.dims else []))
        if found.divisor == "rows":
            return self._function(torch.div, total, self._method("size", logits, 0))
        return total

    def _function(self, target: Any, *arguments: Any) -> Node:
        return self.graph.call_function(target, arguments)

    def _method(self, name: str, *arguments: Any) -> Node:
        return self.graph.call_method(name, arguments)


def _dual(function: Any) -> bool:
    return getattr(function, "__name__", "") in ("_make_dual", "_enter_dual_level")


def _item(values: tuple[Tensor, ...], i: int) -> Tensor:
    return values[i]


def _pick(values: Tensor, mask: Tensor) -> Tensor:
    return values[mask]
