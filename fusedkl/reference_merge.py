"""The chain rule over slices of a vocabulary in plain torch; in C++: merge() of csrc/row_math.h.

A slice counts as one token of a vocabulary of slices: with P_i, Q_i its masses, D_i its log-ratio
of normalisers, and F_i, R_i, H_i its own numbers,

    F = sum Q_i F_i + sum Q_i g(D_i - D)    R = sum P_i R_i + sum P_i g(D - D_i)
    H = sum P_i (H_i - log P_i)

for the D and the masses of all slices together. Every term is non-negative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .divergences import FIELDS
from .reference import STATE, gap


def total(top: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(max, log_sum) of all parts [P, N] together as [N], and each part's log share [P, N]."""
    lse = top + log_sum
    heaviest = lse.argmax(0, keepdim=True)
    # differences of the two halves: a logsumexp of 1e4 has no digits left for them
    apart = (top - top.gather(0, heaviest)) + (log_sum - log_sum.gather(0, heaviest))
    empty = lse.amax(0) == -torch.inf
    others = torch.exp(apart).scatter(0, heaviest, 0).sum(0)
    more = torch.where(empty, 0, torch.log1p(others))
    share = torch.where(lse == -torch.inf, -torch.inf, apart - more)
    return top.gather(0, heaviest)[0], log_sum.gather(0, heaviest)[0] + more, share


def _terms(weight: Tensor, has: Tensor, other: Tensor, own: Tensor, log_ratio: Tensor) -> Tensor:
    """sum of weight (own + g(log_ratio)), log_ratio that of other to weight; inf where it must.

    has: where there is a weight, which may underflow.
    """
    near = weight * gap(log_ratio.clamp(max=1))
    # weight e^l is `other`: beyond 1 it may be 0 times infinity, and no longer cancels
    between = torch.where(log_ratio > 1, (other - weight) - weight * log_ratio, near)
    infinite = has & ((log_ratio == -torch.inf) | (own == torch.inf))
    terms = torch.where(has, weight * own + between, other)
    return torch.where(infinite, torch.inf, terms).sum(0)


def merge_states(
    parts: Tensor, fields: list[str], inv_temperature: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Operator `merge_states` (fusedkl/ops.py)."""
    column = {name: parts[..., i] for i, name in enumerate(STATE)}
    inv_t = parts.new_ones(1) if inv_temperature is None else inv_temperature
    bad = {side: column[f"{side}_log_sum"].isnan().any(0) for side in ("policy", "reference")}
    merged = dict.fromkeys(STATE, torch.zeros_like(parts[0, :, 0]))
    if parts.shape[0] == 1:
        merged = {name: column[name][0] for name in STATE}
    else:
        merged["policy_max"], merged["policy_log_sum"], log_p = total(
            column["policy_max"], column["policy_log_sum"]
        )
        merged["reference_max"], merged["reference_log_sum"], log_q = total(
            column["reference_max"], column["reference_log_sum"]
        )
        p, q = torch.exp(log_p), torch.exp(log_q)
        has_p, has_q = log_p > -torch.inf, log_q > -torch.inf
        # D about the heaviest slice of the reference: it keeps the digits that a difference of two
        # logsumexps of size 1e4 would lose
        origin = log_q.argmax(0, keepdim=True)
        centre = column["centre"].gather(0, origin)
        residual = column["residual"].gather(0, origin)
        apart = (column["centre"] - centre) * inv_t + (column["residual"] - residual)
        apart = torch.where(has_p & has_q, apart, -torch.inf)
        spread = torch.where(has_q, q * torch.expm1(apart), 0).sum(0)
        plain = ((merged["policy_max"] - merged["reference_max"]) - centre[0] * inv_t) + (
            merged["policy_log_sum"] - merged["reference_log_sum"]
        )
        centred = ~(has_p & ~has_q).any(0) & (spread > -0.5) & (spread < 1e6)
        merged["centre"] = centre[0]
        merged["residual"] = torch.where(centred, residual[0] + torch.log1p(spread), plain)
        log_ratio = (column["centre"] - centre) * inv_t + (column["residual"] - merged["residual"])
        log_ratio = torch.where(has_q, torch.where(has_p, log_ratio, -torch.inf), torch.inf)
        merged["forward_kl"] = _terms(q, has_q, p, column["forward_kl"], log_ratio)
        merged["reverse_kl"] = _terms(p, has_p, q, column["reverse_kl"], -log_ratio)
        for mine, log_share, share in (("entropy", log_p, p), ("reference_entropy", log_q, q)):
            terms = share * (column[mine] - log_share)
            merged[mine] = torch.where(log_share > -torch.inf, terms, 0).sum(0)
        for name in ("logit_sum", "tokens"):
            merged[name] = column[name].sum(0)
    numbers = merged | {
        "logsumexp": merged["policy_max"] + merged["policy_log_sum"],
        "ref_logsumexp": merged["reference_max"] + merged["reference_log_sum"],
        "ref_entropy": merged["reference_entropy"],
        "mean_logprob": (merged["logit_sum"] / merged["tokens"] - merged["policy_max"])
        - merged["policy_log_sum"],
    }
    # a side without any token is no distribution as a row, and may be one slice of it
    lost = {side: bad[side] | (merged[f"{side}_log_sum"] == -torch.inf) for side in bad}
    lost["both"] = lost["policy"] | lost["reference"]
    rows = [torch.where(lost[FIELDS[name].side], torch.nan, numbers[name]) for name in fields]
    values = torch.stack(rows) if rows else parts.new_empty((0, parts.shape[1]))
    bad["both"] = bad["policy"] | bad["reference"]
    state = []
    for name in STATE:
        side = _side(name)
        column_ = merged[name]
        state.append(column_ if side is None else column_.masked_fill(bad[side], torch.nan))
    return values, torch.stack(state, -1)


def _side(column: str) -> str | None:
    """Whose logits a column of the state stands on; None: nobody's."""
    if column in ("whole", "tokens"):
        return None
    if column.startswith("reference_") and column != "reference_slope":
        return "reference"
    own = ("policy_max", "policy_log_sum", "entropy", "logit_sum")
    return "policy" if column in own else "both"
