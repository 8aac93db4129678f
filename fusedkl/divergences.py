"""The registry: which per-row numbers exist, and which of them make up each divergence.

Names are strings from here to the kernels. p = softmax(policy / T), q = softmax(reference / T).
Adding a divergence: CONTRIBUTING.md; tests/test_registry.py lists what is still missing.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Field:
    """One number per row (per token id, where it needs them) that a backend computes."""

    name: str
    formula: str
    side: str  # whose logits it reads: "policy", "reference" or "both"
    needs_token_ids: bool = False
    column: str | None = None  # of the state, which its gradient reads
    parameter: str | None = None  # what the kernels' `parameter` is to it
    second_sweep: bool = False  # needs log(p/q) before its first term

    @property
    def needs_reference(self) -> bool:
        return self.side != "policy"


@dataclass(frozen=True)
class Divergence:
    """A public divergence: the sum of the fields it names."""

    name: str
    formula: str
    fields: tuple[str, ...]
    parameter: str | None = None  # "beta" or "alpha"
    default: float | None = None
    limits: tuple[tuple[float, str], ...] = ()  # values of the parameter that are another field


FIELDS: dict[str, Field] = {
    field.name: field
    for field in (
        Field("forward_kl", "sum q (log q - log p)", "both", column="forward_kl"),
        Field("reverse_kl", "sum p (log p - log q)", "both", column="reverse_kl"),
        Field("entropy", "-sum p log p", "policy", column="entropy"),
        Field("logsumexp", "log sum exp(policy / T)", "policy"),
        Field("logprob", "log p[token]", "policy", needs_token_ids=True),
        Field("mean_logprob", "mean of log p over the vocabulary", "policy"),
        Field("ref_entropy", "-sum q log q", "reference", column="reference_entropy"),
        Field("ref_logsumexp", "log sum exp(reference / T)", "reference"),
        Field("ref_logprob", "log q[token]", "reference", needs_token_ids=True),
        Field("log_ratio", "log p[token] - log q[token]", "both", needs_token_ids=True),
        Field(
            "jsd",
            "beta KL(q || m) + (1 - beta) KL(p || m), m = (1 - beta) p + beta q",
            "both",
            column="divergence",
            parameter="beta",
            second_sweep=True,
        ),
        Field(
            "skew_kl",
            "KL(q || alpha q + (1 - alpha) p)",
            "both",
            column="divergence",
            parameter="alpha",
            second_sweep=True,
        ),
        Field(
            "renyi",
            "log(sum q^alpha p^(1 - alpha)) / (alpha - 1)",
            "both",
            column="divergence",
            parameter="alpha",
            second_sweep=True,
        ),
        Field("tvd", "sum |p - q| / 2", "both", column="divergence", second_sweep=True),
        Field("hellinger", "1 - sum sqrt(p q)", "both", column="divergence", second_sweep=True),
    )
}

DIVERGENCES: dict[str, Divergence] = {
    divergence.name: divergence
    for divergence in (
        Divergence("forward_kl", "KL(q || p) = sum q (log q - log p)", ("forward_kl",)),
        Divergence("reverse_kl", "KL(p || q) = sum p (log p - log q)", ("reverse_kl",)),
        Divergence("jeffreys", "KL(q || p) + KL(p || q)", ("forward_kl", "reverse_kl")),
        Divergence(
            "jsd",
            "beta KL(q || m) + (1 - beta) KL(p || m), m = (1 - beta) p + beta q",
            ("jsd",),
            "beta",
            0.5,
            ((0.0, "forward_kl"), (1.0, "reverse_kl")),
        ),
        Divergence("skew_kl", "KL(q || alpha q + (1 - alpha) p)", ("skew_kl",), "alpha", 0.1),
        Divergence(
            "renyi",
            "log(sum q^alpha p^(1 - alpha)) / (alpha - 1)",
            ("renyi",),
            "alpha",
            None,
            ((1.0, "forward_kl"),),
        ),
        Divergence("tvd", "sum |p - q| / 2", ("tvd",)),
        Divergence("hellinger", "1 - sum sqrt(p q)", ("hellinger",)),
    )
}
# Where each divergence is defined: (from, to], [from, to] and so on are said by `accepts`.
_RANGES = {
    "jsd": ("from 0 to 1", lambda v: 0 <= v <= 1),
    "skew_kl": ("greater than 0 and less than 1", lambda v: 0 < v < 1),
    "renyi": ("greater than 0 and finite", lambda v: 0 < v < float("inf")),
}


def get(kind: str) -> Divergence:
    """The divergence called `kind`; a ValueError that lists all of them if there is none."""
    if not isinstance(kind, str):
        raise TypeError(f"kind must be a string, got {type(kind).__name__}")
    if kind not in DIVERGENCES:
        raise ValueError(f"kind must be one of {', '.join(DIVERGENCES)}; got {kind!r}")
    return DIVERGENCES[kind]


def resolve(
    kind: str, beta: float | None = None, alpha: float | None = None
) -> tuple[tuple[str, ...], float | None]:
    """The fields whose sum is the divergence, and their parameter.

    An option that the kind does not use, and a value where it is not defined, is an error. Where
    the parameter makes the divergence another field, that field takes its place.
    """
    definition = get(kind)
    given = {"beta": beta, "alpha": alpha}
    for name, value in given.items():
        if value is not None and name != definition.parameter:
            raise ValueError(f"{name}={value} has no effect on kind={kind!r}")
    if definition.parameter is None:
        return definition.fields, None
    name = definition.parameter
    value = definition.default if given[name] is None else given[name]
    if value is None:
        raise ValueError(f"kind={kind!r} needs {name}")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number; got {type(value).__name__}")
    said, accepts = _RANGES[kind]
    if not accepts(value):
        raise ValueError(f"{name} of {kind} must be {said}; got {value}")
    for limit, field in definition.limits:
        if value == limit:
            return (field,), None
    return definition.fields, float(value)


def value_rows(fields: tuple[str, ...] | list[str], token_ids_per_row: int) -> int:
    """R of the operators' values [R, N]: one row per field, K rows where it is per token."""
    return sum(token_ids_per_row if FIELDS[name].needs_token_ids else 1 for name in fields)
