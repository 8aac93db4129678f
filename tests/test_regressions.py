"""Rows on which earlier schemes for the row sums gave wrong numbers, each by what went wrong.

Found by fuzzing. Long rows, so the truth is the reference backend in float64, which other tests
hold to 60 digits; the wrong result that was once seen is in each docstring.
"""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from torch import Tensor

import fusedkl

KINDS = ["forward_kl", "reverse_kl", "jeffreys"]
# Two and a piece of the blocks that sums are made of; then two segments, which are merged.
WIDTHS = [5000, 70_001]
widths = pytest.mark.parametrize("width", WIDTHS)
inf = torch.inf
pytestmark = pytest.mark.slow


def results(policy: Tensor, reference: Tensor, kind: str, backend: str) -> list[Tensor]:
    x, y = policy.clone().requires_grad_(), reference.clone().requires_grad_()
    value = fusedkl.divergence(x, y, kind, backend=backend)
    value.sum().backward()
    assert x.grad is not None and y.grad is not None
    return [value.detach(), x.grad, y.grad]


def check(policy: Tensor, reference: Tensor, backend: str, dtype: torch.dtype) -> list[Tensor]:
    """Both directions, both orders of the vocabulary: where a mass comes first matters most."""
    policy, reference = policy.to(dtype)[None], reference.to(dtype)[None]
    truth: list[Tensor] = []
    for kind in KINDS:
        true = results(policy.double(), reference.double(), kind, "reference")
        truth.append(true[0])
        flipped = results(policy.flip(-1), reference.flip(-1), kind, backend)
        found = results(policy, reference, kind, backend)
        for numbers in (found, [flipped[0], *(g.flip(-1) for g in flipped[1:])]):
            assert float(numbers[0]) >= 0
            error = oracle.relative_error(numbers[0], true[0], 1e-12)
            assert error <= 1e-5, f"{kind}: {error:.1e}"
            if float(true[0]) < 1e-12:  # nothing is promised
                continue
            for gradient, exact in zip(numbers[1:], true[1:], strict=True):
                # Of a gradient that cancels to 1e-7 of its divergence, float32 keeps less.
                floor = max(1e-9, 1e-7 * float(true[0]))
                error = oracle.relative_l2(gradient, exact, floor)
                assert error <= oracle.GRADIENT_TOLERANCE[dtype], f"d {kind}: {error:.1e}"
    return truth


both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@both_dtypes
@widths
@pytest.mark.parametrize("gap", [-28.0, 28.0])
@pytest.mark.parametrize("lift", [-12.0, 0.0, 12.0])
def test_centre_moved_by_a_large_step(
    backend: str, lift: float, gap: float, width: int, dtype: torch.dtype
) -> None:
    """Recentring by t = 28 as B + expm1(-t) B loses e^-28: 2e-4."""
    reference = torch.randn(width)
    policy = reference + 0.01 * torch.randn(width)
    policy[width // 2 :] += gap
    reference[width // 2 :] += lift
    check(policy, reference, backend, dtype)


@both_dtypes
@widths
def test_policy_mass_on_far_tokens(backend: str, width: int, dtype: torch.dtype) -> None:
    """u = 1000 where the reference is -1000: through its rounded exponent, 4e-5."""
    reference = torch.randn(width)
    policy = reference + 0.1 * torch.randn(width)
    far = torch.tensor([3, width // 2, width - 2])
    reference[far] = -1000.0
    policy[far] = torch.tensor([0.3, 5.0, -3.0])
    check(policy, reference, backend, dtype)
    policy[far] = torch.tensor([9.3, 12.0, 11.0])  # most of the mass
    check(policy, reference, backend, dtype)


@widths
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_policy_mass_outside_the_support_at_an_offset(
    backend: str, offset: float, width: int
) -> None:
    """y = -inf with offset 1e4: 2e-4."""
    reference = torch.randn(width)
    policy = reference + 0.1 * torch.randn(width) + offset
    far = torch.tensor([3, width // 2, width - 2])
    reference[far] = -inf
    policy[far] += 8.0
    check(policy, reference, backend, torch.float32)


@widths
@pytest.mark.parametrize("mass", [5.0, 20.0])
def test_rounding_of_differences_beside_a_huge_mass(backend: str, mass: float, width: int) -> None:
    """Exact differences were dropped where the sum B, not the KL, said that they do not matter:
    it counted a huge policy mass (1.6e-5)."""
    reference = torch.randn(width) + 1e4
    policy = reference - 1e4 + 1e-3 * torch.randn(width)
    check(policy, reference, backend, torch.float32)
    policy[7] += mass
    check(policy, reference, backend, torch.float32)


@both_dtypes
@widths
@pytest.mark.parametrize("drop", [12.0, 40.0, 1000.0, inf])
def test_reverse_where_forward_is_large(
    backend: str, drop: float, width: int, dtype: torch.dtype
) -> None:
    """The reference's top token removed from the policy: one centre cannot serve both (4e-5);
    with x = -inf, an early return for forward = +inf skipped the check of reverse."""
    for noise in (1e-3, 0.1):
        for top in (8.0, 20.0):
            policy = torch.randn(width)
            reference = policy + noise * torch.randn(width)
            reference[width // 3] += top
            policy[width // 3] += -inf if drop == inf else top - drop
            if drop != inf:
                check(policy, reference, backend, dtype)
                continue
            x, y = policy.to(dtype)[None], reference.to(dtype)[None]
            forward = fusedkl.forward_kl(x, y, backend=backend)
            reverse = fusedkl.reverse_kl(x, y, backend=backend)
            true = fusedkl.reverse_kl(x.double(), y.double(), backend="reference")
            assert float(forward) == inf
            assert oracle.relative_error(reverse, true) <= 1e-5


@widths
@pytest.mark.parametrize("power", [-1, 1])
def test_offset_larger_than_the_differences(backend: str, power: int, width: int) -> None:
    """A centre of one float cannot be right to 1e-4 at 1e4: 13% of a small KL. One token moved
    by the 2^-10 that a float32 at 1e4 can hold, over a base of multiples of it."""
    base = (torch.randn(width) * 1024).round() / 1024
    for top in (0.0, -4.0):
        reference = base.clone()
        reference[width // 2] = top
        policy = reference + power * 1e4
        policy[width // 2] += 2.0**-10
        assert bool((policy.double() - power * 1e4 != reference.double()).sum() == 1)
        truth = check(policy, reference, backend, torch.float32)
        assert 1e-14 < float(truth[0]) < 1e-9
        # below the promise, where that scheme was first caught
        for kind, true in zip(KINDS[:2], truth, strict=False):
            found = fusedkl.divergence(policy[None], reference[None], kind, backend=backend)
            assert oracle.relative_error(found, true) <= 1e-3


@widths
@pytest.mark.parametrize("first", [8.0, -8.0])
def test_first_token_far_from_the_rest_at_an_offset(backend: str, first: float, width: int) -> None:
    """The first difference, which the centre starts from, off by 8 at an offset of 1e4: 3e-5."""
    reference = torch.randn(width)
    policy = reference + 1e4 + 0.01 * torch.randn(width)
    policy[0] += first
    check(policy, reference, backend, torch.float32)


@pytest.mark.parametrize("width", [8192, 262_144])
def test_equal_terms_do_not_drift(backend: str, width: int) -> None:
    """float32 sums of equal values round alike, 2e-6 after 64 additions."""
    z = torch.full((1, width), 0.7)
    exact = torch.tensor([math.log(width)], dtype=torch.float64)
    assert oracle.relative_error(fusedkl.entropy(z, backend=backend), exact) <= 3e-7
    lse = fusedkl.logsumexp(z, backend=backend)
    assert oracle.relative_error(lse, exact + float(z[0, 0])) <= 3e-7
    for step in (2.0**-10, 2.0**-2):
        moved = z.clone()
        moved[:, ::2] += step
        # both directions of two halves: in closed form
        p = 1 / (1 + math.exp(float(moved[0, 1].double() - moved[0, 0].double())))
        reverse = p * math.log1p(2 * p - 1) + (1 - p) * math.log1p(1 - 2 * p)
        forward = -0.5 * math.log1p(-((2 * p - 1) ** 2))
        found = [fusedkl.divergence(moved, z, kind, backend=backend) for kind in KINDS[:2]]
        for value, true in zip(found, (forward, reverse), strict=True):
            assert abs(float(value) / true - 1) <= 1e-6


@both_dtypes
@widths
@pytest.mark.parametrize("depth", [60.0, 200.0])
def test_reference_mass_where_the_policys_underflows(
    backend: str, depth: float, width: int, dtype: torch.dtype
) -> None:
    """A whole block whose mass underflows in one row and not in the other: 0.43 came as 5e-4."""
    policy = torch.randn(width)
    reference = policy + 0.05 * torch.randn(width)
    block = slice(width // 4, width // 4 + 2500)
    policy[block] -= depth
    reference[block] += 0.5
    check(policy, reference, backend, dtype)
    check(reference, policy, backend, dtype)


@both_dtypes
@widths
@pytest.mark.parametrize("step", [8.0, 15.0, 30.0])
def test_noise_grown_by_a_move_of_the_centre(
    backend: str, step: float, width: int, dtype: torch.dtype
) -> None:
    """Light first blocks far from the rest: e^step times their rounding, 5e-4 came as 8e-2."""
    reference = torch.randn(width)
    policy = reference + 0.03 * torch.randn(width)
    reference[:2100] -= 2 * step
    policy[:2100] -= 2 * step - (step if step < 20 else 0.0)
    check(policy, reference, backend, dtype)
    check(reference, policy, backend, dtype)


@both_dtypes
@widths
@pytest.mark.parametrize("noise", [1e-2, 1.0])
@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
def test_peaked_rows(
    backend: str, where: float, noise: float, width: int, dtype: torch.dtype
) -> None:
    """A centre taken from the blocks before the peak: an error of 100%."""
    reference = 2 * torch.randn(width)
    policy = reference + noise * torch.randn(width)
    peak = int(where * (width - 1))
    for row in (policy, reference):
        row[peak] += 25
    check(policy, reference, backend, dtype)


@both_dtypes
@widths
def test_stairs(backend: str, width: int, dtype: torch.dtype) -> None:
    """Twelve peaks, each higher and further from the centre than all before it."""
    reference = torch.randn(width)
    policy = reference + 0.01 * torch.randn(width)
    for i in range(12):
        at = (i * width) // 12 + 5
        reference[at] = 10.0 + 3 * i
        policy[at] = 10.0 + 3 * i + (-1) ** i * 0.5 * i
    check(policy, reference, backend, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [1, 3])
def test_rows_that_are_constant(backend: str, width: int, dtype: torch.dtype) -> None:
    """A difference that no float holds was rounded in the state and exact in the gradient: 2e-4."""
    rows = [torch.full((1, width), v, dtype=dtype).requires_grad_() for v in (0.0154, 1e4)]
    value = fusedkl.jeffreys(*rows, backend=backend)
    assert float(value.detach()) == 0
    for gradient in torch.autograd.grad(value.sum(), rows):
        assert not gradient.any()


@both_dtypes
@pytest.mark.parametrize("width", [5000, 262_144])
@pytest.mark.parametrize("height", [30.0, 45.0, 60.0])
def test_collapsed_policy(backend: str, height: float, width: int, dtype: torch.dtype) -> None:
    """All mass on one token after a step too long, KL about 43: B - h(A + B) cancelled to 0."""
    reference = 2 * torch.randn(width)
    policy = 2 * torch.randn(width)
    policy[width // 7] = height + math.log(width)
    truth = check(policy, reference, backend, dtype)
    assert float(truth[0]) > 20
