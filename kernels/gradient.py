"""The gradient operators: launches of coefficients.py, backward.py and tokens.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .backward import gradients
from .coefficients import CONSTANTS, prepare
from .forward import row_stats
from .launch import LANES, Call, Piece, aligned, on, pieces
from .tokens import store_tokens, token_gradients


def _write(
    call: Call, grad: Tensor, state: Tensor, policy_grad: Tensor | None, other_grad: Tensor | None
) -> None:
    """The gradients that are given somewhere to go; the policy's may be the policy itself."""
    n, device = call.rows, call.policy.device
    if n == 0 or (policy_grad is None and other_grad is None):
        return
    grad = grad.contiguous()
    constants = torch.empty((CONSTANTS.value, n), dtype=torch.float32, device=device)
    inverse, _, _ = call.pointers(state)
    sizes = call.sizes()
    # a pointer of the right dtype stands in for what is not asked for
    outputs = [
        call.policy if policy_grad is None else policy_grad,
        call.other if other_grad is None else other_grad,
    ]
    widths = (call.policy.shape[-1], call.other.shape[-1])
    wanted = {"POLICY": policy_grad is not None, "REFERENCE": other_grad is not None}
    with on(device):
        prepare[(-(-n // LANES),)](
            grad, state, inverse, constants, call.kind, n, call.tokens, call.given,
            FIELDS=call.fields, HALF=call.policy.itemsize == call.other.itemsize == 2, LANES=LANES,
            num_warps=1,
        )  # fmt: skip
        for piece in pieces([call.policy, call.other, *outputs]):
            store = [
                _tokens(call, piece, grad, state, inverse, name)
                for name, given in (("logprob", policy_grad), ("ref_logprob", other_grad))
                if given is not None and call.tokens and {name, "log_ratio"} & set(call.fields)
            ]
            strides = [step for steps in piece.strides for step in steps]
            gradients[(piece.rows, -(-max(widths) // sizes.chunk))](
                *piece.tensors, constants, inverse, call.kind, call.cap, n, piece.inner,
                piece.first, *widths, call.vocab, sizes.chunk, call.given, *strides, **wanted,
                FIELDS=call.fields, CAP=call.capped, ALIGNED=aligned(piece), BLOCK=sizes.block,
                num_warps=sizes.warps, num_stages=1, enable_fp_fusion=False,
            )  # fmt: skip
            for index, found in store:
                grid = (piece.rows, -(-call.tokens // LANES))
                store_tokens[grid](
                    piece.tensors[index], found, call.token_ids, constants, n, call.tokens,
                    piece.inner, piece.first, call.vocab, *piece.strides[index],
                    BLOCK=LANES, num_warps=1,
                )  # fmt: skip


def _tokens(
    call: Call, piece: Piece, grad: Tensor, state: Tensor, inverse: Tensor, name: str
) -> tuple[int, Tensor]:
    """Which of the piece's tensors gets them, and [n, K]: before the logits are overwritten."""
    found = torch.empty((call.rows, call.tokens), dtype=torch.float64, device=grad.device)
    strides = [step for steps in piece.strides[:2] for step in steps]
    token_gradients[(piece.rows, -(-call.tokens // LANES))](
        *piece.tensors[:2], grad, state, call.token_ids, inverse, found, call.kind, call.cap,
        call.rows, call.tokens, piece.inner, piece.first, call.line_of(name),
        call.line_of("log_ratio"), call.vocab, call.given, *strides, FIELDS=call.fields,
        POLICY=name == "logprob", PAIR=call.pair, CAP=call.capped, BLOCK=LANES, num_warps=1,
    )  # fmt: skip
    return (2 if name == "logprob" else 3), found


def _room(like: Tensor | None, wanted: bool) -> Tensor | None:
    return like.new_empty(like.shape) if wanted and like is not None else None


def _or_empty(gradient: Tensor | None, policy: Tensor, like: Tensor | None) -> Tensor:
    """What the operator returns for it: [0] where it was not asked for."""
    return (policy if like is None else like).new_empty(0) if gradient is None else gradient


def row_stats_backward(
    grad: Tensor, policy: Tensor, reference: Tensor | None, token_ids: Tensor | None, state: Tensor,
    fields: list[str], parameter: float | None, inv_temperature: Tensor | None,
    valid_vocab: int | None, softcap: float | None, policy_grad: bool, reference_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Operator `row_stats_backward` (fusedkl/ops.py)."""
    call = Call(
        policy, reference, token_ids, fields, parameter, inv_temperature, None, valid_vocab, softcap
    )
    gx, gy = _room(policy, policy_grad), _room(reference, reference_grad)
    _write(call, grad, state, gx, gy)
    return _or_empty(gx, policy, policy), _or_empty(gy, policy, reference)


def row_stats_backward_(
    grad: Tensor, policy: Tensor, reference: Tensor | None, token_ids: Tensor | None, state: Tensor,
    fields: list[str], parameter: float | None, inv_temperature: Tensor | None,
    valid_vocab: int | None, softcap: float | None, reference_grad: bool,
) -> Tensor:  # fmt: skip
    """Operator `row_stats_backward_`: a tile is read before it is written, so nothing is copied."""
    call = Call(
        policy, reference, token_ids, fields, parameter, inv_temperature, None, valid_vocab, softcap
    )
    gy = _room(reference, reference_grad)
    _write(call, grad, state, policy, gy)
    return _or_empty(gy, policy, reference)


def row_stats_with_gradient(
    grad: Tensor, policy: Tensor, reference: Tensor | None, fields: list[str],
    parameter: float | None, inv_temperature: Tensor | None, mask: Tensor | None,
    valid_vocab: int | None, softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Operator `row_stats_with_gradient` (fusedkl/ops.py): one after the other."""
    given = (fields, parameter, inv_temperature)
    controls = (valid_vocab, softcap)
    values, state = row_stats(policy, reference, None, *given, mask, *controls)
    gradient, _ = row_stats_backward(
        grad, policy, reference, None, state, *given, *controls, True, False
    )
    return values, state, gradient
