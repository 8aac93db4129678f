"""Values of rows from the states of their slices, and from the logits of single tokens.

Rows are cut into tiles of a fused lm_head (linear_tiles.py) and between the ranks of a group
(shard_states.py). A token is in one slice: the others add 0 to its logit, which changes no bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import divergences, reference


def local_fields(fields: tuple[str, ...] | list[str]) -> list[str]:
    """What is asked of a slice, so that its state has all that these fields need."""
    stand_in = {"policy": "logsumexp", "reference": "ref_logsumexp", "both": "forward_kl"}
    found = [
        stand_in[field.side] if field.needs_token_ids or field.second_sweep else field.name
        for field in (divergences.FIELDS[name] for name in fields)
    ]
    return list(dict.fromkeys(found))


def token_sides(fields: tuple[str, ...] | list[str]) -> tuple[str, ...]:
    """The rows whose logits at token_ids the fields need."""
    of_tokens = {f.side for f in (divergences.FIELDS[n] for n in fields) if f.needs_token_ids}
    return tuple(side for side in ("policy", "reference") if of_tokens & {side, "both"})


def second_sweep(fields: tuple[str, ...] | list[str]) -> str | None:
    """The field, of which there is one at most, that needs the state of whole rows."""
    return next((name for name in fields if divergences.FIELDS[name].second_sweep), None)


def token_logits(logits: Tensor, ids: Tensor) -> Tensor:
    """[N, K]: logits [..., V] at ids [N, K]; 0 at ids of -1, NaN at lower ones, of no token."""
    at = ids.view(*logits.shape[:-1], ids.shape[-1])
    absent = torch.where(at < -1, torch.nan, 0).to(logits.dtype)
    if logits.shape[-1] > 0:
        absent = torch.where(at >= 0, logits.gather(-1, at.clamp(min=0)), absent)
    return absent.reshape(ids.shape)


def of_parts(
    parts: Tensor,
    tokens: dict[str, Tensor],
    fields: tuple[str, ...] | list[str],
    inv_temperature: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Values [R, n] and state [n, S] of rows, from states [P, n, S] of their slices.

    tokens: logits [K, n] of each of `token_sides`, before the temperature. What takes a second
    sweep is 0 as yet.
    """
    known = [divergences.FIELDS[name] for name in fields]
    whole = [f.name for f in known if not f.needs_token_ids and not f.second_sweep]
    found, state = torch.ops.fusedkl.merge_states(parts, whole, inv_temperature, backend)
    values = {name: row[None] for name, row in zip(whole, found, strict=True)}
    if tokens:
        values |= _token_values(tokens, state, inv_temperature)
    rows = [torch.zeros_like(state[:, :1]).t() if f.second_sweep else values[f.name] for f in known]
    return torch.cat(rows) if rows else found, state


def _token_values(
    tokens: dict[str, Tensor], state: Tensor, inv_temperature: Tensor | None
) -> dict[str, Tensor]:
    """log p and log q of tokens, and log(p/q), [K, n], from their logits and the rows' state."""
    column = dict(zip(reference.STATE, state.unbind(-1), strict=True))
    inv_t = state.new_ones(1) if inv_temperature is None else inv_temperature
    found = {
        "logprob" if side == "policy" else "ref_logprob": (x * inv_t - column[f"{side}_max"])
        - column[f"{side}_log_sum"]
        for side, x in tokens.items()
    }
    if len(tokens) == 2:
        apart = (tokens["policy"] - tokens["reference"]) - column["centre"]
        found["log_ratio"] = apart * inv_t - column["residual"]
    return found


def put_sums(
    values: Tensor,
    state: Tensor,
    sums: Tensor,
    fields: tuple[str, ...] | list[str],
    parameter: float | None,
) -> Tensor:
    """The state with the sums [n, 3] of a second sweep over whole rows; its value into values."""
    name = second_sweep(fields)
    assert name is not None and not token_sides(fields)
    state = reference.with_sums(state, sums, name, parameter)
    values[list(fields).index(name)] = state[:, reference.STATE.index("divergence")]
    return state
