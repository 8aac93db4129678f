"""Puts fused calls in place of what reader.py found, and what the graph calls instead."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .. import autograd
from ..backends import needs, resolve
from ..layout import inverse_temperature, rows
from .calls import example, where
from .found import Reading, Single, Sum, mutations, same
from .values import Mixture, Row


def row_numbers(
    policy: Tensor,
    reference: Tensor | None,
    index: Tensor | None,
    kinds: tuple[str, ...],
    parameter: float | None,
    temperature: Any,
) -> tuple[Tensor, ...]:
    """One number per row for every field in `kinds` (logprob: in the shape of index)."""
    if isinstance(temperature, Tensor) and temperature.dim():
        temperature = temperature.squeeze(-1)
    inverse = inverse_temperature(1.0 if temperature is None else temperature, policy)
    shape = policy.shape[:-1]
    ids = None
    if index is not None:
        ids = index.reshape(shape.numel(), index.shape[-1]).contiguous()
    backend = resolve(None, policy.device, needs(*kinds))
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


@dataclass(frozen=True)
class _Number:
    """coefficient * kind(policy, reference) or kind(policy)."""

    coefficient: float
    kind: str
    policy: Row
    reference: Row | None = None
    parameter: float | None = None


def _requires_grad(row: Row) -> bool:
    return not row.detached and bool(getattr(example(row.logits), "requires_grad", True))


def _kl(coefficient: float, a: Row, b: Row) -> _Number:
    """coefficient * KL(a || b), with the row that is trained as the policy."""
    if _requires_grad(a) and not _requires_grad(b):
        return _Number(coefficient, "reverse_kl", a, b)
    return _Number(coefficient, "forward_kl", b, a)


def numbers(found: Sum | Single) -> list[_Number] | str:
    """What a node is the sum of, or why it cannot be computed."""
    if isinstance(found, Single):
        kind = "entropy" if found.index is None else "logprob"
        return [_Number(1.0, kind, found.row)]
    terms = dict(found.products.terms)
    result: list[_Number] = []
    for mixture in {b for _, b in terms if isinstance(b, Mixture)}:
        (a, wa), (b, wb) = mixture.parts
        factors = [-terms.pop((row, mixture), 0.0) / w for row, w in mixture.parts]
        if abs(factors[0] - factors[1]) > 1e-6 * abs(factors[0]):
            return "the two KLs of a Jensen-Shannon divergence are not weighted as its mixture is"
        for row, w in mixture.parts:
            terms[row, row] = terms.get((row, row), 0.0) - factors[0] * w
        if _requires_grad(b) and not _requires_grad(a):
            a, b, wb = b, a, wa
        result.append(_Number(factors[0], "jsd", a, b, wb))
    entropies: dict[Row, float] = defaultdict(float)
    for (a, b_), c in terms.items():
        assert isinstance(b_, Row)
        entropies[a] += c
        if a != b_:
            result.append(_kl(-c, a, b_))
    result += [_Number(-c, "entropy", a) for a, c in entropies.items() if abs(c) > 1e-9]
    return result


class Emitter:
    """Rewrites one graph; `rewritten` says what and where."""

    def __init__(self, graph: Graph, reading: Reading) -> None:
        self.graph, self.reading = graph, reading
        self.rewritten: list[tuple[str, str]] = []
        self._position = {node: i for i, node in enumerate(graph.nodes)}
        self._writes = list(mutations(graph))
        self._made: dict[Any, list[Node]] = {}

    def run(self) -> None:
        """Rewrite everything that can be; the reasons of the rest go to `reading.missed`."""
        wanted = []
        for found in self.reading.found:
            parts = numbers(found)
            reason = parts if isinstance(parts, str) else self._obstacle(found.node, parts)
            if reason is not None:
                self.reading.missed[found.node] = reason
            else:
                assert isinstance(parts, list)
                wanted.append((found, [self._aligned(part) for part in parts]))
        groups: dict[Any, list[tuple[Node, _Number, Any]]] = defaultdict(list)
        for found, parts in wanted:
            for part in parts:
                index = found.index if isinstance(found, Single) else None
                groups[self._key(found.node, part)].append((found.node, part, index))
        for key in list(groups):
            self._adopt_singles(groups, key)
        calls = {}
        for members in groups.values():
            calls.update(self._call(members))
        for found, parts in wanted:
            self._replace(found, [(p, calls[found.node, p]) for p in parts])
        for node in reversed([found.node for found, _ in wanted]):
            self.graph.erase_node(node)

    def _obstacle(self, node: Node, parts: list[_Number]) -> str | None:
        for part in parts:
            both = [r for r in (part.policy, part.reference) if r is not None]
            shapes = [example(row.logits) for row in both]
            if len(shapes) == 2 and not same(shapes[0].shape, shapes[1].shape):
                return "the two rows are broadcast against each other"
            for tensor in shapes:
                chosen = resolve(None, tensor.device, needs(part.kind))
                if chosen == "reference" and tensor.device.type != "meta":
                    return f"there is no compiled kernel for {tensor.device.type}"
                storage = tensor.untyped_storage()._cdata
                first = min(self._position[row.logits] for row in both)
                for position, written in self._writes:
                    if first < position < self._position[node] and written in (None, storage):
                        return "the logits are changed in place between softmax and sum"
        return None

    def _aligned(self, part: _Number) -> _Number:
        """Both rows at one temperature, by dividing them beforehand where theirs differ."""
        a, b = part.policy, part.reference
        if b is None or a.temperature == b.temperature:
            return part
        found = [
            row if row.temperature is None else Row(self.reading.quotients[row], None, row.detached)
            for row in (a, b)
        ]
        return _Number(part.coefficient, part.kind, found[0], found[1], part.parameter)

    def _key(self, node: Node, part: _Number) -> Any:
        return (part.policy, part.reference, part.parameter, self.reading.grad[node])

    def _adopt_singles(self, groups: Any, key: Any) -> None:
        """Numbers of the policy alone join a read of the pair, if that comes no earlier."""
        policy, reference, parameter, grad = key
        if reference is None or parameter is not None:
            return
        alone = groups.get((policy, None, None, grad), [])
        start = min(self._position[node] for node, _, _ in groups[key])
        for member in list(alone):
            index = member[2]
            kinds = [m[2] for m in groups[key] if m[1].kind == "logprob"]
            if index is not None and (self._position[index] > start or kinds):
                continue
            alone.remove(member)
            groups[key].append(member)

    def _call(self, members: list[tuple[Node, _Number, Any]]) -> dict[Any, Node]:
        if not members:
            return {}
        separate: dict[Any, list[tuple[Node, _Number, Any]]] = defaultdict(list)
        indices = list(dict.fromkeys(index for _, _, index in members if index is not None))
        for member in members:
            # One index per call; more of them are calls of their own.
            separate[member[2] if member[2] in indices[1:] else None].append(member)
        found = {}
        for part in separate.values():
            found.update(self._one_call(part))
        return found

    def _one_call(self, members: list[tuple[Node, _Number, Any]]) -> dict[Any, Node]:
        first = min((node for node, _, _ in members), key=self._position.__getitem__)
        index = next((i for _, _, i in members if i is not None), None)
        kinds = tuple(dict.fromkeys(part.kind for _, part, _ in members))
        some = members[0][1] if members[0][1].reference else members[-1][1]
        some = next((p for _, p, _ in members if p.reference is not None), some)
        with self.graph.inserting_before(first):
            logits = [None if r is None else self._logits(r) for r in (some.policy, some.reference)]
            arguments = (*logits, index, kinds, some.parameter, some.policy.temperature)
            call = self.graph.call_function(row_numbers, arguments)
            items = {k: self.graph.call_function(_item, (call, i)) for i, k in enumerate(kinds)}
        return {(node, part): items[part.kind] for node, part, _ in members}

    def _logits(self, row: Row) -> Node:
        return self.graph.call_method("detach", (row.logits,)) if row.detached else row.logits

    def _replace(self, found: Sum | Single, parts: list[tuple[_Number, Node]]) -> None:
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


def _item(values: tuple[Tensor, ...], i: int) -> Tensor:
    return values[i]


def _pick(values: Tensor, mask: Tensor) -> Tensor:
    return values[mask]
