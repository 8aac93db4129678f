"""Argument checks: every message names the argument, what came, and what is accepted.

Metadata and Python numbers are checked where the call is made; the contents of CPU tensors inside
the operator, which torch.compile does not trace into. Contents of device tensors are not looked at.
"""

from __future__ import annotations

import math
import numbers
import sys
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from . import divergences
from . import reference as reference_
from .saving import hooked

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("none", "sum", "mean", "batchmean")


def _said(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tensor(name: str, value: object, beside: object = None) -> Tensor:
    """`value`, or a TypeError if it is not a tensor, or a DTensor and `beside` is none.

    What takes DTensors has replaced them by local tensors before it comes here (dtensors.py).
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if type(value) is not Tensor:
        found: Any = sys.modules.get("torch.distributed.tensor")  # not imported for this
        given = found is not None and isinstance(value, found.DTensor)
        if given and not isinstance(beside, found.DTensor):
            _refuse_dtensor(name, value)
    return value


def _refuse_dtensor(name: str, value: Any) -> None:
    instead = "its full_tensor()"
    if not any(placement.is_partial() for placement in value.placements):
        instead += (
            ", or its to_local(): of whole rows as it is, of slices of a vocabulary with group=, "
            "where the function has that"
        )
    raise TypeError(
        f"{name} must be a plain tensor here; got a DTensor with placements {value.placements}. "
        f"Pass {instead}. What takes DTensors: docs/sharding.md"
    )


def logits(
    name: str, value: object, sliced: bool = False, last: tuple[str, str] = ("V", "vocabulary")
) -> None:
    """A dense floating-point tensor [..., V] with V >= 1; a slice of a vocabulary may be empty.

    last: the last dim's symbol and name, where it is none.
    """
    t = tensor(name, value)
    if t.dtype not in DTYPES:
        accepted = ", ".join(_said(d) for d in DTYPES)
        raise TypeError(f"{name} must have one of the dtypes {accepted}; got {_said(t.dtype)}")
    if t.layout != torch.strided or t.is_nested:
        layout = "nested" if t.is_nested else t.layout
        raise TypeError(f"{name} must be a dense tensor; got layout {layout}")
    if t.dim() < 1:
        raise ValueError(f"{name} must have shape [..., {last[0]}]; got a 0-d tensor")
    if t.shape[-1] == 0 and not sliced:
        raise ValueError(f"{name} must have a {last[1]} of at least 1; got {list(t.shape)}")


def pair(
    policy: object,
    reference: object,
    valid_vocab: object = None,
    sliced: bool = False,
    names: tuple[str, str] = ("policy_logits", "reference_logits"),
) -> None:
    """Two logits of one shape on one device; their dtypes may differ."""
    first, second = names
    logits(first, policy, sliced)
    logits(second, reference, sliced)
    assert isinstance(policy, Tensor) and isinstance(reference, Tensor)
    if valid_vocab is not None and not sliced:  # of slices one rank cannot tell
        vocabulary(valid_vocab, policy, reference)
        same = policy.shape[:-1] == reference.shape[:-1]
    else:
        same = policy.shape == reference.shape
    if not same:
        if policy.shape[:-1] == reference.shape[:-1]:
            raise ValueError(
                f"{first} and {second} have vocabularies of different sizes, "
                f"{policy.shape[-1]} and {reference.shape[-1]}: valid_vocab must say how many "
                "logits of each row exist"
            )
        raise ValueError(
            f"{second} must have the shape of {first} (nothing is broadcast; expand() "
            f"costs nothing), which is {list(policy.shape)}; got {list(reference.shape)}"
        )
    on_device(second, reference, policy)


def vocabulary(valid_vocab: object, *logits_: Tensor) -> None:
    """An int from 1 to the smallest vocabulary."""
    if isinstance(valid_vocab, bool) or not isinstance(valid_vocab, (int, torch.SymInt)):
        raise TypeError(f"valid_vocab must be an int; got {type(valid_vocab).__name__}")
    smallest = min(t.shape[-1] for t in logits_)
    if not 1 <= valid_vocab <= smallest:
        raise ValueError(f"valid_vocab must be from 1 to {smallest}; got {valid_vocab}")


def controls(softcap: object, logit_scale: object) -> float | None:
    """Positive finite numbers; the cap of logits that are not yet scaled."""
    for name, value in (("softcap", softcap), ("logit_scale", logit_scale)):
        if name == "softcap" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number; got {type(value).__name__}")
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite; got {value}")
    if softcap is None:
        return None
    assert isinstance(softcap, (int, float)) and isinstance(logit_scale, (int, float))
    quotient = softcap / logit_scale
    if not 0 < quotient < math.inf:
        raise ValueError(
            "softcap / logit_scale must be positive and finite; "
            f"got softcap={softcap}, logit_scale={logit_scale}"
        )
    return quotient


def on_device(name: str, value: Tensor, policy: Tensor) -> None:
    """One device for all tensors."""
    if value.device != policy.device:
        raise ValueError(f"{name} must be on {policy.device} as the logits; got {value.device}")


def per_row(name: str, value: object, policy: Tensor) -> Tensor:
    """A tensor of shape logits.shape[:-1] on the logits' device."""
    t = tensor(name, value)
    if t.shape != policy.shape[:-1]:
        raise ValueError(
            f"{name} must have shape logits.shape[:-1] = {list(policy.shape[:-1])}; "
            f"got {list(t.shape)}"
        )
    on_device(name, t, policy)
    return t


def flag(name: str, value: object) -> None:
    """True or False, nothing that only looks like it."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {type(value).__name__}")


def one_of(name: str, value: object, accepted: tuple[str, ...]) -> None:
    """One of a few strings."""
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(accepted)}; got {value!r}")


def reduction(value: object) -> None:
    """One of the reductions."""
    one_of("reduction", value, REDUCTIONS)


def floating(name: str, value: object, beside: object = None) -> None:
    """A floating-point tensor of any shape; a DTensor only beside another one."""
    t = tensor(name, value, beside)
    if t.dtype not in DTYPES:
        raise TypeError(f"{name} must be a floating-point tensor; got {_said(t.dtype)}")


def alike(name: str, value: Tensor, other: str, model: Tensor) -> None:
    """The shape and device of another tensor."""
    if value.shape != model.shape:
        raise ValueError(
            f"{name} must have the shape of {other}, {list(model.shape)}; got {list(value.shape)}"
        )
    if value.device != model.device:
        raise ValueError(f"{name} must be on {model.device} as {other}; got {value.device}")


def real(name: str, value: Any) -> float:
    """A number, as a float; NaN and infinity are numbers here."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number; got {type(value).__name__}")
    return float(value)


def not_negative(name: str, value: object) -> float:
    """A finite number >= 0, as a float."""
    number = real(name, value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be at least 0 and finite; got {number}")
    return number


def share(name: str, value: object) -> float:
    """A number from 0 to 1, as a float."""
    number = real(name, value)
    if not 0 <= number <= 1:
        raise ValueError(f"{name} must be from 0 to 1; got {number}")
    return number


def positive(name: str, value: object) -> float:
    """A finite number > 0, as a float."""
    number = real(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be positive and finite; got {number}")
    return number


def number_temperature(value: object) -> float:
    """A finite number > 0, of Python or the compiler: one of numpy's may divide in its own type."""
    number = isinstance(value, (float, int, numbers.Real, torch.SymFloat, torch.SymInt))
    if isinstance(value, bool) or not number:
        raise TypeError(
            "temperature must be a number, or a float tensor with one per row; "
            f"got {type(value).__name__}"
        )
    given: Any = value
    if not (given > 0 and given < math.inf):
        raise ValueError(f"temperature must be positive and finite; got {given}")
    if not isinstance(given, (float, int, torch.SymFloat, torch.SymInt)):
        given = float(given)
    accepted: float = given
    return accepted


def token_range(name: str, ids: Tensor, width: int, besides: str = "") -> None:
    """Token ids of a vocabulary of this width, where that can be looked at."""
    from . import autograd  # which needs this module

    if ids.device.type != "cpu" or autograd.intercepted(ids) or not ids.numel():
        return
    low, high = (int(v) for v in ids.aminmax())
    if low < 0 or high >= width:
        raise ValueError(f"{name} must be from 0 to {width - 1}{besides}; got {low} to {high}")


def tensor_temperature(value: Tensor, policy: Tensor) -> None:
    """A floating-point tensor, 0-d or one per row, that asks for no gradient."""
    tensor("temperature", value)
    if value.requires_grad:
        raise TypeError("temperature requires grad, but no gradient to it exists; detach() it")
    if value.dtype not in DTYPES:
        raise TypeError(f"temperature must be a floating-point tensor; got {_said(value.dtype)}")
    if value.dim() != 0:
        per_row("temperature", value, policy)
    on_device("temperature", value, policy)


def token_index(name: str, value: object, policy: Tensor) -> None:
    """An int64 tensor of shape logits.shape[:-1], or that and one dim more."""
    t = tensor(name, value)
    if t.dtype != torch.int64:
        raise TypeError(f"{name} must be an int64 tensor; got {_said(t.dtype)}")
    leading = policy.shape[:-1]
    if t.shape != leading and (t.dim() != len(leading) + 1 or t.shape[:-1] != leading):
        raise ValueError(
            f"{name} must have shape logits.shape[:-1] = {list(leading)}, or that with one more "
            f"dim at the end; got {list(t.shape)}"
        )
    on_device(name, t, policy)


def _may_overlap(t: Tensor) -> bool:
    # Each dim must step over all that the dims of smaller strides span. No sort: torch.compile
    # cannot sort symbolic strides.
    dims = [(stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]
    for i, (stride, _) in enumerate(dims):
        below = [s * (n - 1) for j, (s, n) in enumerate(dims) if j != i and s <= stride]
        if stride <= sum(below):
            return True
    return False


def _memory(t: Tensor) -> tuple[int, int]:
    extent = sum(stride * (size - 1) for stride, size in zip(t.stride(), t.shape, strict=True)) + 1
    # Fake tensors have no memory: there, places in the storage are compared.
    fake = isinstance(t, FakeTensor)
    begin: Any = t.storage_offset() * t.element_size() if fake else t.data_ptr()
    return begin, begin + extent * t.element_size()


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def inplace_grad(policy: Tensor, reference: Tensor) -> None:
    """A policy whose memory may be overwritten by its gradient."""
    if policy.stride(-1) != 1 and policy.shape[-1] > 1:
        raise ValueError(
            "inplace_grad=True needs policy_logits whose last dim has stride 1; "
            f"got stride {policy.stride(-1)}"
        )
    if _may_overlap(policy):
        raise ValueError(
            "inplace_grad=True needs policy_logits whose elements do not share memory (not an "
            f"expanded tensor); got shape {list(policy.shape)} with strides {list(policy.stride())}"
        )
    if torch.compiler.is_compiling() or policy.numel() == 0 or policy.device.type == "meta":
        return
    if torch.is_grad_enabled() and policy.requires_grad and hooked():
        raise RuntimeError(
            "inplace_grad=True under hooks for saved tensors (checkpoint, save_on_cpu): autograd "
            "would not notice that policy_logits are gone where something else has saved them. "
            "Use inplace_grad=False there."
        )
    (begin, end), (other_begin, other_end) = _memory(policy), _memory(reference)
    if isinstance(policy, FakeTensor) and _storage(policy) != _storage(reference):
        return
    if begin < other_end and other_begin < end:
        raise ValueError(
            "inplace_grad=True needs reference_logits outside the memory of policy_logits, which "
            "the gradient overwrites; got two views of the same memory"
        )


def row_stats_arguments(
    policy: Tensor,
    reference: Tensor | None,
    token_ids: Tensor | None,
    fields: list[str],
    parameter: float | None,
    inv_temperature: Tensor | None,
    mask: Tensor | None,
    valid_vocab: int | None,
    softcap: float | None,
) -> None:
    """What kernels rely on, for any caller of the operator, but for the contents of tensors."""
    shape, n = policy.shape, math.prod(policy.shape[:-1])
    if len(shape) < 2 or shape[-1] == 0:
        raise ValueError(f"policy must have shape [..., V] with V >= 1; got {list(shape)}")
    for name, logits_ in (("policy", policy), ("reference", reference)):
        if logits_ is None:
            continue
        same = logits_.shape == shape if valid_vocab is None else logits_.shape[:-1] == shape[:-1]
        if not same or logits_.device != policy.device:
            raise ValueError(f"{name} must have policy's shape and device; got {logits_.shape}")
        if valid_vocab is not None and not 1 <= valid_vocab <= logits_.shape[-1]:
            raise ValueError(
                f"valid_vocab must be from 1 to {name}'s {logits_.shape[-1]}; got {valid_vocab}"
            )
        if logits_.dtype not in DTYPES:
            raise TypeError(f"{name} must be floating-point; got {_said(logits_.dtype)}")
        if logits_.stride(-1) != 1 and logits_.shape[-1] > 1:
            raise ValueError(f"{name} must have last stride 1; got strides {logits_.stride()}")
    for name, extra, dtype, shapes in (
        ("token_ids", token_ids, torch.int64, ((n, -1),)),
        ("inv_temperature", inv_temperature, reference_.inside(policy.device), ((n,), (1,))),
        ("mask", mask, torch.bool, ((n,),)),
    ):
        if extra is None:
            continue
        found = (extra.shape[0], -1) if extra.dim() == 2 else tuple(extra.shape)
        if found not in shapes or extra.dtype != dtype:
            raise ValueError(
                f"{name} must be {_said(dtype)} of shape {' or '.join(map(str, shapes))}; "
                f"got {_said(extra.dtype)} of shape {list(extra.shape)}"
            )
    for name in fields:
        if name not in divergences.FIELDS:
            raise ValueError(f"fields must be of {', '.join(divergences.FIELDS)}; got {name!r}")
        field = divergences.FIELDS[name]
        if field.needs_reference and reference is None:
            raise ValueError(f"field {name} needs a reference")
        if field.needs_token_ids and token_ids is None:
            raise ValueError(f"field {name} needs token_ids")
        if field.parameter is not None and parameter is None:
            raise ValueError(f"field {name} needs a parameter, its {field.parameter}")
    swept = [name for name in fields if divergences.FIELDS[name].second_sweep]
    if swept and not {*fields} - {*swept} <= {"logsumexp", "logprob", "mean_logprob"}:
        raise ValueError(
            f"field {swept[0]} goes with logsumexp, logprob and mean_logprob; got {fields}"
        )
    if len(swept) > 1:
        raise ValueError(f"one field of a second sweep at a time; got {swept}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite; got {softcap}")


def second_sweep(field: str, state: Tensor, policy: Tensor) -> None:
    """A field of operator row_sums, and the rows' state."""
    if not divergences.FIELDS[field].second_sweep:
        names = [name for name, f in divergences.FIELDS.items() if f.second_sweep]
        raise ValueError(f"field must be one of {', '.join(names)}; got {field!r}")
    expected = (math.prod(policy.shape[:-1]), len(reference_.STATE))
    if state.shape != expected or state.dtype != reference_.inside(policy.device):
        raise ValueError(f"state must be float64 of shape {expected}; got {list(state.shape)}")


def merge_states(parts: Tensor, fields: list[str], inv_temperature: Tensor | None) -> None:
    """What kernels rely on, for any caller of the operator."""
    columns, inner = len(reference_.STATE), reference_.inside(parts.device)
    if parts.dim() != 3 or parts.shape[0] == 0 or parts.shape[2] != columns or parts.dtype != inner:
        raise ValueError(
            f"parts must be {_said(inner)} of shape [P, N, {columns}] with P >= 1; "
            f"got {_said(parts.dtype)} of shape {list(parts.shape)}"
        )
    n = parts.shape[1]
    if inv_temperature is not None and tuple(inv_temperature.shape) not in ((n,), (1,)):
        raise ValueError(
            f"inv_temperature must have shape ({n},) or (1,); got {list(inv_temperature.shape)}"
        )
    for name in fields:
        known = divergences.FIELDS.get(name)
        if known is None or known.needs_token_ids or known.second_sweep:
            rows = [
                f.name
                for f in divergences.FIELDS.values()
                if not f.needs_token_ids and not f.second_sweep
            ]
            raise ValueError(f"fields must be of {', '.join(rows)}; got {name!r}")
