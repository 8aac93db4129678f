"""The operators: implementations by table lookup, and fake kernels. Derivatives: autograd.py.

fusedkl::row_stats(policy, reference?, token_ids?, fields, parameter?, inv_temperature?, mask?,
                   valid_vocab?, softcap?, backend)
    policy, reference  [..., V], last stride 1, the leading dims (N rows in row-major order) of any
                       strides; float32, bfloat16, float16 or float64, the two may differ
    token_ids          int64 [N, K];  inv_temperature float64 [N] or [1], None = 1;  mask bool [N]
    -> values [R, N]   one row per field in order (K rows for logprob), float32 or float64
       state  [N, S]   float64, what the backend's own backward remembers; not differentiable
fusedkl::row_stats_backward(grad [R, N], ..., state, ...) -> gradients, contiguous, in each input's
    shape and dtype; one that was not asked for has shape [0]. Rows whose grads are all 0 get
    exactly 0 and are not read. row_stats_backward_ writes the policy's gradient into the policy.
    Also of a slice of the vocabulary, given the state of the whole row.
fusedkl::merge_states(parts [P, N, S], fields, inv_temperature?) -> values [R, N], state [N, S]
    float64; parts are the states of slices of one vocabulary, in order; fields without token ids
fusedkl::row_sums(policy, reference, state, field, ...) -> [N, 3] float64: of a divergence that
    takes a second sweep, over a slice of the vocabulary, given the state of the whole rows (the
    columns up to residual): its value and the means of its slopes under p and under q; of tvd its
    value, the sum of p where p <= q and that of q where p > q; of renyi and hellinger
    1 - sum q^a p^(1-a), sum q^a p^(1-a) and 0. The sums of slices add up to the row's.
A token id of -1 is a token of another slice of the vocabulary: its value is 0 and no logit gets its
gradient, while the slice's probabilities get what they owe to it.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from . import contents, divergences, reference, validation
from ._library import LIB, NAMESPACE, OPERATORS
from .backends import kernels

STATE_COLUMNS = len(reference.STATE)


def check_arguments(name: str, *args: Any) -> None:
    """What kernels rely on, where anybody may have called the operator."""
    if name == "row_stats":
        validation.row_stats_arguments(*args)
    elif name == "merge_states":
        validation.merge_states(*args)
    elif name == "row_stats_with_gradient":
        _, policy, other, *others = args
        validation.row_stats_arguments(policy, other, None, *others)
    elif name == "row_sums":
        policy, other, state, field, *others = args
        validation.row_stats_arguments(policy, other, None, [field], *others)
        validation.second_sweep(field, state, policy)


def check_contents(name: str, *args: Any) -> None:
    """What only a look at the tensors tells, for every caller."""
    if name == "row_stats":
        policy, _, ids, _, _, inverse, mask, valid_vocab, _ = args
    elif name in ("row_stats_with_gradient", "row_sums"):
        *_, inverse, mask, valid_vocab, _ = args
        policy, ids = args[name == "row_stats_with_gradient"], None
    else:
        return
    if inverse is not None or ids is not None:
        contents.row_stats(policy, ids, inverse, mask, valid_vocab)


def run(name: str, *args: Any) -> Any:
    """Operator `name` for arguments that a public function has checked: the backend's kernel."""
    *rest, backend = args
    check_contents(name, *rest)
    result = getattr(kernels(backend), name)(*rest)
    if name == "row_stats_backward_":
        # A kernel's raw writes are invisible to autograd, which must refuse what is gone.
        torch.autograd.graph.increment_version(args[1])
    return result


def operator(name: str, *args: Any) -> Any:
    """What operator `name` does."""
    check_arguments(name, *args[:-1])
    return run(name, *args)


for _name in OPERATORS:
    LIB.impl(_name, functools.partial(operator, _name), "CompositeExplicitAutograd")


def _row_stats_fake(
    policy: Tensor,
    reference_: Tensor | None,
    token_ids: Tensor | None,
    fields: list[str],
    parameter: float | None,
    inv_temperature: Tensor | None,
    mask: Tensor | None,
    valid_vocab: int | None,
    softcap: float | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    n = math.prod(policy.shape[:-1])
    r = divergences.value_rows(fields, 0 if token_ids is None else token_ids.shape[1])
    values = policy.new_empty((r, n), dtype=reference.result_dtype(policy, reference_))
    state = policy.new_empty((n, STATE_COLUMNS), dtype=reference.inside(policy.device))
    return values, state


def _row_stats_backward_fake(
    grad: Tensor,
    policy: Tensor,
    reference_: Tensor | None,
    token_ids: Tensor | None,
    state: Tensor,
    fields: list[str],
    parameter: float | None,
    inv_temperature: Tensor | None,
    valid_vocab: int | None,
    softcap: float | None,
    policy_grad: bool,
    reference_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    def like(t: Tensor | None, wanted: bool) -> Tensor:
        given = policy if t is None else t
        return given.new_empty(given.shape if wanted and t is not None else (0,))

    return like(policy, policy_grad), like(reference_, reference_grad)


def _row_stats_backward_inplace_fake(
    grad: Tensor,
    policy: Tensor,
    reference_: Tensor | None,
    token_ids: Tensor | None,
    state: Tensor,
    fields: list[str],
    parameter: float | None,
    inv_temperature: Tensor | None,
    valid_vocab: int | None,
    softcap: float | None,
    reference_grad: bool,
    backend: str,
) -> Tensor:
    given = policy if reference_ is None else reference_
    return given.new_empty(given.shape if reference_grad and reference_ is not None else (0,))


def _row_stats_with_gradient_fake(
    grad: Tensor,
    policy: Tensor,
    reference_: Tensor | None,
    fields: list[str],
    parameter: float | None,
    inv_temperature: Tensor | None,
    mask: Tensor | None,
    valid_vocab: int | None,
    softcap: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    values, state = _row_stats_fake(
        policy,
        reference_,
        None,
        fields,
        parameter,
        inv_temperature,
        mask,
        valid_vocab,
        softcap,
        backend,
    )
    return values, state, policy.new_empty(policy.shape)


def _row_sums_fake(
    policy: Tensor,
    reference_: Tensor,
    state: Tensor,
    field: str,
    parameter: float | None,
    inv_temperature: Tensor | None,
    mask: Tensor | None,
    valid_vocab: int | None,
    softcap: float | None,
    backend: str,
) -> Tensor:
    return state.new_empty((state.shape[0], 3))


def _merge_states_fake(
    parts: Tensor, fields: list[str], inv_temperature: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    values = parts.new_empty((divergences.value_rows(fields, 0), parts.shape[1]))
    return values, parts.new_empty(parts.shape[1:])


def _scale_gradient_fake(gradient: Tensor, factor: Tensor, backend: str) -> None:
    return None


def _log_softmax_fake(logits: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    return logits.new_empty(logits.shape, dtype=dtype)


def _log_softmax_backward_fake(
    grad: Tensor, output: Tensor, dtype: torch.dtype, backend: str
) -> Tensor:
    return output.new_empty(output.shape, dtype=dtype)


def _ordered_sum_fake(values: Tensor, weight: Tensor | None, backend: str) -> Tensor:
    return values.new_empty(())


for _name, _fake in (
    ("row_stats", _row_stats_fake),
    ("row_stats_backward", _row_stats_backward_fake),
    ("row_stats_backward_", _row_stats_backward_inplace_fake),
    ("row_stats_with_gradient", _row_stats_with_gradient_fake),
    ("row_sums", _row_sums_fake),
    ("merge_states", _merge_states_fake),
    ("scale_gradient_", _scale_gradient_fake),
    ("log_softmax", _log_softmax_fake),
    ("log_softmax_backward", _log_softmax_backward_fake),
    ("ordered_sum", _ordered_sum_fake),
):
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=LIB)
