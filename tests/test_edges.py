"""What happens where the mathematics or the arithmetic has an edge, on every backend."""

from __future__ import annotations

import math

import cases
import oracle
import pytest
import torch
from torch import Tensor

import fusedkl

INF, NAN = math.inf, math.nan


def run(
    policy: Tensor, reference: Tensor, kind: str, backend: str, **options: object
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, and gradients of their sum to both."""
    policy, reference = policy.clone().requires_grad_(), reference.clone().requires_grad_()
    value = fusedkl.divergence(policy, reference, kind, backend=backend, **options)
    gx, gy = torch.autograd.grad(value.sum(), (policy, reference))
    return value.detach(), gx, gy


def check_against_the_oracle(
    policy: Tensor, reference: Tensor, backend: str, temperature: float = 1.0
) -> None:
    true = oracle.fields(policy, reference, temperature)
    for kind in ("forward_kl", "reverse_kl"):
        value, gx, gy = run(policy, reference, kind, backend, temperature=temperature)
        assert oracle.relative_error(value, true[kind], 1e-12) <= 1e-5
        for found, name in ((gx, f"d_{kind}"), (gy, f"d_{kind}_reference")):
            expected = true[name]
            assert torch.equal(found.isnan(), expected.isnan()), f"{kind} {name}"
            ok = ~expected.isnan()
            rounding = torch.finfo(found.dtype).eps
            bound = 1e-6 + (1e-5 + rounding) * expected[ok].abs()
            assert bool(((found[ok].double() - expected[ok]).abs() <= bound).all()), (
                f"{kind} {name}: {found} is not {expected}"
            )
        skipped = (policy == -INF) & (reference == -INF) & ~value.isnan()[:, None]
        assert not gx[skipped].any() and not gy[skipped].any()
        assert not gy[value == INF].any()


def check_against_the_reference_backend(
    policy: Tensor, reference: Tensor, kind: str, backend: str
) -> None:
    """Of float32 rows, in float64 there."""
    found = run(policy, reference, kind, backend)
    true = run(policy.double(), reference.double(), kind, "reference")
    assert oracle.relative_error(found[0], true[0]) <= 1e-5, kind
    for a, b in zip(found[1:], true[1:], strict=True):
        assert oracle.relative_l2(a, b) <= oracle.GRADIENT_TOLERANCE[torch.float32], kind


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_minus_infinity(backend: str, dtype: torch.dtype, temperature: float) -> None:
    """Masked vocabulary in both rows, in one, in different places; values and both gradients."""
    policy, reference = (torch.randn(2, 5, 37) * 2).to(dtype)
    policy[0, ::3] = reference[0, ::3] = -INF  # both
    policy[1, 4] = -INF  # p = 0 < q: forward infinite
    reference[2, 4] = -INF  # q = 0 < p: reverse infinite
    policy[3, 4] = reference[3, 5] = -INF  # both infinite
    policy[4, :-1] = reference[4, :-1] = -INF  # one token left
    check_against_the_oracle(policy, reference, backend, temperature)


def test_disjoint_supports(backend: str) -> None:
    policy, reference = torch.randn(2, 2, 40)
    policy[:, :20] = -INF
    reference[:, 20:] = -INF
    check_against_the_oracle(policy, reference, backend)


def with_finite_masks() -> tuple[Tensor, Tensor]:
    """Rows of which the first has them, on a token that the other thinks likely."""
    masked, other = torch.randn(2, 4, 50)
    masked[:, 7] = torch.tensor([-1e4, -1e9, -1e30, torch.finfo(torch.float32).min])
    other[:, 7] = 2.0
    return masked, other


def test_finite_masks_of_the_policy(backend: str) -> None:
    """A jsd was above log 2: the policy's mass was a rest of 1e37."""
    policy, reference = with_finite_masks()
    for kind in (*cases.KINDS, "jsd", "tvd"):
        check_against_the_reference_backend(policy, reference, kind, backend)


def test_finite_masks_of_the_reference(backend: str) -> None:
    reference, policy = with_finite_masks()
    for kind in (*cases.KINDS, "jsd", "tvd"):
        check_against_the_reference_backend(policy, reference, kind, backend)


def test_a_finite_mask_before_likelier_tokens(backend: str) -> None:
    """Sums in which it stands are moved to another centre."""
    policy, reference = torch.randn(2, 1, 1300)
    for token, logit in ((5, 5.0), (700, 8.0), (900, 7.0)):
        policy[:, token] = reference[:, token] = logit
    policy[:, 5] = -1e30
    policy[:, 700] += 0.4
    check_against_the_reference_backend(policy, reference, "reverse_kl", backend)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("bad", ["nan", "inf", "nothing"])
@pytest.mark.parametrize("side", ["policy", "reference", "both"])
def test_a_bad_row_is_nan_and_stays_alone(
    backend: str, side: str, bad: str, dtype: torch.dtype
) -> None:
    policy, reference = torch.randn(2, 4, 1500).to(dtype)
    clean = {kind: run(policy, reference, kind, backend) for kind in cases.KINDS}
    for t in {"policy": [policy], "reference": [reference], "both": [policy, reference]}[side]:
        if bad == "nothing":
            t[2] = -INF
        else:
            t[2, 1033] = NAN if bad == "nan" else INF
    for kind in cases.KINDS:
        found = run(policy, reference, kind, backend)
        for dirty, before in zip(found, clean[kind], strict=True):
            assert bool(dirty[2].isnan().all())
            others = torch.tensor([0, 1, 3])
            assert torch.equal(dirty[others], before[others])


@pytest.mark.parametrize("bad", [NAN, INF, None])
def test_a_bad_row_of_one_distribution(backend: str, bad: float | None) -> None:
    logits = torch.randn(3, 300)
    if bad is None:
        logits[1] = -INF
    else:
        logits[1, 7] = bad
    ids = torch.full((3, 2), 5)
    for function in (
        fusedkl.entropy,
        fusedkl.logsumexp,
        lambda z, backend: fusedkl.selective_log_softmax(z, ids, backend=backend),
        fusedkl.log_softmax,
    ):
        leaf = logits.clone().requires_grad_()
        value = function(leaf, backend=backend)
        assert bool(value[1].isnan().all()) and bool(value[[0, 2]].isfinite().all())
        value.sum().backward()
        assert bool(leaf.grad[1].isnan().any()) and bool(leaf.grad[[0, 2]].isfinite().all())


def test_a_token_outside_the_support(backend: str) -> None:
    logits = torch.randn(2, 9)
    logits[:, 4] = -INF
    leaf = logits.clone().requires_grad_()
    value = fusedkl.selective_log_softmax(leaf, torch.tensor([4, 3]), backend=backend)
    assert value[0] == -INF and bool(value[1].isfinite())
    value[1].backward()
    assert leaf.grad[1, 4] == 0 and torch.equal(leaf.grad[0], torch.zeros(9))
    entropy = fusedkl.entropy(leaf, backend=backend)
    true = oracle.fields(logits)["entropy"]
    assert oracle.relative_error(entropy, true) < 1e-6


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_masked_rows_are_exactly_zero_whatever_they_hold(
    backend: str, dtype: torch.dtype, kind: str
) -> None:
    policy, reference = torch.randn(2, 6, 700).to(dtype)
    mask = torch.tensor([True, False, True, False, False, True])
    before = run(policy, reference, kind, backend, mask=mask)
    policy[1, 3], reference[3] = NAN, -INF
    policy[4, 5], reference[4, 6] = INF, NAN
    for options in (
        {"mask": mask},
        {"labels": torch.where(mask, 7, -100)},
        {"weight": mask.float()},
    ):
        found = run(policy, reference, kind, backend, **options)
        for dirty, clean in zip(found, before, strict=True):
            assert torch.equal(dirty[~mask], torch.zeros_like(dirty[~mask]))
            assert torch.equal(dirty[mask], clean[mask])
        for reduction in ("sum", "mean", "batchmean"):
            total, gx, gy = run(policy, reference, kind, backend, reduction=reduction, **options)
            assert bool(total.isfinite()) and bool(gx.isfinite().all() and gy.isfinite().all())
            assert not gx[~mask].any() and not gy[~mask].any()


@pytest.mark.parametrize("kind", cases.KINDS)
def test_zero_upstream_gradient_silences_any_row(backend: str, kind: str) -> None:
    policy, reference = torch.randn(2, 4, 64)
    policy[1, 3] = NAN
    policy[2, 3] = -INF  # an infinite forward KL
    leaf, other = policy.clone().requires_grad_(), reference.clone().requires_grad_()
    value = fusedkl.divergence(leaf, other, kind, backend=backend)
    value.backward(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    for gradient in (leaf.grad, other.grad):
        assert torch.equal(gradient[1:], torch.zeros(3, 64))
        assert bool(gradient[0].isfinite().all()) and bool(gradient[0].any())


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_vocabulary_of_one(backend: str, dtype: torch.dtype) -> None:
    policy, reference = torch.randn(2, 3, 1).to(dtype)
    for kind in cases.KINDS:
        for result in run(policy, reference, kind, backend, temperature=0.7):
            assert torch.equal(result, torch.zeros_like(result))
    leaf = policy.clone().requires_grad_()
    assert torch.equal(fusedkl.entropy(leaf, backend=backend), torch.zeros(3).to(leaf.dtype))
    found = fusedkl.selective_log_softmax(leaf, torch.zeros(3, dtype=torch.long), backend=backend)
    assert not found.any()


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (0, 3, 8)])
def test_no_rows(backend: str, shape: tuple[int, ...]) -> None:
    policy, reference = torch.randn(2, *shape)
    for kind in cases.KINDS:
        for reduction in ("none", "sum", "mean", "batchmean"):
            value, gx, gy = run(policy, reference, kind, backend, reduction=reduction)
            assert value.shape == (shape[:-1] if reduction == "none" else ())
            assert not value.any() and gx.shape == gy.shape == shape
    for inplace in (True, False):
        leaf = policy.clone().requires_grad_()
        fusedkl.forward_kl(
            leaf * 1, reference, inplace_grad=inplace, backend=backend
        ).sum().backward()
        assert leaf.grad.shape == shape
    assert fusedkl.entropy(policy, backend=backend).shape == shape[:-1]
    assert fusedkl.log_softmax(policy, backend=backend).shape == shape
    index = torch.zeros((*shape[:-1], 3), dtype=torch.long)
    assert fusedkl.selective_log_softmax(policy, index, backend=backend).shape == index.shape


def test_no_rows_and_a_strided_gradient(backend: str) -> None:
    """contiguous() leaves an empty tensor its strides, which kernels refuse; found by fuzzing."""
    leaf = torch.randn(0, 0, 2, 2, requires_grad=True)
    value = fusedkl.log_softmax(leaf, 2, backend=backend)
    (found,) = torch.autograd.grad(value, leaf, torch.ones(0, 0, 2, 2))
    assert found.shape == leaf.shape


def test_no_token_ids(backend: str) -> None:
    leaf = torch.randn(3, 8, requires_grad=True)
    found = fusedkl.selective_log_softmax(
        leaf, torch.zeros((3, 0), dtype=torch.long), backend=backend
    )
    assert found.shape == (3, 0)
    found.sum().backward()
    assert torch.equal(leaf.grad, torch.zeros(3, 8))


def test_one_row_without_a_batch(backend: str) -> None:
    policy, reference = torch.randn(2, 50)
    value, gx, gy = run(policy, reference, "forward_kl", backend, temperature=torch.tensor(2.0))
    batched = run(policy[None], reference[None], "forward_kl", backend, temperature=2.0)
    assert value.shape == () and gx.shape == gy.shape == (50,)
    for a, b in zip((value, gx, gy), batched, strict=True):
        assert torch.equal(a, b[0])
    for reduction in ("sum", "mean"):
        assert run(policy, reference, "forward_kl", backend, reduction=reduction)[0] > 0
    assert fusedkl.selective_log_softmax(policy, torch.tensor(3), backend=backend).shape == ()


def test_extreme_logits(backend: str) -> None:
    """Beyond what float32 can subtract; supports come from the logits, never from exp."""
    biggest = torch.finfo(torch.float32).max
    policy = torch.tensor([[biggest, 0.0, -biggest], [1e38, -1e38, 3.0], [200.0, 0.0, -200.0]])
    reference = torch.tensor([[biggest, 1.0, -biggest], [1e38, 1e38, 3.0], [200.0, 0.0, 0.0]])
    check_against_the_oracle(policy[2:], reference[2:], backend)
    for kind in ("forward_kl", "reverse_kl"):
        value, gx, gy = run(policy, reference, kind, backend)
        assert value[0] == 0
        assert bool(gx[:1].isfinite().all()) and bool(gy[:1].isfinite().all())
    # q is 1/2 on a token where p is exp(-2e38), not 0: finite in exact arithmetic, 1e38 nats
    forward = run(policy, reference, "forward_kl", backend)[0][1]
    assert oracle.relative_error(forward, torch.tensor(1e38)) < 1e-5
    # p = 0 there: KL(p || q) = log 2
    reverse = run(policy, reference, "reverse_kl", backend)[0][1]
    assert abs(float(reverse) - math.log(2)) < 1e-6


def test_underflow_is_not_lack_of_support(backend: str) -> None:
    # q underflows in float32, yet the value is 200: torch.distributions answers inf.
    policy, reference = torch.tensor([[0.0, -400.0]]), torch.tensor([[-200.0, 0.0]])
    check_against_the_oracle(policy, reference, backend)
    check_against_the_oracle(reference, policy, backend)


@pytest.mark.parametrize("temperature", [1e-3, 1e3])
def test_extreme_temperatures(backend: str, temperature: float) -> None:
    policy, reference = torch.randn(2, 3, 30)
    check_against_the_oracle(policy, reference, backend, temperature)


def test_offsets_do_not_matter(backend: str) -> None:
    """Rows shifted by what a float32 logit can hold exactly: the same numbers."""
    policy, reference = torch.randint(-40, 40, (2, 4, 999)) / 16
    for kind in cases.KINDS:
        plain = run(policy, reference, kind, backend)
        for a, b in ((1e4, 0.0), (-1e4, 1e4), (2.0**16, -(2.0**16))):
            shifted = run(policy + a, reference + b, kind, backend)
            for found, expected in zip(shifted, plain, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_values_survive_a_strided_and_unaligned_slice(backend: str) -> None:
    memory = torch.randn(4, 6, 132)
    policy, reference = memory[:, :-1, 1:], memory[:, 1:, :-1]
    for kind in cases.KINDS:
        found = run(policy, reference, kind, backend)
        expected = run(policy.contiguous(), reference.contiguous(), kind, backend)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
