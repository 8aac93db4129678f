"""What a sum of products is, in numbers that an operator computes for each row."""

from __future__ import annotations

from dataclasses import dataclass

from .calls import example
from .found import Single, Sum
from .values import Mixture, Row, merged


@dataclass(frozen=True)
class Number:
    """coefficient * kind(policy, reference) or kind(policy)."""

    coefficient: float
    kind: str
    policy: Row
    reference: Row | None = None
    parameter: float | None = None


def _requires_grad(row: Row) -> bool:
    return not row.detached and bool(getattr(example(row.logits), "requires_grad", True))


def _kl(coefficient: float, a: Row, b: Row) -> Number:
    """coefficient * KL(a || b), with the row that is trained as the policy."""
    if _requires_grad(a) and not _requires_grad(b):
        return Number(coefficient, "reverse_kl", a, b)
    return Number(coefficient, "forward_kl", b, a)


def numbers(found: Sum | Single) -> list[Number] | str:
    """What a node is the sum of, or why it cannot be computed."""
    if isinstance(found, Single):
        kind = "entropy" if found.index is None else "logprob"
        return [Number(1.0, kind, found.row)]
    terms = dict(found.products.terms)
    result: list[Number] = []
    entropies: list[tuple[Row, float]] = []
    for mixture in {b for _, b in terms if isinstance(b, Mixture)}:
        (a, wa), (b, wb) = mixture.parts
        factors = [-terms.pop((row, mixture), 0.0) / w for row, w in mixture.parts]
        if abs(factors[0] - factors[1]) > 1e-6 * abs(factors[0]):
            return "the two KLs of a Jensen-Shannon divergence are not weighted as its mixture is"
        entropies += [(row, -factors[0] * w) for row, w in mixture.parts]
        if _requires_grad(b) and not _requires_grad(a):
            a, b, wb = b, a, wa
        result.append(Number(factors[0], "jsd", a, b, wb))
    for (a, b_), c in terms.items():
        assert isinstance(b_, Row)
        if a != b_:
            result.append(_kl(-c, a, b_))
    entropies += [(a, c) for (a, _), c in terms.items()]
    left = merged(entropies, rounding=1e-9)
    result += [Number(-c, "entropy", a) for a, c in left.items()]
    return result or "nothing is left of its terms: it is the KL of a row with itself"
