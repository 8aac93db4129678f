"""The second sweep's launches: a divergence of family.py, and operator row_sums."""

from __future__ import annotations

import torch
from torch import Tensor

from .careful import CAREFUL_BLOCK
from .launch import LANES, Call, Piece, aligned, on, pieces
from .second_sweep import SUMS, careful_family, finish_family, sweep_family


def sweep_again(
    call: Call, piece: Piece, flags: Tensor, states: Tensor, values: Tensor, out: Tensor | None
) -> None:
    """Of a piece's rows: the divergence into values and states, or the sums of a slice into out.

    flags [n]: not 0 for rows that are to be taken in float64.
    """
    n, sizes = call.rows, call.sizes()
    segments = -(-call.vocab // sizes.segment)
    parts = torch.empty(segments * SUMS.value * n, dtype=torch.float32, device=flags.device)
    inverse, counted, _ = call.pointers(states)
    strides = [step for steps in piece.strides for step in steps]
    line = call.line_of(call.family or "")
    what = {"FIELD": call.family, "SLICE": out is not None}
    out = states if out is None else out
    sweep_family[(piece.rows, segments)](
        *piece.tensors, parts, flags, states, inverse, counted, call.kind, call.cap, n,
        piece.inner, piece.first, call.vocab, sizes.segment, call.given, *strides, **what,
        CAP=call.capped, ALIGNED=aligned(piece), WIDTH=sizes.width, HALVES=sizes.halves,
        num_warps=1, num_stages=1,
    )  # fmt: skip
    finish_family[(-(-piece.rows // LANES),)](
        parts, flags, out, values, states, counted, call.kind, n, piece.first, piece.rows, segments,
        line, call.given, **what, LANES=LANES, num_warps=1,
    )  # fmt: skip
    careful_family[(piece.rows,)](
        *piece.tensors, flags, out, values, states, inverse, call.kind, call.cap, n, piece.inner,
        piece.first, call.vocab, line, call.given, *strides, **what, CAP=call.capped,
        BLOCK=CAREFUL_BLOCK, num_warps=4,
    )  # fmt: skip


def row_sums(
    policy: Tensor, reference: Tensor, state: Tensor, field: str, parameter: float | None,
    inv_temperature: Tensor | None, mask: Tensor | None, valid_vocab: int | None,
    softcap: float | None,
) -> Tensor:  # fmt: skip
    """Operator `row_sums` (fusedkl/ops.py)."""
    call = Call(
        policy, reference, None, [field], parameter, inv_temperature, mask, valid_vocab, softcap
    )
    out = state.new_empty((call.rows, 3))
    flags = torch.zeros(call.rows, dtype=torch.float32, device=state.device)
    with on(state.device):
        for piece in pieces([policy, reference]):
            sweep_again(call, piece, flags, state.contiguous(), flags, out)
    return out
