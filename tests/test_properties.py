"""Properties: float64 agrees on rows that hypothesis draws, and the relations of divergences."""

from __future__ import annotations

import math
from collections.abc import Callable

import cases
import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fusedkl
from fusedkl.backends import BACKENDS

WHY_NOT = BACKENDS["cpu"].why_not(torch.device("cpu"))
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
DIRECTIONS = ["forward_kl", "reverse_kl"]
# Parts of vectors, blocks and segments of every dtype, and what lies beside them.
WIDTHS = [1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 65, 127, 500, 2047, 2048, 2049, 4097, 6001]


def bounded(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The same examples in every run: a failure is a change of the code, never bad luck."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


def kl(policy: Tensor, reference: Tensor, kind: str, **options: object) -> Tensor:
    return fusedkl.divergence(policy, reference, kind, backend="cpu", **options)


def with_gradients(
    policy: Tensor, reference: Tensor, kind: str, backend: str, **options: object
) -> list[Tensor]:
    x, y = policy.clone().requires_grad_(), reference.clone().requires_grad_()
    value = fusedkl.divergence(x, y, kind, backend=backend, **options)
    value.sum().backward()
    assert x.grad is not None and y.grad is not None
    return [value.detach(), x.grad, y.grad]


@st.composite
def rows(draw: st.DrawFn, widths: list[int] = WIDTHS, largest: float = 6.0) -> list[Tensor]:
    """Policy and reference [N, V], their dtypes, peaks, offsets, outliers and -inf drawn."""
    width, n = draw(st.sampled_from(widths)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    policy = draw(st.sampled_from([0.01, 1.0, 3.0, 10.0])) * normal(n, width)
    sigma = 10 ** draw(st.floats(-5, math.log10(largest)))
    reference = policy + sigma * normal(n, width)
    both = [policy, reference]
    if draw(st.booleans()):  # peaks, the same or not
        where = draw(st.integers(0, width - 1))
        policy[:, where] += draw(st.sampled_from([10.0, 30.0]))
        reference[:, draw(st.sampled_from([where, where, width - 1]))] += 10.0
    if draw(st.booleans()):  # tokens far from where they were
        far = draw(st.integers(0, width - 1))
        both[draw(st.integers(0, 1))][:, far] += draw(st.sampled_from([-30.0, -5.0, 40.0, 100.0]))
    holes = torch.rand(n, width, generator=generator) < draw(st.sampled_from([0.0, 0.0, 0.1, 0.9]))
    holes[:, draw(st.integers(0, width - 1))] = False
    for tensor in draw(st.sampled_from([both, both, both[:1], both[1:]])):
        tensor[holes] = -torch.inf
    for tensor in both:
        tensor += draw(st.sampled_from([0.0, 0.0, 0.3, 1e4, -3e3]))
    dtypes = draw(
        st.sampled_from(
            [(d, d) for d in cases.DTYPES] + [(cases.DTYPES[0], d) for d in cases.DTYPES]
        )
    )
    return [tensor.to(dtype) for tensor, dtype in zip(both, dtypes, strict=True)]


def check_against_float64(found: list[Tensor], true: list[Tensor], offset: float = 0.0) -> None:
    value, exact = found[0], true[0]
    assert bool((value >= 0).all()) and torch.equal(value.isinf(), exact.isinf())
    # Under 1e-12 the promise is silent; a value there must be small all the same.
    assert oracle.relative_error(value, exact, 1e-12) <= 1e-5
    finite = exact >= 1e-12
    for a, b in zip(found[1:], true[1:], strict=True):
        limit = oracle.GRADIENT_TOLERANCE[a.dtype]
        if a.dtype == torch.float16:  # without a loss scale its small elements are lost
            spacing = 2.0**-25 * math.sqrt(a.shape[-1])
            error = (a.double() - b.double()).norm(dim=-1)
            assert bool((error <= limit * b.double().norm(dim=-1) + spacing).all())
        else:
            # A gradient that nearly cancels is as right as float64 holds what it came from: the
            # value, and logits of size `offset`; and as two floats hold the mean of the
            # differences that it is compared with, which may be an offset of one row alone.
            floor = max(64, offset) * 2.0**-48 + 8 * torch.finfo(torch.float64).eps * offset
            scaled = [g[finite] / (1 + exact[finite, None]) for g in (a.double(), b)]
            assert oracle.relative_l2(*scaled, floor / limit) <= limit


def agrees(policy: Tensor, reference: Tensor, kind: str, **options: object) -> None:
    found = with_gradients(policy, reference, kind, "cpu", **options)
    true = with_gradients(policy.double(), reference.double(), kind, "reference", **options)
    logits = torch.cat([policy.double().flatten(), reference.double().flatten()])
    temperature = float(options.get("temperature", 1.0))  # type: ignore[arg-type]
    offset = float(torch.where(logits.isfinite(), logits.abs(), 0).max()) / temperature
    check_against_float64(found, true, offset)


@pytest.mark.slow
@bounded(120)
@given(pair=rows(), kind=st.sampled_from(cases.KINDS), temperature=st.sampled_from([1.0, 0.6, 3.0]))
def test_float64_agrees(pair: list[Tensor], kind: str, temperature: float) -> None:
    agrees(*pair, kind, temperature=temperature)


@pytest.mark.full
@bounded(2000)
@given(pair=rows(), kind=st.sampled_from(cases.KINDS), temperature=st.sampled_from([1.0, 0.6, 3.0]))
def test_float64_agrees_on_many(pair: list[Tensor], kind: str, temperature: float) -> None:
    agrees(*pair, kind, temperature=temperature)


@bounded(25)
@given(pair=rows(widths=[1, 2, 5, 16, 17, 33]), kind=st.sampled_from(cases.KINDS))
def test_sixty_digits_agree(pair: list[Tensor], kind: str) -> None:
    true = oracle.fields(*pair)
    exact = [true[kind], true[f"d_{kind}"], true[f"d_{kind}_reference"]]
    check_against_float64(with_gradients(*pair, kind, "cpu"), exact)


def small(dtype: torch.dtype = torch.float32, sigma: float = 0.3) -> tuple[Tensor, Tensor]:
    """Multiples of 1/64 below 16: sums with such numbers are exact in float32."""
    policy = (64 * torch.randn(4, 1031)).round() / 64
    reference = policy + (64 * sigma * torch.randn(4, 1031)).round() / 64
    return policy.to(dtype), reference.to(dtype)


def near(actual: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    error = oracle.relative_error(actual, expected.detach())
    assert error <= tolerance, f"relative error {error:.1e}"


SIGMAS = [0.02, 0.3, 2.0]


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_shifts_do_not_matter(kind: str, sigma: float) -> None:
    policy, reference = small(sigma=sigma)
    value = kl(policy, reference, kind)
    for a, b in ((8.0, 0.0), (-0.25, 4.0), (1024.0, -512.0), (0.0, 2.0**14)):
        near(kl(policy + a, reference + b, kind), value)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("sigma", SIGMAS)
def test_directions_swap(sigma: float, temperature: float) -> None:
    policy, reference = small(sigma=sigma)
    forward = with_gradients(policy, reference, "forward_kl", "cpu", temperature=temperature)
    reverse = with_gradients(reference, policy, "reverse_kl", "cpu", temperature=temperature)
    near(forward[0], reverse[0])
    for a, b in ((forward[1], reverse[2]), (forward[2], reverse[1])):
        assert oracle.relative_l2(a, b) <= 2e-6
    both = kl(policy, reference, "jeffreys", temperature=temperature)
    near(both, kl(reference, policy, "jeffreys", temperature=temperature))


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_order_does_not_matter(kind: str, sigma: float) -> None:
    policy, reference = small(sigma=sigma)
    value, gx, gy = with_gradients(policy, reference, kind, "cpu")
    sort = policy[0].argsort()
    for order in (torch.randperm(1031), sort, sort.flip(0), torch.arange(1031).flip(0)):
        moved = with_gradients(policy[:, order], reference[:, order], kind, "cpu")
        near(moved[0], value)
        assert oracle.relative_l2(moved[1], gx[:, order]) <= 2e-6
        assert oracle.relative_l2(moved[2], gy[:, order]) <= 2e-6


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_tokens_outside_both_supports_do_not_matter(dtype: torch.dtype, kind: str) -> None:
    policy, reference = small(dtype)
    value, gx, gy = with_gradients(policy, reference, kind, "cpu")
    for ahead, behind in ((0, 1), (0, 5000), (3, 0), (4096, 7)):
        wide = [torch.full((4, ahead + 1031 + behind), -torch.inf, dtype=dtype) for _ in range(2)]
        inside = slice(ahead, ahead + 1031)
        wide[0][:, inside], wide[1][:, inside] = policy, reference
        found = with_gradients(wide[0], wide[1], kind, "cpu")
        near(found[0], value)
        for a, b in zip(found[1:], (gx, gy), strict=True):
            # one unit of the store where the sums were rounded apart
            assert oracle.relative_l2(a[:, inside], b) <= oracle.GRADIENT_TOLERANCE[dtype]
            outside = a.clone()
            outside[:, inside] = 0
            assert torch.equal(outside, torch.zeros_like(outside))


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_duplicated_tokens_share_their_mass(kind: str, sigma: float) -> None:
    policy, reference = small(sigma=sigma)
    value, gx, _ = with_gradients(policy, reference, kind, "cpu")
    for copies in (2, 5):
        doubled = with_gradients(policy.repeat(1, copies), reference.repeat(1, copies), kind, "cpu")
        near(doubled[0], value)
        assert oracle.relative_l2(copies * doubled[1][:, :1031], gx) <= 2e-6


@pytest.mark.parametrize("sigma", [0.02, 0.3, 2.0, 8.0])
@pytest.mark.parametrize("kind", cases.KINDS)
def test_merging_tokens_never_adds(kind: str, sigma: float) -> None:
    policy = 2 * torch.randn(4, 1024)
    reference = policy + sigma * torch.randn(4, 1024)
    last = kl(policy, reference, kind)
    for _ in range(10):  # down to one token
        policy, reference = (
            t.double().view(4, -1, 2).logsumexp(-1).float() for t in (policy, reference)
        )
        value = kl(policy, reference, kind)
        # float32 logits move a small KL by their own rounding
        assert bool((value <= last * (1 + 1e-5) + 1e-8).all())
        last = value
    assert torch.equal(last, torch.zeros(4))


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("sigma", SIGMAS)
def test_chain_rule_of_independent_parts(kind: str, sigma: float) -> None:
    """Logits x_i + x'_j on the product of two vocabularies: the divergences add."""
    parts = [[(64 * t).round() / 64 for t in torch.randn(2, n)] for n in (64, 96)]
    parts = [[x, x + (64 * sigma * (y - x)).round() / 64] for x, y in parts]
    product = [(a[:, None] + b[None, :]).flatten()[None] for a, b in zip(*parts, strict=True)]
    total = sum(kl(x[None], y[None], kind).double() for x, y in parts)
    assert isinstance(total, Tensor)
    near(kl(product[0], product[1], kind), total)


@pytest.mark.parametrize("kind", cases.KINDS)
def test_small_moves_cost_their_quadratic_form(kind: str) -> None:
    """KL(z, z + t v) / t^2 -> v' (diag p - p p') v / 2, twice that for jeffreys; by float64."""
    logits, move = torch.randn(2, 4, 999, dtype=torch.float64)
    p = logits.softmax(-1)
    form = ((p * move**2).sum(-1) - (p * move).sum(-1) ** 2) / 2 * (1 + (kind == "jeffreys"))
    for t in (1e-3, 1e-5, 1e-6):
        near(kl(logits + t * move, logits, kind) / t**2, form, 4 * t + 1e-8)
    for exponent in (-6, -10, -14):  # exact in float32
        t = 2.0**exponent
        coarse = (logits * 256).round() / 256
        step = move.sign() * (torch.rand(4, 999) < 0.5)
        p = coarse.softmax(-1)
        form = ((p * step**2).sum(-1) - (p * step).sum(-1) ** 2) / 2 * (1 + (kind == "jeffreys"))
        found = kl((coarse + t * step).float(), coarse.float(), kind)
        near(found / t**2, form, 4 * t + 1e-6)


@bounded(40)
@given(pair=rows(largest=3.0), kind=st.sampled_from(cases.KINDS))
def test_gradients_of_a_row_sum_to_zero(pair: list[Tensor], kind: str) -> None:
    _, *gradients = with_gradients(*pair, kind, "cpu")
    for gradient in gradients:
        if gradient.dtype in (torch.float32, torch.float64):
            total, size = gradient.double().sum(-1), gradient.double().abs().sum(-1)
            assert bool((total.abs() <= 1e-5 * size + 1e-15).all())


@pytest.mark.parametrize("temperature", [0.25, 2.0, 8.0])
@pytest.mark.parametrize("kind", cases.KINDS)
def test_temperature_divides_the_logits(kind: str, temperature: float) -> None:
    policy, reference = small()
    found = with_gradients(policy, reference, kind, "cpu", temperature=temperature)
    plain = with_gradients(policy / temperature, reference / temperature, kind, "cpu")
    near(found[0], plain[0])
    for a, b in zip(found[1:], plain[1:], strict=True):
        assert oracle.relative_l2(temperature * a, b) <= 2e-6


@bounded(60)
@given(pair=rows(widths=[2, 7, 33, 500, 2049], largest=4.0))
def test_inequalities(pair: list[Tensor]) -> None:
    """Pinsker: TVD <= sqrt(KL / 2); Bretagnolle and Huber: TVD <= sqrt(1 - exp(-KL))."""
    p, q = (t.double().softmax(-1) for t in pair)
    distance = (p - q).abs().sum(-1) / 2
    values = [kl(*pair, kind).double() for kind in DIRECTIONS]
    for value in values:
        slack = 1e-7 + 1e-5 * distance
        assert bool((distance <= (value / 2).sqrt() + slack).all())
        assert bool((distance <= (-torch.expm1(-value)).sqrt() + slack).all())
    near(
        kl(*pair, "jeffreys"),
        values[0] + values[1],
        1e-5 if min(map(torch.min, values)) > 1e-12 else torch.inf,
    )


@pytest.mark.parametrize("kind", cases.KINDS)
def test_gradient_is_the_slope(kind: str) -> None:
    """Euler: the value's change along any direction, by central differences in float64."""
    policy, reference, along = torch.randn(3, 2, 700, dtype=torch.float64)
    _, gx, gy = with_gradients(policy, reference, kind, "cpu")
    t = 1e-5
    for gradient, dx, dy in ((gx, t * along, 0.0), (gy, 0.0, t * along)):
        change = kl(policy + dx, reference + dy, kind) - kl(policy - dx, reference - dy, kind)
        near(change / (2 * t), (gradient * along).sum(-1), 1e-6)
