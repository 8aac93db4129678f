"""Reads a graph forward: which nodes are softmaxes of rows of logits, and arithmetic on them."""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch.fx import Graph, Node

from . import calls, values
from .calls import example
from .found import Reading, Single, Sum, last, same
from .values import (
    Constant,
    Log,
    LogitProducts,
    LogSumExp,
    Mixture,
    Picked,
    Prob,
    Products,
    Row,
    Scaled,
    Stacked,
    Value,
)
from .writes import Writes

_NUMBERS = (int, torch.SymInt, torch.Size)
_HALF = (torch.bfloat16, torch.float16)
_FLOAT = (*_HALF, torch.float32, torch.float64)
_ARITHMETIC = ("add", "sub", "mul", "div", "clamp", "clamp_min")
_ALTERED = "is arithmetic on softmaxes"
_OF_ANOTHER_ROW = "less a logsumexp that is not of the same row at one temperature"
_GRAD_MODE = torch._C._set_grad_enabled


class Rows(ABC):
    """One walk over a graph; `reading` is its result."""

    def __init__(self, graph: Graph, writes: Writes) -> None:
        self.reading = Reading()
        self._writes = writes
        self._values: dict[Node, Value] = {}
        self._why: dict[Node, str] = {}
        self._grad = True
        for node in graph.nodes:
            if node.op == "call_function" and node.target is _GRAD_MODE:
                self._grad = bool(node.args[0])
                continue
            call = calls.read(node)
            found = None if call is None else self._interpret(node, *call)
            if call is None:
                self._report_unread(node)
            if found is not None:
                self._values[node] = self.reading.known[node] = found
            self._forget(node)
        self._explain()

    def value(self, node: Any) -> Value:
        """What a node or a number is, as far as the current grad mode lets gradients through it."""
        if isinstance(node, bool):
            return None
        if isinstance(node, (int, float)):
            return Constant(float(node))
        if not isinstance(node, Node):
            return None
        found = self._values.get(node)
        if found is None and self._is_logits(node):
            found = Scaled(Row(node))
        return found if self._grad else values.detach(found)

    def _is_logits(self, node: Node) -> bool:
        tensor = example(node)
        return isinstance(tensor, torch.Tensor) and tensor.dtype in _FLOAT and tensor.dim() > 0

    def _interpret(self, node: Node, name: str, given: dict[str, Any]) -> Value:
        method: Any = getattr(self, f"_{name}", None)
        found = method(node, **given) if method is not None else self._arithmetic(node, name, given)
        if found is None and name in _ARITHMETIC:
            self._note_altered(node, given["x"], given.get("y", 0))
        return found

    def _report_unread(self, node: Node) -> None:
        reason = calls.unread(node)
        if reason and any(isinstance(self._values.get(x), Log) for x in node.all_input_nodes):
            self.reading.missed[node] = reason

    def _note_altered(self, node: Node, *made_of: Any) -> None:
        """Softmaxes plus a number, their differences, ...: with a log, that is a near miss."""
        given = [Prob if self._altered(x) else type(self.value(x)) for x in made_of]
        if Prob in given and all(kind in (Prob, Constant) for kind in given):
            self._why[node] = _ALTERED

    def _note_unread(self, node: Node, left: Any, right: Any) -> None:
        """log p and something that is no log-softmax: times p, that is a near miss."""
        for one, other in ((left, right), (right, left)):
            found = isinstance(self.value(one), Log) and isinstance(self.value(other), Scaled)
            reported = other in self.reading.missed
            if found and not reported and same(example(one).shape, example(other).shape):
                self._why[node] = f"is of log-probabilities and {other}, which is no log-softmax"

    def _altered(self, node: Any) -> bool:
        return self._why.get(node) == _ALTERED

    def _forget(self, writer: Node) -> None:
        """What a node writes to is not what it was made as any more; logits are others."""
        for node in self._writes.touched(writer, self._values):
            value = self._values.pop(node)
            if isinstance(value, Products):
                self.reading.missed[writer] = "p (log p - log q) is changed in place"
            elif not isinstance(value, Scaled):
                self._why[node] = "is changed in place"

    def _explain(self) -> None:
        """Say where p log p terms end that are not summed."""
        for node, value in self._values.items():
            if not isinstance(value, Products):
                continue
            ends = [
                user
                for user in node.users
                if user not in self.reading.grad
                and not isinstance(example(user), _NUMBERS)  # its size
                and not isinstance(self._values.get(user), Products)
            ]
            for user in ends:
                self.reading.missed.setdefault(
                    user if user.op != "output" else node,
                    "p (log p - log q) is used for something else than its sum over the vocabulary",
                )

    def _record(self, found: Sum | Single) -> None:
        self.reading.found.append(found)
        self.reading.grad[found.node] = self._grad

    # -- rows of logits ------------------------------------------------------------------------

    def _row(self, node: Node, x: Any, dim: Any, dtype: Any = None) -> Row | None:
        value, tensor = self.value(x), example(x)
        if not isinstance(value, Scaled) or tensor is None:
            return None
        if not last(dim, tensor):
            self._why[node] = f"is over dim {dim} of {tensor.dim()}, not over the last one"
            return None
        if dtype not in (None, tensor.dtype) and not (
            dtype == torch.float32 and tensor.dtype in _HALF
        ):
            self._why[node] = f"turns {tensor.dtype} into {dtype}"
            return None
        return value.row

    def _log_softmax(
        self, node: Node, x: Any, dim: Any = None, dtype: Any = None, **_: Any
    ) -> Value:
        row = self._row(node, x, dim, dtype)
        return None if row is None else Log(((row, 1.0),))

    def _softmax(self, node: Node, x: Any, dim: Any = None, dtype: Any = None, **_: Any) -> Value:
        row = self._row(node, x, dim, dtype)
        return None if row is None else Prob(row)

    def _logsumexp(self, node: Node, x: Any, dim: Any, keepdim: bool = False) -> Value:
        value = self.value(x)
        if isinstance(value, Stacked) and dim in (0, (0,), [0]) and not keepdim:
            return self._mixture(value)
        row = self._row(node, x, dim)
        return None if row is None else LogSumExp(row, keepdim)

    def _mixture(self, value: Stacked) -> Value:
        parts = []
        for part in value.parts:
            if not isinstance(part, Log) or len(part.terms) != 1 or part.terms[0][1] != 1:
                return None
            row = part.terms[0][0]
            if not isinstance(row, Row):
                return None
            parts.append((row, math.exp(part.constant)))
        if len(parts) != 2 or abs(sum(weight for _, weight in parts) - 1) > 1e-6:
            return None
        return Log(((Mixture(tuple(parts)), 1.0),))

    def _stack(self, node: Node, x: Any, dim: int = 0) -> Value:
        if dim != 0 or not isinstance(x, (list, tuple)):
            return None
        parts = tuple(self.value(part) for part in x)
        return self._whole(parts) or Stacked(parts)

    def _whole(self, parts: tuple[Value, ...]) -> LogSumExp | None:
        """logsumexp of a tensor's rows, from those of x[0], x[1], ..., x[-1], in a loop over it."""
        if not all(isinstance(part, LogSumExp) and not part.kept for part in parts):
            return None
        nodes = [part.row.logits for part in parts if part.row.temperature is None]
        whole = nodes[0].args[0] if nodes and nodes[0].target is operator.getitem else None
        value, tensor = self.value(whole), example(whole)
        if not isinstance(value, Scaled) or [n.args for n in nodes] != [
            (whole, i) for i in range(len(parts))
        ]:
            return None
        if not same(tensor.shape[0], len(parts)) or len({p.row.detached for p in parts}) != 1:
            return None
        value = values.detach(value) if parts[0].row.detached else value
        return LogSumExp(value.row, kept=False)

    def _cast(self, node: Node, x: Node, dtype: torch.dtype) -> Value:
        value, before = self.value(x), example(x).dtype
        if isinstance(value, Scaled):
            exact = dtype == before or (dtype == torch.float32 and before in _HALF)
            return value if exact else None
        rounded = dtype in _FLOAT and isinstance(value, (Log, Prob, Products, LogSumExp, Constant))
        return value if rounded else None

    def _detach(self, node: Node, x: Any) -> Value:
        return values.detach(self.value(x))

    def _contiguous(self, node: Node, x: Any) -> Value:
        return self.value(x)

    def _clone(self, node: Node, x: Any) -> Value:
        value = self.value(x)
        return None if isinstance(value, Scaled) else value

    # -- arithmetic ----------------------------------------------------------------------------

    def _tensor(self, node: Node, value: Any, **_: Any) -> Value:
        return Constant(float(value)) if isinstance(value, (int, float)) else None

    def _exp(self, node: Node, x: Any) -> Value:
        value = self.value(x)
        if isinstance(value, Constant):
            return Constant(math.exp(value.value))
        atom = values.log_of(value)
        return Prob(atom) if isinstance(atom, Row) else None

    def _log(self, node: Node, x: Any) -> Value:
        value = self.value(x)
        if isinstance(value, Constant):
            return Constant(math.log(value.value)) if value.value > 0 else None
        if self._altered(x):
            self.reading.missed[node] = f"log of {self._reason(x)}"
        return Log(((value.row, 1.0),)) if isinstance(value, Prob) else None

    def _log1p(self, node: Node, x: Any) -> Value:
        value = self.value(x)
        possible = isinstance(value, Constant) and value.value > -1
        return Constant(math.log1p(value.value)) if possible else None

    def _div(self, node: Node, x: Any, y: Any) -> Value:
        value, by = self.value(x), self.value(y)
        if isinstance(value, Scaled):
            return self._divided(value.row, y)
        if isinstance(by, Constant) and by.value != 0:
            return values.scale(value, 1 / by.value)
        return None

    @abstractmethod
    def _weighted(self, x: Value, left: Any, y: Value, right: Any) -> Value:
        """A product that is none of rows alone: reader.py knows those of sums."""

    def _divided(self, row: Row, by: Any) -> Value:
        # A quotient by anything but a number stays, as logits: of a tensor nobody knows the sign,
        # and torch would compile anew for every value of a symbol that goes into a call of ours.
        if isinstance(by, bool) or not isinstance(by, (int, float)) or not 0 < by < math.inf:
            return None
        product = by * (1 if row.temperature is None else row.temperature)
        return Scaled(Row(row.logits, None if product == 1 else product, row.detached))

    def _arithmetic(self, node: Node, name: str, given: dict[str, Any]) -> Value:
        if name == "neg":
            return values.scale(self.value(given["x"]), -1.0)
        if name not in ("add", "sub", "mul"):
            return None
        left, right = given["x"], given["y"]
        x, y = self.value(left), self.value(right)
        if name == "mul":
            if isinstance(x, Scaled) and isinstance(right, float) and right > 0:
                return self._divided(x.row, 1 / right)
            found = values.multiply(x, y)
            found = self._weighted(x, left, y, right) if found is None else found
        else:
            special = self._difference(node, x, y) if name == "sub" else None
            found = special or values.add(x, values.scale(y, -1.0) if name == "sub" else y)
            if found is None:
                self._note_unread(node, left, right)
        for one, other in ((left, y), (right, x)):
            near = Log if self._altered(one) else (Log, Prob)
            if found is None and one in self._why and isinstance(other, near):
                self.reading.missed[node] = f"{name}: one side {self._reason(one)}"
        return found

    def _reason(self, node: Any) -> str:
        if node in self._why:
            return f"{node.name}, which {self._why[node]}"
        return f"is {node}, not a softmax of logits over their last dim in the form that is needed"

    def _difference(self, node: Node, x: Value, y: Value) -> Value:
        if isinstance(x, Scaled) and isinstance(y, LogSumExp) and x.row == y.row and y.kept:
            return Log(((x.row, 1.0),))
        if isinstance(x, Scaled) and isinstance(y, LogSumExp) and x.row != y.row and y.kept:
            if same(*(example(value.row.logits).shape for value in (x, y))):
                self.reading.missed[node] = f"logits {_OF_ANOTHER_ROW}"
            return None
        if isinstance(x, LogSumExp) and isinstance(y, LogitProducts) and x.row == y.row:
            if y.reduced and not x.kept:
                self._record(Single(node, x.row))
        elif not isinstance(x, Picked) or not isinstance(y, LogSumExp):
            return None
        elif x.row != y.row:
            self.reading.missed[node] = f"logits of tokens {_OF_ANOTHER_ROW}"
        elif x.squeezed is not y.kept:
            self._record(Single(node, x.row, x.index, x.squeezed))
        return None
