"""The registry: which per-row numbers exist, and which of them make up each divergence.

Names are strings from here to the kernels. p = softmax(policy / T), q = softmax(reference / T).
Adding a divergence: CONTRIBUTING.md; tests/test_registry.py lists what is still missing.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Field:
    """One number per row (per token id: logprob) that a backend computes."""

    name: str
    formula: str
    needs_reference: bool = False
    needs_token_ids: bool = False


@dataclass(frozen=True)
class Divergence:
    """A public divergence: the sum of the fields it names."""

    name: str
    formula: str
    fields: tuple[str, ...]


FIELDS: dict[str, Field] = {
    field.name: field
    for field in (
        Field("forward_kl", "sum q (log q - log p)", needs_reference=True),
        Field("reverse_kl", "sum p (log p - log q)", needs_reference=True),
        Field("entropy", "-sum p log p"),
        Field("logsumexp", "log sum exp(policy / T)"),
        Field("logprob", "log p[token]", needs_token_ids=True),
    )
}

DIVERGENCES: dict[str, Divergence] = {
    divergence.name: divergence
    for divergence in (
        Divergence("forward_kl", "KL(q || p) = sum q (log q - log p)", ("forward_kl",)),
        Divergence("reverse_kl", "KL(p || q) = sum p (log p - log q)", ("reverse_kl",)),
        Divergence("jeffreys", "KL(q || p) + KL(p || q)", ("forward_kl", "reverse_kl")),
    )
}


def get(kind: str) -> Divergence:
    """The divergence called `kind`; a ValueError that lists all of them if there is none."""
    if not isinstance(kind, str):
        raise TypeError(f"kind must be a string, got {type(kind).__name__}")
    if kind not in DIVERGENCES:
        raise ValueError(f"kind must be one of {', '.join(DIVERGENCES)}; got {kind!r}")
    return DIVERGENCES[kind]


def value_rows(fields: tuple[str, ...] | list[str], token_ids_per_row: int) -> int:
    """R of the operators' values [R, N]: one row per field, K rows for logprob."""
    return sum(token_ids_per_row if FIELDS[name].needs_token_ids else 1 for name in fields)
