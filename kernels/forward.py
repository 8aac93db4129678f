"""row_stats and merge_states: launches, and nothing that waits for the device.

A sweep over segments (sweep.py or single.py), one lane per row that makes a RowState of the
segments' sums (finish.py), then careful.py, which looks at a flag per row. Besides the results they
take O(tokens) floats of scratch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .careful import CAREFUL_BLOCK, careful
from .finish import finish, merge_rows
from .launch import LANES, PAIR_FIELDS, Call, aligned, on, pieces
from .single import sweep_single
from .state import STATE_COLUMNS
from .sums import sweep_again
from .sweep import COLUMNS, sweep_pair


def row_stats(
    policy: Tensor, reference: Tensor | None, token_ids: Tensor | None, fields: list[str],
    parameter: float | None, inv_temperature: Tensor | None, mask: Tensor | None,
    valid_vocab: int | None, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Operator `row_stats` (fusedkl/ops.py)."""
    call = Call(
        policy, reference, token_ids, fields, parameter, inv_temperature, mask, valid_vocab, softcap
    )
    n, k, device = call.rows, call.tokens, policy.device
    values = torch.empty((call.lines(), n), dtype=torch.float32, device=device)
    states = torch.empty((n, STATE_COLUMNS.value), dtype=torch.float64, device=device)
    sizes = call.sizes()
    segments = -(-call.vocab // sizes.segment)
    parts = torch.empty(segments * COLUMNS.value * n + n, dtype=torch.float32, device=device)
    inverse, counted, ids = call.pointers(states)
    flags = {"REVERSE": "reverse_kl" in fields, "REF_ENTROPY": "ref_entropy" in fields}
    flags = flags if call.pair else {"GIVEN": False}
    flags |= {"MEAN": "mean_logprob" in fields, "CAP": call.capped}
    own, more = ((), ()) if call.pair else ((ids,), (0,))  # tokens to leave out: none
    shape = {"WIDTH": sizes.width, "HALVES": sizes.halves, "num_warps": 1, "num_stages": 1}
    shape |= {"enable_fp_fusion": False}
    with on(device):
        for piece in pieces([policy, call.other]):
            logits = piece.tensors if call.pair else piece.tensors[:1]
            strides = [step for steps in piece.strides for step in steps]
            where = (n, piece.inner, piece.first, call.vocab, sizes.segment)
            sweep = sweep_pair if call.pair else sweep_single
            sweep[(piece.rows, segments)](
                *logits, parts, inverse, counted, *own, call.cap, *where,
                *strides[: 2 * len(logits)], call.given, *more, ENTROPY="entropy" in fields,
                ALIGNED=aligned(piece), **flags, **shape,
            )  # fmt: skip
            outputs = (ids, values, states, call.cap, n, k, piece.inner, piece.first)
            finish[(-(-piece.rows // LANES),)](
                *piece.tensors, parts, inverse, counted, *outputs, piece.rows, call.vocab,
                sizes.segment, call.given, *strides, FIELDS=call.fields, PAIR=call.pair,
                CAP=call.capped, LANES=LANES, num_warps=1,
            )  # fmt: skip
            if call.pair:
                careful[(piece.rows,)](
                    *piece.tensors, parts, inverse, *outputs, call.vocab, segments, call.given,
                    *strides, FIELDS=call.fields, CAP=call.capped, BLOCK=CAREFUL_BLOCK, num_warps=4,
                )  # fmt: skip
            if call.family is not None:
                sweep_again(call, piece, parts[-n:], states, values, None)
    return values, states


def merge_states(
    parts: Tensor, fields: list[str], inv_temperature: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Operator `merge_states` (fusedkl/ops.py)."""
    count, n, _ = parts.shape
    parts = parts.contiguous()
    values = parts.new_empty((len(fields), n))
    states = parts.new_empty(parts.shape[1:])
    given = 0 if inv_temperature is None else 2 | (4 if inv_temperature.numel() > 1 else 0)
    inverse = states if inv_temperature is None else inv_temperature
    pair = any(name in PAIR_FIELDS for name in fields)
    if n:
        with on(parts.device):
            merge_rows[(math.ceil(n / LANES),)](
                parts, inverse, values, states, n, count, given,
                FIELDS=tuple(fields), PAIR=pair, LANES=LANES, num_warps=1,
            )  # fmt: skip
    return values, states
