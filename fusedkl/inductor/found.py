"""What reading a graph finds, and questions about its fake tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .values import Products, Row


@dataclass(frozen=True)
class Sum:
    """A node that is a sum of Products: over the vocabulary, and over `dims` of what is left.

    dims: None for none, () for all.  divisor: "" | "rows" (size(0)) | "elements" (all).
    """

    node: Node
    products: Products
    dims: tuple[int, ...] | None = None
    keepdim: bool = False
    divisor: str = ""


@dataclass(frozen=True)
class Single:
    """A node that is the entropy of a row, or its log-probabilities at an index."""

    node: Node
    row: Row
    index: Node | None = None
    squeezed: bool = False


@dataclass
class Reading:
    """What a graph holds."""

    found: list[Sum | Single] = field(default_factory=list)
    missed: dict[Node, str] = field(default_factory=dict)
    known: dict[Node, Any] = field(default_factory=dict)  # what nodes are when they are made
    grad: dict[Node, bool] = field(default_factory=dict)  # the grad mode at each of `found`


def same(a: Any, b: Any) -> bool:
    """Whether two sizes or shapes are known to be equal."""
    if isinstance(a, (tuple, torch.Size)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return statically_known_true(a == b)


def last(dim: Any, tensor: Any) -> bool:
    """Whether `dim` is the last one of a fake tensor."""
    if isinstance(dim, (tuple, list)) and len(dim) == 1:
        dim = dim[0]
    return isinstance(dim, int) and tensor.dim() > 0 and dim in (-1, tensor.dim() - 1)
