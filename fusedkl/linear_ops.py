"""The operators behind linear_divergence and linear_token_stats.

fusedkl::linear_stats(hidden [N, H], weight [V, H], bias? [V], ref_hidden? [N, H'], ref_weight?,
    ref_bias?, ref_logits? [N, V], token_ids? [N, K], labels? [N], topk_ids? [N, K], fields,
    parameter?, inv_temperature?, mask?, scales, softcaps, fast, tile, backend)
    ref_hidden without ref_weight: the policy's weight; scales, softcaps: of policy and reference,
    softcaps 0 where there is none; tile: tokens and vocabulary entries, or empty
    topk_ids: outcomes of their own (-1: none; an id of no token: NaN), fields is ["logsumexp"], of
    the others
    -> values [R, N], float32 or float64: with topk_ids K rows of logits over T, in float64, and
       then logsumexp of the others; else one row per field; then log p[label] at temperature 1
       states [Q, N, S], float64: of the fields, then of the labels
fusedkl::linear_slice(...) -> tokens [L, N], states [Q, N, S], float64: likewise of a slice of the
    vocabulary, without a second sweep; tokens: logits, before the temperature, of each question's
    sides (`Rows.token_sides`), 0 for an id of -1, NaN for a lower one, of no token
fusedkl::linear_sums(..., state [N, S]) -> [N, 3], float64: the second sweep over a slice, given
    the state of the whole rows
fusedkl::linear_stats_backward(grad, ..., states, wanted, of_slice) -> gradients of the first
    seven, in their shapes and dtypes; one that was not asked for has shape [0]. Tokens whose grads
    are all 0 are not read. of_slice: those to hidden states are parts of sums over the slices of a
    vocabulary, not rounded yet: float32, of float64 float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import linear_reference, reference, shard_states
from ._library import LIB, NAMESPACE, TAGS
from .linear_arguments import DIFFERENTIABLE, OF_HIDDEN, OF_TOKENS, Inputs
from .linear_backward import Wanted, backward
from .linear_tiles import Engine, Rows, Side, first_sweep, forward, sums

_TENSORS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? ref_hidden, Tensor? ref_weight, "
    "Tensor? ref_bias, Tensor? ref_logits, Tensor? token_ids, Tensor? labels, "
    "Tensor? topk_ids"
)
_OPTIONS = (
    "str[] fields, float? parameter, Tensor? inv_temperature, Tensor? mask, float[] scales, "
    "float[] softcaps, bool fast, int[] tile, str backend"
)


def engine_of(i: Inputs, live: Tensor | None = None, read: int | None = None) -> Engine:
    """live: the rows of ref_logits, where they are more than the tokens. read: see Engine."""
    policy = Side(i.hidden, i.weight, i.bias, i.scales[0], i.softcaps[0] or None)
    other: Side | None = None
    if i.paired:
        weight = i.ref_weight if i.ref_weight is not None else i.weight
        other = Side(
            i.ref_hidden,
            weight if i.ref_hidden is not None else None,
            i.ref_bias,
            i.scales[1],
            i.softcaps[1] or None,
            i.ref_logits,
            live,
        )
    return Engine(policy, other, i.fast, (i.tile[0], i.tile[1]) if i.tile else None, read)


def questions(i: Inputs) -> list[Rows]:
    asked = []
    if i.fields:
        asked.append(
            Rows(
                i.fields, i.parameter, i.token_ids, i.inv_temperature, i.backend, i.paired,
                i.topk_ids,
            )
        )  # fmt: skip
    if i.labels is not None:
        asked.append(Rows(["logprob"], None, i.labels[:, None], None, i.backend, paired=False))
    return asked


def _places(counted: Tensor | None) -> Tensor | None:
    """Of the tokens that count; None: all are taken, as on a GPU, where the host would wait."""
    if counted is None or counted.device.type != "cpu" or bool(counted.all()):
        return None
    return counted.nonzero().squeeze(1)


def _of(i: Inputs, index: Tensor) -> Inputs:
    return i.tokens(index) if i.backend == "reference" else i.counted(index)


def _read(args: tuple[Any, ...]) -> tuple[Inputs, Inputs, Tensor | None]:
    """The arguments; those about the tokens that are read; which tokens these are, or None."""
    whole = Inputs(*args).detached()
    index = _places(whole.mask)
    return whole, whole if index is None else _of(whole, index), index


def _cleared(i: Inputs, live: Tensor) -> Inputs:
    """Hidden states of 0 where a token has no gradient: 0 times its NaN would be one in d weight.

    Where such tokens are not dropped. Their rows of ref_logits no kernel reads.
    """
    clear: dict[str, Any] = {"hidden": torch.where(live[:, None], i.hidden, 0)}
    if i.ref_hidden is not None:
        clear["ref_hidden"] = torch.where(live[:, None], i.ref_hidden, 0)
    return i._replace(**clear)


def _spread(t: Tensor, dim: int, n: int, index: Tensor | None) -> Tensor:
    """Numbers of the tokens that were read as those of all n, 0 elsewhere."""
    if index is None:
        return t
    shape = list(t.shape)
    shape[dim] = n
    return t.new_zeros(shape).index_copy_(dim, index, t)


def _linear_stats(*args: Any) -> tuple[Tensor, Tensor]:
    whole, i, index = _read(args)
    with torch.no_grad():
        if i.hidden.shape[0] == 0:
            values, states = (t.zero_() for t in _linear_stats_fake(*i))
        elif i.backend == "reference":
            values, states = linear_reference.values(i), _linear_stats_fake(*i)[1].zero_()
        else:
            answers = forward(engine_of(i, index), questions(i))
            values = torch.cat([v for v, _ in answers])
            states = torch.stack([s for _, s in answers])
        n = whole.hidden.shape[0]
        values = _spread(values.to(whole.result_dtype()), 1, n, index)
        if whole.mask is not None and index is None:
            values = torch.where(whole.mask, values, 0)
        return values, _spread(states, 1, n, index)


def _linear_slice(*args: Any) -> tuple[Tensor, Tensor]:
    whole, i, index = _read(args)
    with torch.no_grad():
        if i.hidden.shape[0] == 0 or i.weight.shape[0] == 0:
            tokens, states = (t.zero_() for t in _linear_slice_fake(*i))
            states.copy_(shard_states.empty_state(i.hidden))
        else:
            found = first_sweep(engine_of(i, index), questions(i))
            sides = [t for one in found for t in one.tokens.values()]
            tokens = torch.cat(sides) if sides else _linear_slice_fake(*i)[0]
            states = torch.stack([one.state() for one in found])
        n = whole.hidden.shape[0]
        return _spread(tokens, 1, n, index), _spread(states, 1, n, index)


def _linear_sums(*args: Any) -> Tensor:
    *given, state = args
    whole, i, index = _read(tuple(given))
    with torch.no_grad():
        if index is not None:
            state = state[index]
        if i.hidden.shape[0] == 0 or i.weight.shape[0] == 0:
            found = _linear_sums_fake(*given, state).zero_()
        else:
            found = sums(engine_of(i, index), questions(i)[0], state)
        return _spread(found, 0, whole.hidden.shape[0], index)


def _linear_stats_backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *given, states, wanted, of_slice = args
    whole = i = Inputs(*given).detached()
    live = (grad != 0).any(0)
    index = _places(live)
    if index is not None:
        i, grad, states = _of(i, index), grad[:, index], states[:, index]
    elif live.device.type != "cpu":
        i = _cleared(i, live)
    found: list[Tensor | None] = [None] * DIFFERENTIABLE
    with torch.no_grad():
        if i.hidden.shape[0] != 0 and i.weight.shape[0] != 0:
            if i.backend == "reference":
                found = linear_reference.gradients(grad, i, states, wanted)
            else:
                read = whole.hidden.shape[0]
                if index is not None and whole.mask is not None:
                    read = int(whole.mask.sum())
                found = _by_tiles(grad, i, states, wanted, index, read)
        return tuple(
            _as_given(name, like, gradient, index, _gradient_dtype(name, like, of_slice))
            if ask and like is not None
            else _none(whole)
            for name, like, gradient, ask in zip(
                whole._fields, whole.differentiable(), found, wanted, strict=False
            )
        )


def _none(i: Inputs) -> Tensor:
    return i.hidden.new_empty(0)


def _gradient_dtype(name: str, like: Tensor, of_slice: bool) -> torch.dtype:
    part = of_slice and name in OF_HIDDEN
    return reference.result_dtype(like, None) if part else like.dtype


def _as_given(
    name: str, like: Tensor, gradient: Tensor | None, index: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The gradient in the shape of its input; tokens that were left out get 0."""
    if gradient is None:
        return torch.zeros_like(like, dtype=dtype, memory_format=torch.contiguous_format)
    gradient = gradient.to(dtype)
    if index is None or name not in OF_TOKENS or gradient.shape == like.shape:
        return gradient
    return gradient.new_zeros(like.shape).index_copy_(0, index, gradient)


def _by_tiles(
    grad: Tensor, i: Inputs, states: Tensor, wanted: list[bool], live: Tensor | None, read: int
) -> list[Tensor | None]:
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias, ref_logits = wanted
    shared = i.ref_weight is None and i.ref_hidden is not None
    asked = questions(i)
    last = grad.shape[0] - (i.labels is not None)
    x, y = backward(
        engine_of(i, live, read),
        asked,
        [part for part in (grad[:last], grad[last:]) if part.shape[0]],
        list(states),
        (
            Wanted(hidden, weight, bias),
            Wanted(ref_hidden, weight if shared else ref_weight, ref_bias, ref_logits),
        ),
    )
    return [x.hidden, x.weight, x.bias, y.hidden, y.weight, y.bias, y.given]


def _linear_stats_fake(*args: Any) -> tuple[Tensor, Tensor]:
    i = Inputs(*args)
    n = i.hidden.shape[0]
    values = i.hidden.new_empty((i.value_rows(), n), dtype=i.result_dtype())
    inner = reference.inside(i.hidden.device)
    return values, i.hidden.new_empty((len(questions(i)), n, len(reference.STATE)), dtype=inner)


def _linear_slice_fake(*args: Any) -> tuple[Tensor, Tensor]:
    i = Inputs(*args)
    rows = sum(len(one.token_sides()) * one.per_row() for one in questions(i))
    _, states = _linear_stats_fake(*args)
    return states.new_empty((rows, i.hidden.shape[0])), states


def _linear_sums_fake(*args: Any) -> Tensor:
    state: Tensor = args[-1]
    return state.new_empty((state.shape[0], 3))


def _linear_stats_backward_fake(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *given, _, wanted, of_slice = args
    i = Inputs(*given)
    return tuple(
        like.new_empty(like.shape, dtype=_gradient_dtype(name, like, of_slice))
        if ask and like is not None
        else _none(i)
        for name, like, ask in zip(i._fields, i.differentiable(), wanted, strict=False)
    )


for _name, _schema, _kernel, _fake in (
    (
        "linear_stats",
        f"({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor)",
        _linear_stats,
        _linear_stats_fake,
    ),
    (
        "linear_slice",
        f"({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor)",
        _linear_slice,
        _linear_slice_fake,
    ),
    (
        "linear_sums",
        f"({_TENSORS}, {_OPTIONS}, Tensor state) -> Tensor",
        _linear_sums,
        _linear_sums_fake,
    ),
    (
        "linear_stats_backward",
        f"(Tensor grad, {_TENSORS}, {_OPTIONS}, Tensor states, bool[] wanted, "
        f"bool of_slice) -> ({', '.join(['Tensor'] * DIFFERENTIABLE)})",
        _linear_stats_backward,
        _linear_stats_backward_fake,
    ),
):
    LIB.define(_name + _schema, tags=TAGS)
    LIB.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=LIB)
