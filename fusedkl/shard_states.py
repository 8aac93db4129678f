"""What ranks tell each other of their slices of a row: a packed part of the state, and its merge.

Of a divergence 2 numbers for logsumexp(y/T), 2 for D = logsumexp(x/T) - logsumexp(y/T), and 2 for
its value: 6 per row for one kind. A slice without any y sends logsumexp(x/T) in the place of D.
What is asked of one side alone adds 2 for its logsumexp, where that is not sent already, 1 for each
number and 2 for a sum of logits; a token's log-probability adds its logit, 0 from the ranks that do
not have the token.

A pair of numbers is one sum a + b in two parts of the payload's dtype, the first of which is a
multiple of 1/T: a logit, or a difference of logits, that is exact stays so, and the second part
keeps the digits of a small rest. So float32 carries what float64 does.

fusedkl::slice_state(policy, reference?, fields, inv_temperature?, mask?, valid_vocab?, softcap?,
    means, second_sweep, backend) -> state [N, S] of rows that are slices, as exact as gradients
    need it; means: the gradient of reverse_kl to the policy or of forward_kl to the reference will
    be asked for; second_sweep: row_sums will be
fusedkl::merge_payload(gathered [P, N, C], fields, inv_temperature?, backend) -> [N, C]: what a
    rank that had the whole rows would send
fusedkl::merge_shards(gathered [P, N, C], fields, inv_temperature?, mask?, softcap?, backend)
    -> values [R, N], state [N, S] float64, of whole rows, the same bits on every rank
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import contents, divergences, reference
from ._library import LIB, NAMESPACE, TAGS
from .sliced_rows import of_parts, token_sides

# Columns that a field needs beside its own: of a mean, the sum and the number of its terms; of a
# divergence that may be infinite, a KL that then is.
_BESIDE = {"mean_logprob": ("logit_sum", "tokens"), "renyi": ("forward_kl",)}
# Elements of the states that are merged at a time: rows x ranks x columns.
_BLOCK = 2**19


class _Packing(NamedTuple):
    """What is sent for some fields."""

    narrow: bool  # float32: a number of the state goes in two parts
    policy: bool  # logsumexp of a side
    reference: bool
    ratio: bool  # D
    exact: tuple[str, ...]  # columns of the state that something is subtracted from
    plain: tuple[str, ...]  # other columns

    @property
    def columns(self) -> int:
        pairs = self.policy + self.reference + self.ratio
        return 2 * pairs + (1 + self.narrow) * len(self.exact) + len(self.plain)


def _packing(
    fields: tuple[str, ...] | list[str], sent: torch.dtype, device: torch.device
) -> _Packing:
    known = [divergences.FIELDS[name] for name in fields]
    sides = {field.side for field in known}
    columns = [c for field in known for c in (field.column, *_BESIDE.get(field.name, ())) if c]
    exact = tuple(c for c in columns if c in ("forward_kl", "reverse_kl", "logit_sum"))
    plain = tuple(c for c in columns if c not in (*exact, "divergence"))
    both = "both" in sides
    narrow = sent != reference.inside(device)
    return _Packing(narrow, "policy" in sides, both or "reference" in sides, both, exact, plain)


def _rounded(t: Tensor, dtype: torch.dtype) -> Tensor:
    """In `dtype`: infinite where it was, and only there."""
    largest = torch.finfo(dtype).max
    return torch.where(t.isinf(), t, t.clamp(-largest, largest)).to(dtype)


def scale(inv_temperature: Tensor | None, like: Tensor) -> Tensor:
    return like.new_ones(1) if inv_temperature is None else inv_temperature


class Writer:
    """The columns of a payload."""

    def __init__(self, dtype: torch.dtype, narrow: bool, inv_t: Tensor) -> None:
        self.dtype, self.narrow, self.inv_t = dtype, narrow, inv_t
        self.out: list[Tensor] = []

    def number(self, t: Tensor) -> None:
        self.out.append(_rounded(t, self.dtype))

    def _first(self, total: Tensor) -> Tensor:
        first = _rounded(torch.where(total.isfinite(), total, 0), self.dtype)
        self.out.append(first)
        return first.to(total.dtype)

    def exact(self, t: Tensor) -> None:
        self.number(t - self._first(t) if self.narrow else t)

    def logsumexp(self, top: Tensor, rest: Tensor) -> None:
        """top + rest, top a logit / T: as a number / T and what is left."""
        if self.narrow:
            first = self._first((top + rest) / self.inv_t)
            top = top - first * self.inv_t
            self.number(top + rest)
        else:
            self.out += [top, rest]

    def ratio(self, centre: Tensor, residual: Tensor) -> None:
        """centre / T + residual, likewise."""
        if self.narrow:
            first = self._first(centre + residual / self.inv_t)
            self.number((centre - first) * self.inv_t + residual)
        else:
            self.out += [centre, residual]


def pack(
    state: Tensor,
    tokens: list[Tensor],
    fields: tuple[str, ...],
    inv_temperature: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """[N, C] of `dtype`: the state [N, S] of a slice, and logits [N, K] of tokens."""
    column = dict(zip(reference.STATE, state.unbind(-1), strict=True))
    inv_t, plan = scale(inv_temperature, state), _packing(fields, dtype, state.device)
    writer = Writer(dtype, plan.narrow, inv_t)
    for side in ("policy", "reference"):
        if getattr(plan, side):
            writer.logsumexp(column[f"{side}_max"], column[f"{side}_log_sum"])
    if plan.ratio:
        mine, has = column["policy_log_sum"], column["reference_log_sum"] > -torch.inf
        # -inf where the slice has no x, and NaN where it is not a number, whatever a kernel says
        residual = torch.where(mine > -torch.inf, column["residual"], mine)
        writer.ratio(
            torch.where(has, column["centre"], column["policy_max"] / inv_t),
            torch.where(has, residual, mine),
        )
    for name in plan.exact:
        writer.exact(column[name])
    for name in plan.plain:
        writer.number(column[name])
    return torch.cat([torch.stack(writer.out, -1), *(t.to(dtype) for t in tokens)], -1)


def _unpack(gathered: Tensor, plan: _Packing, inv_t: Tensor) -> Tensor:
    """The states [P, n, S] of the slices, as far as they were sent."""
    sent = iter(gathered.to(inv_t.dtype).unbind(-1))
    column: dict[str, Tensor] = {}
    for side in ("policy", "reference"):
        if getattr(plan, side):
            top = next(sent)
            column[f"{side}_max"] = top * inv_t if plan.narrow else top
            column[f"{side}_log_sum"] = next(sent)
    if plan.ratio:
        first, rest = next(sent), next(sent)
        has = column["reference_log_sum"] > -torch.inf
        if not plan.policy:
            other = [
                torch.where(has, column[f"reference_{half}"], 0) for half in ("max", "log_sum")
            ]
            column["policy_max"] = other[0] + first * inv_t
            column["policy_log_sum"] = other[1] + rest
        alone = torch.where(column["policy_log_sum"] > -torch.inf, torch.inf, 0)
        column["centre"] = torch.where(has, first, 0)
        column["residual"] = torch.where(has, rest, alone)
    for name in plan.exact:
        first = next(sent)
        column[name] = first + next(sent) if plan.narrow else first
    for name in plan.plain:
        column[name] = next(sent)
    none = torch.zeros_like(gathered[..., 0], dtype=inv_t.dtype)
    return torch.stack([column.get(name, none) for name in reference.STATE], -1)


def _blocks(gathered: Tensor, inv_temperature: Tensor | None) -> Any:
    """Some rows at a time: which, their payloads, their 1/T; the states made of them are large."""
    parts, n, _ = gathered.shape
    step = max(1, _BLOCK // (parts * len(reference.STATE)))
    for at in range(0, n, step):
        rows = slice(at, min(at + step, n))
        inverse = inv_temperature
        if inverse is not None and inverse.shape[0] != 1:
            inverse = inverse[rows]
        yield rows, gathered[:, rows], inverse


def _merge_payload(
    gathered: Tensor, fields: list[str], inv_temperature: Tensor | None, backend: str
) -> Tensor:
    plan = _packing(fields, gathered.dtype, gathered.device)
    whole = torch.empty_like(gathered[0])
    for rows, block, inverse in _blocks(gathered, inv_temperature):
        inv_t = scale(inverse, block.new_empty(0, dtype=reference.inside(block.device)))
        states = _unpack(block[..., : plan.columns], plan, inv_t)
        _, state = torch.ops.fusedkl.merge_states(states, ["forward_kl"], inverse, backend)
        tokens = block[..., plan.columns :].sum(0)  # a logit and zeros: no bit changes
        whole[rows] = pack(state, [tokens], tuple(fields), inverse, gathered.dtype)
    return whole


def _merge_payload_fake(gathered: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(gathered[0])


def _merge_shards(
    gathered: Tensor,
    fields: list[str],
    inv_temperature: Tensor | None,
    mask: Tensor | None,
    softcap: float | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    plan = _packing(fields, gathered.dtype, gathered.device)
    values, state = _merge_shards_fake(gathered, fields)
    sides = token_sides(fields)
    for rows, block, inverse in _blocks(gathered, inv_temperature):
        states = _unpack(block[..., : plan.columns], plan, scale(inverse, state))
        # of one rank a logit, of the others 0
        logits = block[..., plan.columns :].sum(0).to(state.dtype).t().chunk(max(1, len(sides)))
        if softcap is not None:
            logits = tuple(reference.capped(x, softcap) for x in logits)
        tokens = dict(zip(sides, logits, strict=False))
        values[:, rows], state[rows] = of_parts(states, tokens, fields, inverse, backend)
    if backend == "cpu":  # csrc/cpu/rows.h
        state[:, reference.STATE.index("whole")] = -1
    if mask is not None:
        values.masked_fill_(~mask, 0)
    return values, state


def _merge_shards_fake(gathered: Tensor, fields: list[str], *_: Any) -> tuple[Tensor, Tensor]:
    n, width = gathered.shape[1:]
    plan = _packing(fields, gathered.dtype, gathered.device)
    per_row = (width - plan.columns) // max(1, len(token_sides(fields)))
    inner = reference.inside(gathered.device)
    return (
        gathered.new_empty((divergences.value_rows(fields, per_row), n), dtype=inner),
        gathered.new_empty((n, len(reference.STATE)), dtype=inner),
    )


def empty_state(rows: Tensor) -> Tensor:
    """The state [N, S] of slices that hold nothing of rows [..., V]."""
    state = _slice_state_fake(rows).zero_()
    for side in ("policy", "reference"):
        state[:, reference.STATE.index(f"{side}_log_sum")] = -torch.inf
    return state


def _slice_state(
    policy: Tensor,
    reference_: Tensor | None,
    fields: list[str],
    inv_temperature: Tensor | None,
    mask: Tensor | None,
    valid_vocab: int | None,
    softcap: float | None,
    means: bool,
    second_sweep: bool,
    backend: str,
) -> Tensor:
    if valid_vocab == 0 or policy.shape[-1] == 0:
        if inv_temperature is not None and inv_temperature.device.type == "cpu":
            contents.temperatures(inv_temperature, mask)  # the other ranks raise too
        return empty_state(policy)
    controls = (inv_temperature, mask, valid_vocab)
    state: Tensor
    _, state = torch.ops.fusedkl.row_stats(
        policy, reference_, None, fields, None, *controls, softcap, backend
    )
    if backend == "cpu" and softcap is None and {"forward_kl", "reverse_kl"} & set(fields):
        OPS._sharpen_states(policy, reference_, state, means, second_sweep, *controls)
    return state


def _slice_state_fake(policy: Tensor, *_: Any) -> Tensor:
    shape = (math.prod(policy.shape[:-1]), len(reference.STATE))
    return policy.new_empty(shape, dtype=reference.inside(policy.device))


for _name, _schema, _kernel, _fake in (
    (
        "slice_state",
        "(Tensor policy, Tensor? reference, str[] fields, Tensor? inv_temperature, Tensor? mask, "
        "int? valid_vocab, float? softcap, bool means, bool second_sweep, str backend) -> Tensor",
        _slice_state,
        _slice_state_fake,
    ),
    (
        "merge_payload",
        "(Tensor gathered, str[] fields, Tensor? inv_temperature, str backend) -> Tensor",
        _merge_payload,
        _merge_payload_fake,
    ),
    (
        "merge_shards",
        "(Tensor gathered, str[] fields, Tensor? inv_temperature, Tensor? mask, float? softcap, "
        "str backend) -> (Tensor values, Tensor state)",
        _merge_shards,
        _merge_shards_fake,
    ),
):
    LIB.define(_name + _schema, tags=TAGS)
    LIB.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=LIB)
LIB.define(
    "_sharpen_states(Tensor policy, Tensor reference, Tensor(a!) state, bool means, "
    "bool second_sweep, Tensor? inv_temperature, Tensor? mask, int? valid_vocab) -> ()",
    tags=TAGS,
)
OPS = getattr(torch.ops, NAMESPACE)
