"""Controls of a row: logits that do not exist, and capped ones."""

from __future__ import annotations

import time

import oracle
import pytest
import torch
from family_oracle import FAMILY
from torch import Tensor

import fusedkl

OPS = torch.ops.fusedkl


@pytest.mark.parametrize("width", [1, 70, 4095])
def test_logits_beyond_valid_vocab_do_not_exist(backend: str, width: int) -> None:
    x, y = torch.randn(3, width + 9), torch.randn(3, width + 70)
    x[:, width:], y[:, width:] = torch.nan, torch.inf
    fields = ["forward_kl", "reverse_kl"]
    values, state = OPS.row_stats(x, y, None, fields, None, None, None, width, None, backend)
    cut = [t[:, :width].contiguous() for t in (x, y)]
    expected, expected_state = OPS.row_stats(
        *cut, None, fields, None, None, None, None, None, backend
    )
    assert torch.equal(values, expected) and torch.equal(state, expected_state)
    grad = torch.rand_like(values)
    gx, gy = OPS.row_stats_backward(
        grad, x, y, None, state, fields, None, None, width, None, True, True, backend
    )
    ex, ey = OPS.row_stats_backward(
        grad, *cut, None, state, fields, None, None, None, None, True, True, backend
    )
    assert gx.shape == x.shape and gy.shape == y.shape
    assert torch.equal(gx[:, :width], ex) and torch.equal(gy[:, :width], ey)
    assert not gx[:, width:].any() and not gy[:, width:].any()


def test_vocabularies_of_different_sizes() -> None:
    policy, reference = torch.randn(2, 3, 50), torch.randn(2, 3, 64)
    with pytest.raises(ValueError, match=r"sizes, 50 and 64: valid_vocab must say"):
        fusedkl.forward_kl(policy, reference)
    with pytest.raises(ValueError, match=r"valid_vocab must be from 1 to 50; got 51"):
        fusedkl.forward_kl(policy, reference, valid_vocab=51)
    with pytest.raises(TypeError, match=r"valid_vocab must be an int; got float"):
        fusedkl.forward_kl(policy, reference, valid_vocab=50.0)
    with pytest.raises(ValueError, match="reference_logits must have the shape"):
        fusedkl.forward_kl(policy, reference[:, :2])


def test_valid_vocab_in_every_function(backend: str) -> None:
    policy, reference = torch.randn(2, 3, 50), torch.randn(2, 3, 64)
    policy[..., 40:], reference[..., 40:] = torch.nan, torch.inf
    cut = policy[..., :40], reference[..., :40]
    ids = torch.randint(0, 40, (2, 3))
    for kind, parameter in FAMILY.values():
        options = {"backend": backend, **parameter}
        padded = fusedkl.divergence(policy, reference, kind, valid_vocab=40, **options)
        assert torch.equal(padded, fusedkl.divergence(*cut, kind, **options))
    stats = fusedkl.token_stats(policy, reference, ids, valid_vocab=40, backend=backend)
    for a, b in zip(stats, fusedkl.token_stats(*cut, ids, backend=backend), strict=True):
        assert torch.equal(a, b)
    x = policy.clone().requires_grad_()
    fusedkl.jsd(x, reference, valid_vocab=40, reduction="mean", backend=backend).backward()
    assert bool(x.grad[..., :40].any()) and not x.grad[..., 40:].any()
    with pytest.raises(ValueError, match="from 0 to 39; got 40 to 40"):
        fusedkl.token_stats(policy, token_ids=0 * ids + 40, valid_vocab=40, backend=backend)


def capped(logits: Tensor, softcap: float, scale: float) -> Tensor:
    return softcap * torch.tanh(scale * logits.double() / softcap)


@pytest.mark.slow
@pytest.mark.parametrize("sigma", [1e-6, 0.1, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_softcap_and_scale(backend: str, dtype: torch.dtype, sigma: float) -> None:
    """Of logits whose difference the cap leaves small too: values and gradients."""
    policy = (20 * torch.randn(3, 700)).to(dtype)
    reference = (policy.double() + sigma * torch.randn(3, 700)).to(dtype)
    options = {"softcap": 30.0, "logit_scale": 0.5, "temperature": 0.8}
    for kind, parameter in [("forward_kl", {}), ("reverse_kl", {}), *FAMILY.values()]:
        x, y = policy.clone().requires_grad_(), reference.clone().requires_grad_()
        value = fusedkl.divergence(x, y, kind, backend=backend, **parameter, **options)
        u, v = policy.double().requires_grad_(), reference.double().requires_grad_()
        true = fusedkl.divergence(
            capped(u, 30.0, 0.5),
            capped(v, 30.0, 0.5),
            kind,
            temperature=0.8,
            backend="reference",
            **parameter,
        )
        assert oracle.relative_error(value.detach(), true.detach(), 1e-12) <= 1e-5, kind
        if float(true.detach().min()) < 1e-12:
            continue
        found = torch.autograd.grad(value.sum(), (x, y))
        expected = torch.autograd.grad(true.sum(), (u, v))
        for a, b in zip(found, expected, strict=True):
            assert oracle.relative_l2(a, b) <= oracle.GRADIENT_TOLERANCE[dtype], kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_softcap_of_what_is_no_ordinary_logit(backend: str, dtype: torch.dtype) -> None:
    """Logits beyond any cap are at it; NaN stays NaN, and one-sided support infinite."""
    y = 3 * torch.randn(7, 300)
    x = y + 0.1 * torch.randn(7, 300)
    x[0, 5], x[1, 5], x[2, 5], x[3, 5] = torch.inf, 1e38, torch.nan, -torch.inf
    y[4, 5] = -torch.inf
    x[5], y[5] = 1e4, 1e4 + torch.arange(300)  # all at the cap: equal
    x[6, 7], y[6, 7] = -1e35, -1e38
    x, y = x.to(dtype), y.to(dtype)
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        for cap in (20.0, 1e-5, 1e5, 1e8):
            found, true = (
                fusedkl.divergence(a, b, kind, softcap=cap, backend=name)
                for a, b, name in ((x, y, backend), (x.double(), y.double(), "reference"))
            )
            torch.testing.assert_close(
                found.double(), true, rtol=1e-5, atol=1e-9, equal_nan=True, msg=f"{kind}, {cap}"
            )


def test_softcap_is_not_taken_in_double() -> None:
    """Which costs a hundred times as much as the same rows without a cap."""
    policy, reference = torch.randn(2, 4, 30_000)

    def seconds(softcap: float | None) -> float:
        times = []
        for _ in range(5):
            leaf = policy.clone().requires_grad_()
            begin = time.process_time()
            fusedkl.forward_kl(leaf, reference, softcap=softcap, reduction="sum").backward()
            times.append(time.process_time() - begin)
        return min(times)

    assert seconds(30.0) < 40 * seconds(None)


def test_softcap_of_statistics_and_masks(backend: str) -> None:
    policy, reference = 20 * torch.randn(2, 4, 90)
    policy[:, ::5] = reference[:, ::5] = -torch.inf  # absent, not a logit of -softcap
    ids = torch.full((4,), 7)
    found = fusedkl.token_stats(policy, reference, ids, softcap=15.0, backend=backend)
    absent = policy == -torch.inf
    x, y = (
        torch.where(absent, -torch.inf, capped(t.nan_to_num(), 15.0, 1.0))
        for t in (policy, reference)
    )
    for a, b in zip(found, fusedkl.token_stats(x, y, ids, backend="reference"), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("field", ["logprob", "ref_logprob", "log_ratio", "logsumexp"])
def test_softcap_in_the_gradients_of_statistics(backend: str, field: str) -> None:
    """The tokens' own gradients are stored apart, and have the slope of the cap too."""
    rows = [(8 * torch.randn(4, 90)).requires_grad_() for _ in "xy"]
    ids = torch.randint(90, (4, 2))
    row = rows[field.startswith("ref_")]
    stats = fusedkl.token_stats(*rows, ids, fields=[field], softcap=5.0, backend=backend)
    (found,) = torch.autograd.grad(getattr(stats, field).sum(), row)
    log_p = torch.log_softmax(capped(row, 5.0, 1.0), -1)
    value = log_p.gather(-1, ids).sum()
    if field == "logsumexp":
        value = torch.logsumexp(capped(row, 5.0, 1.0), -1).sum()
    (expected,) = torch.autograd.grad(value, row)
    assert oracle.relative_l2(found, expected) <= oracle.GRADIENT_TOLERANCE[found.dtype]


@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7)])
def test_empty_rows_of_a_strided_last_dim(backend: str, shape: tuple[int, ...]) -> None:
    """torch calls an empty tensor contiguous whatever its strides, so it is not copied."""
    x = torch.empty(*shape[:-1], 2 * shape[-1])[..., ::2].requires_grad_()
    loss = fusedkl.forward_kl(x, x.detach(), reduction="sum", backend=backend)
    (gradient,) = torch.autograd.grad(loss, x)
    assert loss == 0 and gradient.shape == shape
    assert fusedkl.logsumexp(x, backend=backend).shape == shape[:-1]


def test_logit_scale_is_one_over_temperature(backend: str) -> None:
    policy, reference = torch.randn(2, 3, 40)
    scaled = fusedkl.jsd(policy, reference, logit_scale=0.25, backend=backend)
    assert torch.equal(scaled, fusedkl.jsd(policy, reference, temperature=4.0, backend=backend))
    per_row = torch.tensor([1.0, 2.0, 4.0])
    both = fusedkl.tvd(policy, reference, logit_scale=2.0, temperature=per_row, backend=backend)
    assert torch.equal(
        both, fusedkl.tvd(policy, reference, temperature=per_row / 2, backend=backend)
    )


def test_gradients_of_capped_tokens(backend: str) -> None:
    """A token's own logit gets the slope of the cap, as all others do; repeated ids too."""
    policy, reference = 20 * torch.randn(2, 3, 70)
    ids = torch.tensor([[4, 9, 4]] * 3)
    fields = ("logprob", "ref_logprob", "log_ratio", "entropy")
    x, y = policy.clone().requires_grad_(), reference.clone().requires_grad_()
    u, v = policy.double().requires_grad_(), reference.double().requires_grad_()
    found = fusedkl.token_stats(x, y, ids, fields=fields, softcap=15.0, backend=backend)
    true = fusedkl.token_stats(
        capped(u, 15.0, 1.0), capped(v, 15.0, 1.0), ids, fields=fields, backend="reference"
    )

    def total(stats: fusedkl.TokenStats) -> Tensor:
        assert stats.logprob is not None and stats.ref_logprob is not None
        assert stats.entropy is not None
        weight = torch.arange(1, 4)
        return (weight * (stats.logprob + 2 * stats.ref_logprob + 3 * stats.k1)).sum() + (
            stats.entropy.sum()
        )

    slopes = torch.autograd.grad(total(found), (x, y))
    for slope, wanted in zip(slopes, torch.autograd.grad(total(true), (u, v)), strict=True):
        assert oracle.relative_l2(slope, wanted) <= 1e-5
        worst = (slope[:, [4, 9]] - wanted[:, [4, 9]]).abs() / wanted[:, [4, 9]].abs()
        assert float(worst.max()) <= 1e-5


@pytest.mark.parametrize("kind", ["jsd", "skew_kl", "hellinger"])
def test_a_token_of_one_row_in_one_segment_under_a_softcap(kind: str) -> None:
    """What that segment, taken in double, finds of a row's log-ratio is of that segment alone."""
    policy, reference = torch.randn(2, 1, 140_001)
    policy[0, 7] = -torch.inf
    found, true = (
        fusedkl.divergence(policy.to(dtype), reference.to(dtype), kind, softcap=5.0, backend=name)
        for dtype, name in ((torch.float32, "cpu"), (torch.float64, "reference"))
    )
    assert oracle.relative_error(found, true) <= 1e-5
