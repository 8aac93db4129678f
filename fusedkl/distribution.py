"""The public functions of one row of logits: logsumexp, log_softmax, log-probabilities, entropy."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import autograd, distributed, dtensors, validation
from .backends import needs, resolve
from .layout import inverse_temperature, rows, token_ids

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def _one_field(
    logits: Tensor,
    field: str,
    index: Tensor | None,
    temperature: float | Tensor,
    group: ProcessGroup | None,
    backend: str | None,
) -> Tensor:
    if dtensors.given(logits):
        local = functools.partial(_one_field, field=field, backend=backend)
        out: Tensor = dtensors.per_token(
            local,
            {"logits": logits},
            index=index,
            temperature=temperature,
            group=group,
        )
        return out
    validation.logits("logits", logits, sliced=group is not None)
    if index is not None:
        validation.token_index("index", index, logits)
    inverse = inverse_temperature(temperature, logits)
    wanted = needs(logits, field)
    name = resolve(backend, logits.device, wanted)
    ids = None if index is None else token_ids(index, logits)
    shards = distributed.shards(
        group,
        logits,
        ids_name=None if ids is None else "index",
        kind=field,
        dtype=wanted[0],
        temperature=temperature,
        ids=None if ids is None else ids.shape[1],
    )
    values = autograd.row_stats(
        rows(logits), None, ids, (field,), None, inverse, shards=shards, backend=name
    )
    return values.t().reshape(logits.shape[:-1] if index is None else index.shape)


def logsumexp(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """log sum exp(logits / T) over the last dim of [..., V].

    Equivalent to ``torch.logsumexp(logits.float() / temperature, -1)``, with no [..., V] temporary.

    Args:
        logits: [..., V], float32, bfloat16, float16 or float64. Differentiable.
        temperature: T > 0, a number or a float tensor, 0-d or of shape logits.shape[:-1].
        group: a process group whose ranks each hold a slice of the vocabulary; see `divergence`.
        backend: None, or a name from `backends()`.

    Returns:
        shape logits.shape[:-1], float32 (float64 for float64 logits), nats. NaN, +inf or nothing
        but -inf in a row makes it NaN.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is accepted.

    Blanchard, Higham and Higham, "Accurately Computing the Log-Sum-Exp and Softmax Functions",
    2021.
    """
    return _one_field(logits, "logsumexp", None, temperature, group, backend)


def entropy(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """-sum p log p over the last dim of [..., V], p = softmax(logits / T), in nats.

    Accurate relative to its size also for peaked rows (1e-12). Equivalent to
    ``torch.distributions.Categorical(logits=logits.float() / temperature).entropy()``.

    Args:
        logits: [..., V], float32, bfloat16, float16 or float64; -inf is skipped. Differentiable.
        temperature: T > 0, a number or a float tensor, 0-d or of shape logits.shape[:-1].
        group: a process group whose ranks each hold a slice of the vocabulary; see `divergence`.
        backend: None, or a name from `backends()`.

    Returns:
        shape logits.shape[:-1], float32 (float64 for float64 logits), nats. NaN, +inf or nothing
        but -inf in a row makes it NaN.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is accepted.

    Shannon, "A Mathematical Theory of Communication", 1948.
    """
    return _one_field(logits, "entropy", None, temperature, group, backend)


def selective_log_softmax(
    logits: Tensor,
    index: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """log p[index] for one or K token ids a row, p = softmax(logits / T).

    Equivalent to, without the [..., V] log-probabilities::

        log_p = torch.log_softmax(logits.float() / temperature, -1)
        log_p.gather(-1, index)                             # index [..., K]
        log_p.gather(-1, index.unsqueeze(-1)).squeeze(-1)   # index [...]

    Args:
        logits: [..., V], float32, bfloat16, float16 or float64. Differentiable.
        index: int64, shape logits.shape[:-1] or that and one dim more; from 0 to V - 1,
            of the whole vocabulary also where a group holds it.
        temperature: T > 0, a number or a float tensor, 0-d or of shape logits.shape[:-1].
        group: a process group whose ranks each hold a slice of the vocabulary; see `divergence`.
        backend: None, or a name from `backends()`.

    Returns:
        the shape of index, float32 (float64 for float64 logits), nats; -inf where the logit is.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is accepted.

    Source: PyTorch's documentation of log_softmax and gather, of which this is the composition.
    """
    return _one_field(logits, "logprob", index, temperature, group, backend)


def log_softmax(
    logits: Tensor,
    dim: int = -1,
    dtype: torch.dtype | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """logits - log sum exp(logits) over one dim: `torch.log_softmax`, float32 or better inside.

    Equivalent to ``torch.log_softmax(logits, dim, dtype)``, except that float16 and bfloat16 rows
    are rounded once, at the end, and that a long float16 row does not overflow.

    Args:
        logits: at least 1-d, float32, bfloat16, float16 or float64. Differentiable, twice too.
        dim: the dim that is normalised. Any but the last is copied to the last and back.
        dtype: of the result; the dtype of logits, if None.
        backend: None, or a name from `backends()`.

    Returns:
        the shape of logits, nats; autocast changes nothing. A row with NaN, +inf or nothing but
        -inf is NaN.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is accepted.
        IndexError: dim out of range, as torch has it.

    Source: PyTorch's documentation of log_softmax.
    """
    validation.tensor("logits", logits)
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim must be an int; got {type(dim).__name__}")
    if dtype is not None and dtype not in validation.DTYPES:
        raise TypeError(f"dtype must be a floating-point torch.dtype or None; got {dtype}")
    moved = logits.movedim(dim, -1) if logits.dim() else logits
    validation.logits("logits", moved)
    name = resolve(backend, logits.device)
    out = autograd.log_softmax(rows(moved), dtype or logits.dtype, backend=name)
    return out.reshape(moved.shape).movedim(-1, dim)
