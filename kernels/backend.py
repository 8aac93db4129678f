"""The backend "triton": the operators of fusedkl/ops.py, under their names."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from . import elementwise
from .forward import merge_states, row_stats
from .gradient import row_stats_backward, row_stats_backward_, row_stats_with_gradient
from .launch import on, pieces
from .sums import row_sums
from .topk import topk_logprobs, topk_logprobs_backward

__all__ = [
    "log_softmax",
    "log_softmax_backward",
    "merge_states",
    "ordered_sum",
    "row_stats",
    "row_stats_backward",
    "row_stats_backward_",
    "row_stats_with_gradient",
    "row_sums",
    "scale_gradient_",
    "topk_logprobs",
    "topk_logprobs_backward",
]

# Elements of a trip of the kernels that take one row, or one vector, per program.
ROW_BLOCK = 2048
SCALE_BLOCK = 4096


def _inside(*dtypes: torch.dtype) -> tl.dtype:
    """log_softmax is computed in float64 if any of its dtypes is."""
    return tl.float64 if torch.float64 in dtypes else tl.float32


def log_softmax(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Operator `log_softmax`."""
    out = torch.empty(logits.shape, dtype=dtype, device=logits.device)
    inside = _inside(logits.dtype, dtype)
    with on(logits.device):
        for piece in pieces([logits]):
            elementwise.log_softmax[(piece.rows,)](
                *piece.tensors, out, piece.inner, piece.first, logits.shape[-1], *piece.strides[0],
                DTYPE=inside, BLOCK=ROW_BLOCK, num_warps=8,
            )  # fmt: skip
    return out


def log_softmax_backward(grad: Tensor, output: Tensor, dtype: torch.dtype) -> Tensor:
    """Operator `log_softmax_backward`."""
    output = output.contiguous()
    out = torch.empty(output.shape, dtype=dtype, device=output.device)
    inside = _inside(grad.dtype, output.dtype, dtype)
    with on(output.device):
        for piece in pieces([grad]):
            elementwise.log_softmax_backward[(piece.rows,)](
                *piece.tensors, output, out, piece.inner, piece.first, grad.shape[-1],
                *piece.strides[0], DTYPE=inside, BLOCK=ROW_BLOCK, num_warps=8,
            )  # fmt: skip
    return out


def ordered_sum(values: Tensor, weight: Tensor | None) -> Tensor:
    """Operator `ordered_sum`: one program."""
    out = values.new_empty(())
    by = values if weight is None else weight
    with on(values.device):
        elementwise.ordered_sum[(1,)](
            values, by, out, values.numel(), values.stride(0), by.stride(0),
            WEIGHTED=weight is not None, BLOCK=ROW_BLOCK,
        )  # fmt: skip
    return out


def scale_gradient_(gradient: Tensor, factor: Tensor) -> None:
    """Operator `scale_gradient_`; the gradient is contiguous."""
    if gradient.numel():
        with on(gradient.device):
            elementwise.scale_gradient[(-(-gradient.numel() // SCALE_BLOCK),)](
                gradient, factor, gradient.numel(), BLOCK=SCALE_BLOCK
            )
