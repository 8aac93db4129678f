"""linear_divergence of float16: gradients of tiles keep the range of float16."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from linear_cases import TILE, Heads, heads
from test_linear import ALL, call, expected
from torch import Tensor

import fusedkl
from fusedkl import linear_products
from fusedkl.linear_products import Products

Paths = pytest.mark.parametrize("path", ["cpu", "cpu fast", "gpu", "gpu fast"])


@pytest.fixture
def options(path: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options of a call; "gpu": CPU tensors, in the products that CUDA ones would have."""
    monkeypatch.setattr(linear_products, "multiplied_natively", lambda *_: True)  # on every CPU
    if path.startswith("gpu"):
        mm, addmm, init = torch.mm, torch.addmm, Products.__init__

        def stored_wide(
            a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None, out: Tensor | None = None
        ) -> Tensor:
            assert a.dtype == b.dtype
            made = mm(a.float(), b.float()).to(a.dtype if out_dtype is None else out_dtype)
            return made if out is None else out.copy_(made)

        def added_wide(
            total: Tensor, a: Tensor, b: Tensor, *, out_dtype: torch.dtype, beta: int, out: Tensor
        ) -> Tensor:
            assert a.dtype == b.dtype and total.dtype == out.dtype == out_dtype
            return addmm(total, a.float(), b.float(), beta=beta, out=out)

        def of_a_gpu(self: Products, like: Tensor, fast: bool, inner: int) -> None:
            init(self, like, fast, inner)
            self.stores_wide, self.gradient, self.narrow = True, like.dtype, True

        monkeypatch.setattr(torch, "mm", stored_wide)
        monkeypatch.setattr(torch, "addmm", added_wide)
        monkeypatch.setattr(Products, "__init__", of_a_gpu)
    return {"precision": "fast" if path.endswith("fast") else None, "backend": "cpu"}


def errors(h: Heads, kind: str, upstream: float, names: tuple[str, ...], **options: Any) -> None:
    """Of the gradients of upstream times the mean, relative L2, printed."""
    exact = h.double()
    leaves, exact_leaves = h.leaves(*names), exact.leaves(*names)
    truth = torch.autograd.grad(expected(exact, kind).mean() * upstream, exact_leaves)
    got = call(h, kind=kind, reduction="mean", **options)
    found = torch.autograd.grad(got, leaves, torch.tensor(upstream))
    for name, a, e in zip(names, found, truth, strict=True):
        error = oracle.relative_l2(a.reshape(1, -1), e.reshape(1, -1))
        print(name, error)
        assert a.dtype == torch.float16 and error < 1e-3, f"{name} off by {error}"


def near(t: int, v: int) -> Heads:
    """Heads whose logits are exact in float16, so that "fast" does not round them."""
    h = heads(torch.float16, t=t, v=v)
    h.tensors["hidden"] = torch.randint(-2, 3, (t, 8)).half()
    h.tensors["weight"] = torch.randint(-2, 3, (v, 8)).half() / 4
    h.tensors["ref_hidden"] = h.tensors["hidden"].clone()
    h.tensors["ref_weight"] = h.tensors["weight"] + torch.randint(-1, 2, (v, 8)).half() / 4
    return h


@Paths
def test_the_mean_of_many_small_probabilities(options: dict[str, Any]) -> None:
    """1 / (N V) is 1e-6, of which float16 holds four bits."""
    errors(near(32, 32768), "forward_kl", 1.0, ("hidden",), **options)


@Paths
@pytest.mark.parametrize("kind", ["forward_kl", "jeffreys"])
def test_a_loss_scale(options: dict[str, Any], kind: str) -> None:
    """Elements above float16's largest number on the way to sums that are not."""
    h = near(3, 301)
    for name in ("weight", "ref_weight"):
        h.tensors[name] = h.tensors[name] / 64
    h.options |= {"logit_scale": 64.0, "ref_logit_scale": 64.0}
    errors(h, kind, 2.0**16, ("hidden", "ref_hidden"), tile=TILE, **options)


@pytest.mark.parametrize("path", ["gpu"])
def test_scales_temperatures_and_biases(options: dict[str, Any]) -> None:
    h = near(5, 301)
    h.tensors |= {n: (torch.randn(301) / 4).half() for n in ("bias", "ref_bias")}
    h.options |= {"logit_scale": 4.0, "ref_logit_scale": 0.125}
    exact = h.double()
    names = (*ALL, "bias", "ref_bias")
    leaves, exact_leaves = h.leaves(*names), exact.leaves(*names)
    temperature = torch.tensor([0.01, 1.0, 2.0, 3.0, 4.0])
    upstream = torch.tensor([2.0, 1.0, 2.0**8, 1.0, 3.0])
    want = expected(exact, "forward_kl", temperature.double())
    truth = torch.autograd.grad(want, exact_leaves, upstream.double())
    got = call(h, temperature=temperature, tile=TILE, **options)
    for name, a, e in zip(names, torch.autograd.grad(got, leaves, upstream), truth, strict=True):
        error = oracle.relative_l2(a.reshape(1, -1), e.reshape(1, -1))
        assert error < 1e-3, f"{name} off by {error}"


@pytest.mark.parametrize("path", ["gpu"])
def test_one_infinite_upstream_gradient_stays_alone(options: dict[str, Any]) -> None:
    h = near(5, 301)
    (leaf,) = h.leaves("hidden")
    upstream = torch.tensor([torch.inf, torch.nan, 1.0, 1.0, 0.0])
    (found,) = torch.autograd.grad(call(h, tile=TILE, **options), leaf, upstream)
    (plain,) = torch.autograd.grad(call(h, tile=TILE, **options).sum(), leaf)
    torch.testing.assert_close(found[2:4], plain[2:4], rtol=1e-3, atol=1e-6)
    assert bool((found[4] == 0).all())


@pytest.mark.parametrize("path", ["cpu fast"])
def test_the_gradient_of_given_logits(options: dict[str, Any]) -> None:
    h = near(5, 301)
    h.tensors["ref_logits"] = torch.randn(5, 301).half()
    del h.tensors["ref_hidden"], h.tensors["ref_weight"]
    exact, names = h.double(), ("hidden", "ref_logits")
    leaves, exact_leaves = h.leaves(*names), exact.leaves(*names)
    truth = torch.autograd.grad(expected(exact, "reverse_kl").sum() * 2**12, exact_leaves)
    got = call(h, kind="reverse_kl", tile=TILE, reduction="sum", **options)
    found = torch.autograd.grad(got, leaves, torch.tensor(2.0**12))
    for name, a, e in zip(names, found, truth, strict=True):
        assert oracle.relative_l2(a.reshape(1, -1), e.reshape(1, -1)) < 1e-3, name


@Paths
def test_log_ratios_of_the_promised_range_do_not_overflow(options: dict[str, Any]) -> None:
    """A KL of 999 times the scale that keeps an upstream gradient of 1/3."""
    hidden, weight = torch.zeros(3, 1).half(), torch.tensor([[0.0], [1.0]]).half()
    given = {"ref_logits": torch.tensor([[0.0, -2000.0]]).expand(3, 2)}
    hidden.requires_grad_()
    kl = fusedkl.linear_divergence(
        hidden, weight, **given, kind="reverse_kl", reduction="mean", **options
    )
    (slope,) = torch.autograd.grad(kl, hidden)
    torch.testing.assert_close(slope, torch.full_like(slope, 500 / 3), rtol=1e-3, atol=0)
