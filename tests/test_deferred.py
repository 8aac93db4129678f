"""kl_div of softmaxes under patch() is fused, with torch's values, gradients and dtypes."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from kl_div_cases import needs_kernel
from patch_cases import (  # noqa: F401 (fixtures)
    LOSSES,
    Calls,
    N,
    V,
    agree,
    both,
    logits,
    nothing_left_behind,
    padded,
    poisoned_memory,
)
from test_memory import peak
from torch import Tensor

import fusedkl
from fusedkl.backends import BACKENDS

pytestmark = needs_kernel


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


FLOAT = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", FLOAT, ids=str)
@pytest.mark.parametrize("name", [n for n in LOSSES if n != "dtype"])
def test_fused_and_equal(name: str, dtype: torch.dtype, calls: Calls) -> None:
    x, y = logits(dtype)
    agree(both(LOSSES[name], x, y), 1e-5 if dtype == torch.float32 else 1e-10)
    assert calls.fused == 1
    agree(both(LOSSES[name], x, y.requires_grad_()), 1e-5 if dtype == torch.float32 else 1e-10)
    assert calls.fused == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_logits_with_float32_softmaxes(dtype: torch.dtype, calls: Calls) -> None:
    agree(both(LOSSES["dtype"], *logits(dtype)), 4e-3)
    assert calls.fused == 1


@pytest.mark.parametrize("name", ["batchmean", "rows", "mean"])
def test_half_results_have_torchs_dtype(name: str, calls: Calls) -> None:
    """torch's own half-precision numbers are noise: float64 of the same logits is the measure."""
    x, y = logits(torch.bfloat16)
    wanted = both(LOSSES[name], x.double(), y.double())[0]
    found = both(LOSSES[name], x, y)[1]
    assert calls.fused == 2  # the float64 run was patched as well
    assert found[0].dtype == torch.bfloat16
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=4e-3, atol=0)
    a, b = wanted[1][0], found[1][0]
    assert a is not None and b is not None and (b.double() - a).norm() < 4e-3 * a.norm()


def test_three_dims_and_shifted_slices(calls: Calls) -> None:
    x, y = logits(torch.float32, 2, 4, V)

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return F.kl_div(
            F.log_softmax(a[:, :-1], -1), F.softmax(b[:, 1:], -1), reduction="batchmean"
        )

    agree(both(loss, x, y), 1e-5)
    assert calls.fused == 1


def test_tokens_that_neither_row_has() -> None:
    """NaN in torch (0 times inf - inf); patched, that of the tokens that there are."""
    x, y = logits()
    wanted = LOSSES["batchmean"](x.double(), y.double()).item()
    (plain, _), (patched, (gradient, _)) = both(LOSSES["batchmean"], *padded(x, y))
    assert plain.isnan() and patched.item() == pytest.approx(wanted, rel=1e-5)
    assert gradient is not None and gradient.isfinite().all() and not gradient[:, V:].any()


UNFUSED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "another dim": lambda x, y: F.kl_div(F.log_softmax(x, 0), F.softmax(y, 0), reduction="sum"),
    "a probability twice": lambda x, y: F.kl_div(
        F.softmax(x, -1), F.softmax(y, -1), reduction="sum"
    ),
    "log target not said": lambda x, y: F.kl_div(
        F.log_softmax(x, -1), F.log_softmax(y, -1).neg(), reduction="sum"
    ),
    "plain target": lambda x, y: F.kl_div(F.log_softmax(x, -1), y.exp(), reduction="sum"),
    "broadcast": lambda x, y: F.kl_div(
        F.log_softmax(x.expand(3, N, V), -1), F.softmax(y, -1), reduction="sum"
    ),
    "narrowed": lambda x, y: F.kl_div(
        F.log_softmax(x, -1, dtype=torch.bfloat16), F.softmax(y, -1), reduction="sum"
    ),
    "legacy": lambda x, y: F.kl_div(F.log_softmax(x, -1), F.softmax(y, -1), size_average=False),
    "sum of tokens": lambda x, y: F.kl_div(
        F.log_softmax(x, -1), F.softmax(y, -1), reduction="none"
    ).sum(0),
    "NumPy's names": lambda x, y: torch.sum(  # type: ignore[call-overload, no-any-return]
        F.kl_div(F.log_softmax(x, -1), F.softmax(y, -1), reduction="none"), axis=-1, keepdims=True
    ),
    "weighted": lambda x, y: F.kl_div(F.log_softmax(x, -1), F.softmax(y, -1), reduction="none") * y,
    "masked": lambda x, y: F.kl_div(
        F.log_softmax(x, -1).masked_fill(y > 1, 0), F.softmax(y, -1), reduction="sum"
    ),
    "nll": lambda x, y: F.nll_loss(F.log_softmax(x, -1), y.argmax(-1)),
    "attention": lambda x, y: F.dropout(F.softmax(x @ y.T @ y, -1), 0.0) @ y.T,
    "by hand": lambda x, y: (F.softmax(y, -1) * (F.log_softmax(y, -1) - F.log_softmax(x, -1))).sum(
        -1
    ),
}


# kl_div of two plain tensors of one shape, which fusedkl.kl_div adds up in an order of its own.
OWN_SUM = ("another dim", "a probability twice", "log target not said", "plain target", "masked")


@pytest.mark.parametrize("name", UNFUSED)
def test_anything_else_gets_torchs_bits(name: str, calls: Calls) -> None:
    (plain, plain_grads), (patched, patched_grads) = both(UNFUSED[name], *logits())
    assert calls.fused == 0
    tolerance = 1e-5 if name in OWN_SUM else 0.0
    torch.testing.assert_close(patched, plain, rtol=tolerance, atol=0)
    torch.testing.assert_close(patched_grads, plain_grads, rtol=tolerance, atol=tolerance * 1e-3)


@pytest.mark.parametrize("name", ["batchmean", "rows", "reverse"])
def test_memory_is_the_gradient(name: str) -> None:
    x, y = logits(torch.float32, 8, 20_000)

    def step() -> object:
        return torch.autograd.grad(LOSSES[name](x, y).sum(), x)

    gradient = x.numel() * 4
    plain = peak(step)
    with fusedkl.patch():
        patched = peak(step)
    assert plain >= 3 * gradient and gradient <= patched < gradient + 16_384


@pytest.mark.parametrize("name", ["softmax", "kl_div"])
def test_what_has_a_value_and_no_gradient_lets_its_logits_go(name: str) -> None:
    def made() -> tuple[Tensor, list[weakref.ref[Tensor]]]:
        x, y = (t.detach() for t in logits())
        p, q = F.log_softmax(x, -1), F.softmax(y, -1)
        made = F.kl_div(p, q, reduction="none") if name == "kl_div" else q
        held = [x, y] if name == "kl_div" else [y]
        if name == "kl_div":
            held += [p * 1, q * 1]
        made * 1
        return made, [weakref.ref(t) for t in held]

    with fusedkl.patch():
        kept, gone = made()
        assert [r() for r in gone] == [None] * len(gone)
        assert torch.isfinite(kept).all()


def test_what_the_kernels_do_not_take_is_not_deferred(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton has no float64: where it is the only one, such logits stay torch's."""
    limited = dataclasses.replace(BACKENDS["cpu"], takes=BACKENDS["triton"].takes)
    monkeypatch.setitem(BACKENDS, "cpu", limited)
    x, y = logits(torch.float64)
    for given in ((x, y), (x.detach().float().requires_grad_(), y)):
        agree(both(LOSSES["batchmean"], *given), 1e-5)
    with fusedkl.patch():
        assert type(F.softmax(y, -1)) is Tensor and type(F.softmax(y.float(), -1)) is not Tensor
    assert calls.fused == 0
