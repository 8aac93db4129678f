"""Reads a graph forward: which nodes are sums of p log p terms over a vocabulary, and why not."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from . import values
from .calls import example
from .found import Single, Sum, last, same
from .rows import Rows
from .values import Log, LogitProducts, LogSumExp, Picked, Prob, Products, Row, Scaled, Value


def _dims(dim: Any) -> Any:
    """To torch no dims at all are all of them."""
    return None if isinstance(dim, (tuple, list)) and not dim else dim


def _adds_a_last_dim(index: Any, dims: int) -> bool:
    """Whether it is [..., None] or [:, None] of all dims."""
    if not isinstance(index, tuple) or not index or index[-1] is not None:
        return False
    before = index[:-1]
    if any(part is not Ellipsis and part != slice(None) for part in before):
        return False
    return Ellipsis in before or len(before) == dims


class Reader(Rows):
    """Rows, and what is done with products of them: weights, masks, sums, picked tokens."""

    def _products(self, value: Value, x: Any) -> tuple[Products, Any] | None:
        return (value, example(x)) if isinstance(value, Products) else None

    def _per_row(self, other: Any, tensor: Any) -> bool:
        found = example(other)
        return isinstance(found, torch.Tensor) and same(found.shape, (*tensor.shape[:-1], 1))

    def _weighted(self, x: Value, left: Any, y: Value, right: Any) -> Value:
        if isinstance(y, Products):
            x, left, y, right = y, right, x, left
        if isinstance(x, Products) and self._per_row(right, example(left)):
            return Products(x.terms, (*x.then, ("mul", right)))
        return None

    def _masked_fill(self, node: Node, x: Any, mask: Any, value: Any) -> Value:
        products = self.value(x)
        if isinstance(products, Products) and value == 0 and self._per_row(mask, example(x)):
            return Products(products.terms, (*products.then, ("fill", mask)))
        return None

    def _where(self, node: Node, mask: Any, x: Any, value: Any) -> Value:
        products = self.value(x)
        if isinstance(products, Products) and value == 0 and self._per_row(mask, example(x)):
            return Products(products.terms, (*products.then, ("keep", mask)))
        return None

    def _getitem(self, node: Node, x: Any, index: Any) -> Value:
        products, mask, tensor = self.value(x), example(index), example(x)
        if isinstance(products, LogSumExp) and _adds_a_last_dim(index, tensor.dim()):
            return self._unsqueeze(node, x, -1)
        if isinstance(index, tuple) and isinstance(values.log_of(products), Row):
            if any(isinstance(example(part), torch.Tensor) for part in index):
                self.reading.missed[node] = (
                    "log-probabilities of tokens by indexing; gather(-1, tokens) is known"
                )
            return None
        if not isinstance(products, Products) or not isinstance(mask, torch.Tensor):
            return None
        if mask.dtype != torch.bool or not same(mask.shape, tensor.shape[:-1]):
            return None
        return Products(products.terms, (*products.then, ("index", index)))

    def _sum(self, node: Node, x: Any, dim: Any = None, keepdim: bool = False) -> Value:
        value, tensor, dim = self.value(x), example(x), _dims(dim)
        if isinstance(value, LogitProducts) and last(dim, tensor) and not keepdim:
            return LogitProducts(value.row, reduced=True)
        if not isinstance(value, Products):
            return None
        if dim is None and not keepdim:
            self._record(Sum(node, value, ()))
        elif last(dim, tensor):
            self._record(Sum(node, value, keepdim=keepdim))
        elif isinstance(dim, (tuple, list)) and not keepdim:
            dims = tuple(sorted(d % tensor.dim() for d in dim))
            if dims[-1] == tensor.dim() - 1:
                everything = len(dims) == tensor.dim()
                self._record(Sum(node, value, () if everything else dims[:-1]))
        return None

    def _mean(self, node: Node, x: Any, dim: Any = None, keepdim: bool = False) -> Value:
        value = self.value(x)
        if isinstance(value, Products) and _dims(dim) is None and not keepdim:
            self._record(Sum(node, value, (), divisor="elements"))
        return None

    def _kl_div(
        self,
        node: Node,
        x: Any,
        y: Any,
        size_average: Any = None,
        reduce: Any = None,
        reduction: str = "mean",
        log_target: bool = False,
    ) -> Value:
        log_input, target = self.value(x), self.value(y)
        if log_target:
            atom = values.log_of(target)
            target = Prob(atom) if isinstance(atom, Row) else None
        if not isinstance(log_input, Log) or not isinstance(target, Prob):
            wrong, what = (x, "input") if not isinstance(log_input, Log) else (y, "target")
            if wrong not in self.reading.missed:
                self.reading.missed[node] = f"kl_div: {what} {self._reason(wrong)}"
            return None
        if size_average is not None or reduce is not None:
            self.reading.missed[node] = "kl_div: size_average and reduce are not read"
            return None
        if not same(example(x).shape, example(y).shape):
            self.reading.missed[node] = "kl_div: input and target are broadcast"
            return None
        q = Log(((target.row, 1.0),))
        products = values.multiply(target, values.add(q, values.scale(log_input, -1.0)))
        if reduction == "none":
            return products
        divisor = {"sum": "", "batchmean": "rows", "mean": "elements"}.get(reduction)
        if divisor is not None and products is not None:
            self._record(Sum(node, products, (), divisor=divisor))
        return None

    # -- picked tokens -------------------------------------------------------------------------

    def _gather(self, node: Node, x: Any, dim: Any, index: Any) -> Value:
        value, tensor, ids = self.value(x), example(x), example(index)
        if tensor is None or ids is None:
            return None
        atom = values.log_of(value)
        if not last(dim, tensor) or not same(ids.shape[:-1], tensor.shape[:-1]):
            if isinstance(atom, Row):
                self.reading.missed[node] = (
                    f"gather of log-probabilities over dim {dim}, with an index "
                    f"{tuple(ids.shape)} that does not have their rows {tuple(tensor.shape[:-1])}"
                )
            return None
        if x in self._why:
            self.reading.missed[node] = f"gather: input {self._reason(x)}"
        if isinstance(atom, Row):
            self._record(Single(node, atom, index))
        return Picked(value.row, index) if isinstance(value, Scaled) else None

    def _squeeze(self, node: Node, x: Any, dim: Any = None) -> Value:
        value, tensor = self.value(x), example(x)
        if dim is None or tensor is None or not last(dim, tensor):
            return None
        if isinstance(value, Picked) and not value.squeezed and same(tensor.shape[-1], 1):
            return Picked(value.row, value.index, squeezed=True)
        return LogSumExp(value.row, False) if isinstance(value, LogSumExp) and value.kept else None

    def _unsqueeze(self, node: Node, x: Any, dim: Any) -> Value:
        value, tensor = self.value(x), example(x)
        if isinstance(value, LogSumExp) and not value.kept and dim in (-1, tensor.dim()):
            return LogSumExp(value.row, True)
        return None
