"""What the kl_div tests share: inputs, and a record of all that a caller can see of a call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedkl import kl_div, kl_div_ops

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("none", "sum", "mean", "batchmean")

needs_kernel = pytest.mark.skipif(
    not kl_div_ops.HAS_CPU_KERNEL, reason="the compiled library has no kl_div kernel here"
)


def quiet(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The call without its warnings, for tests of something else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def pair(
    shape: tuple[int, ...], dtype: torch.dtype, log_target: bool, grad: bool = True
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and a target over the last dimension."""
    x = torch.randn(shape, dtype=torch.float64) * 2
    y = torch.randn(shape, dtype=torch.float64) * 2
    dim = -1 if shape else 0
    log_p = torch.log_softmax(x, dim) if shape else x - 2
    target = torch.log_softmax(y, dim) if shape else y - 2
    target = target if log_target else target.exp()
    return log_p.to(dtype).requires_grad_(grad), target.to(dtype).requires_grad_(grad)


@dataclass
class Outcome:
    value: Tensor | None
    error: tuple[type, str] | None
    warned: list[tuple[type, str]]
    where: list[tuple[str, int]]


def outcome(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Outcome:
    value, error = None, None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            value = function(*args, **kwargs)
        except Exception as raised:
            error = (type(raised), str(raised))
    warned = [(w.category, str(w.message)) for w in caught]
    return Outcome(value, error, warned, [(w.filename, w.lineno) for w in caught])


def same_meta(ours: Tensor, theirs: Tensor) -> None:
    for name in ("dtype", "shape", "device", "layout", "requires_grad", "is_leaf"):
        assert getattr(ours, name) == getattr(theirs, name), name
    if ours.layout == torch.strided:
        assert ours.stride() == theirs.stride()
    assert type(ours) is type(theirs)


def compare(*args: Any, gradients: bool = True, **kwargs: Any) -> Outcome:
    """Both functions on the same arguments: same value, gradients, warnings and errors.

    Equal within torch's default tolerances of the dtype, NaN included; half precision: test_half.
    """
    ours, theirs = outcome(kl_div, *args, **kwargs), outcome(F.kl_div, *args, **kwargs)
    assert ours.error == theirs.error
    assert ours.warned == theirs.warned
    if ours.value is None or theirs.value is None:
        return ours
    same_meta(ours.value, theirs.value)
    torch.testing.assert_close(ours.value, theirs.value, equal_nan=True)
    inputs = [t for t in args if isinstance(t, Tensor) and t.requires_grad]
    if gradients and inputs:
        upstream = torch.randn(ours.value.shape).to(ours.value.dtype)
        g_ours = torch.autograd.grad(ours.value, inputs, upstream)
        g_theirs = torch.autograd.grad(theirs.value, inputs, upstream)
        for a, b in zip(g_ours, g_theirs, strict=True):
            same_meta(a, b)
            torch.testing.assert_close(a, b, equal_nan=True)
    return ours


def close_or_no_worse(ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
    """torch's default tolerances; in half precision as near to float64 as torch is."""
    if ours.dtype not in (torch.bfloat16, torch.float16):
        torch.testing.assert_close(ours, theirs, equal_nan=True)
        return
    assert torch.equal(ours.isnan(), theirs.isnan())
    info = torch.finfo(ours.dtype)
    rounding = 0.51 * (info.eps * exact.abs() + info.smallest_normal * info.eps) + 1e-6
    error, their_error = ((v.double() - exact).abs() for v in (ours, theirs))
    same = (ours == theirs) | ours.isnan()  # infinite ones too
    assert ((error <= their_error + rounding) | same).all()


@dataclass
class Kernels:
    forward: int = 0
    backward: int = 0


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernels]:
    """How often the compiled kernels are called by kl_div within."""
    count = Kernels()

    def wrap(name: str, field: str) -> None:
        kernel = getattr(kl_div_ops, name)

        def counting(*args: Any) -> Any:
            setattr(count, field, getattr(count, field) + 1)
            return kernel(*args)

        monkeypatch.setattr(kl_div_ops, name, counting)

    with monkeypatch.context():
        wrap("_OP_SUM", "forward")
        wrap("_OP_BACKWARD", "backward")
        yield count
