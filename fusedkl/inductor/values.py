"""What a tensor of a graph is, in terms of rows of logits; and sums, products, logs of that.

p_a, log p_a stand for softmax and log_softmax of a row `a`. Everything that the pass rewrites is a
sum over the vocabulary of

    Products:  sum of c[a, b] p_a log p_b        b a row, or a mixture of two

    sum over v of  c p_a log p_b  =  -c KL(a || b) - c H(a)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node


@dataclass(frozen=True)
class Row:
    """logits / temperature, over the last dim. temperature: a positive number, None for 1."""

    logits: Node
    temperature: float | None = None
    detached: bool = False


@dataclass(frozen=True)
class Mixture:
    """log(w_a p_a + w_b p_b), as ((a, w_a), (b, w_b))."""

    parts: tuple[tuple[Row, float], ...]


@dataclass(frozen=True)
class Scaled:
    """The logits of a row themselves."""

    row: Row


@dataclass(frozen=True)
class LogSumExp:
    """logsumexp of a row; kept: with a last dim of 1."""

    row: Row
    kept: bool


@dataclass(frozen=True)
class Prob:
    """p_a."""

    row: Row


Atom = Row | Mixture


@dataclass(frozen=True)
class Log:
    """sum of c log p_a over the atoms, plus a constant."""

    terms: tuple[tuple[Atom, float], ...]
    constant: float = 0.0


@dataclass(frozen=True)
class Products:
    """sum of c p_a log p_b, then what was done to whole rows: ("mul" | "index" | "fill", node)."""

    terms: tuple[tuple[tuple[Row, Atom], float], ...]
    then: tuple[tuple[str, Node], ...] = ()


@dataclass(frozen=True)
class LogitProducts:
    """p_a x_a / T, elementwise; reduced: summed over the vocabulary."""

    row: Row
    reduced: bool = False


@dataclass(frozen=True)
class Picked:
    """logits of a row at an index [..., K]; squeezed: K = 1 and its dim is gone."""

    row: Row
    index: Node
    squeezed: bool = False


@dataclass(frozen=True)
class Constant:
    """A number, or a 0-d tensor that holds one."""

    value: float


@dataclass(frozen=True)
class Stacked:
    """Several values, stacked in a new first dim."""

    parts: tuple[Any, ...]


Value = Any  # one of the above, or None for whatever else


def merged(terms: Iterable[tuple[Any, float]], rounding: float = 1e-12) -> dict[Any, float]:
    """The sum of coefficients for each key, but for those that cancel up to rounding."""
    total: dict[Any, float] = defaultdict(float)
    size: dict[Any, float] = defaultdict(float)
    for key, coefficient in terms:
        total[key] += coefficient
        size[key] += abs(coefficient)
    return {key: c for key, c in total.items() if abs(c) > rounding * size[key]}


def scale(value: Value, by: float) -> Value:
    """value * by."""
    if isinstance(value, Constant):
        return Constant(value.value * by)
    if isinstance(value, Log):
        return Log(tuple((k, c * by) for k, c in value.terms), value.constant * by)
    if isinstance(value, Products):
        return replace(value, terms=tuple((k, c * by) for k, c in value.terms))
    return None


def add(a: Value, b: Value) -> Value:
    """a + b."""
    if isinstance(a, Constant) and isinstance(b, Constant):
        return Constant(a.value + b.value)
    if isinstance(a, Log) and isinstance(b, Log):
        return Log(tuple(merged((*a.terms, *b.terms)).items()), a.constant + b.constant)
    if isinstance(a, Log) and isinstance(b, Constant):
        return replace(a, constant=a.constant + b.value)
    if isinstance(b, Log) and isinstance(a, Constant):
        return add(b, a)
    if isinstance(a, Products) and isinstance(b, Products) and a.then == b.then:
        return Products(tuple(merged((*a.terms, *b.terms)).items()), a.then)
    return None


def multiply(a: Value, b: Value) -> Value:
    """a * b."""
    if isinstance(b, Prob) or isinstance(a, Constant):
        a, b = b, a
    if isinstance(b, Constant):
        return scale(a, b.value)
    if isinstance(a, Prob) and isinstance(b, Log) and b.constant == 0:
        return Products(tuple(merged(((a.row, atom), c) for atom, c in b.terms).items()))
    if isinstance(a, Prob) and isinstance(b, Scaled) and a.row == b.row:
        return LogitProducts(a.row)
    return None


def log_of(value: Value) -> Row | Mixture | None:
    """The atom whose log a value is, if it is just that."""
    if isinstance(value, Log) and value.constant == 0 and len(value.terms) == 1:
        atom, coefficient = value.terms[0]
        if coefficient == 1:
            return atom
    return None


def detach(value: Value) -> Value:
    """The same numbers without their gradient."""

    def bare(atom: Any) -> Any:
        if isinstance(atom, Mixture):
            return Mixture(tuple((bare(row), w) for row, w in atom.parts))
        requires = getattr(atom.logits.meta.get("example_value"), "requires_grad", True)
        return replace(atom, detached=bool(requires))

    if isinstance(value, (Scaled, LogSumExp, Prob, Picked, LogitProducts)):
        return replace(value, row=bare(value.row))
    if isinstance(value, Log):
        return replace(value, terms=tuple((bare(k), c) for k, c in value.terms))
    if isinstance(value, Products):
        terms = tuple(((bare(a), bare(b)), c) for (a, b), c in value.terms)
        return replace(value, terms=terms)
    if isinstance(value, Stacked):
        return Stacked(tuple(detach(part) for part in value.parts))
    return value
