"""JSD, skewed KL, Renyi, total variation and Hellinger against 60-digit arithmetic."""

from __future__ import annotations

import functools
import math

import cases
import oracle
import pytest
import torch
from family_oracle import FAMILY, truth
from torch import Tensor

import fusedkl

SMALLEST = 1e-12
SCENARIOS = [
    "flat 1e-6",
    "flat 1e-3",
    "flat 1",
    "flat 8",
    "peaked 1e-2",
    "peaked 2",
    "one token 4",
    "offset 1e-2",
    "masked 2",
    "policy hole",
    "reference hole",
]


@functools.cache
def true(scenario: str, dtype: torch.dtype, temperature: str) -> dict[str, tuple[Tensor, ...]]:
    return truth(*cases.make(scenario, dtype), cases.TEMPERATURES[temperature])


def run(
    policy: Tensor, reference: Tensor, name: str, *, upstream: float = 1.0, **options: object
) -> tuple[Tensor, ...]:
    """The value, and gradients to both of its sum, `upstream` times."""
    kind, parameter = FAMILY[name]
    x, y = policy.clone().requires_grad_(), reference.clone().requires_grad_()
    value = fusedkl.divergence(x, y, kind, **parameter, **options)
    return value.detach(), *torch.autograd.grad(upstream * value.sum(), (x, y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("temperature", ["T=1", pytest.param("T per row", marks=pytest.mark.slow)])
def test_values_and_gradients(
    backend: str, scenario: str, dtype: torch.dtype, temperature: str
) -> None:
    policy, reference = cases.make(scenario, dtype)
    options = {"temperature": cases.TEMPERATURES[temperature], "backend": backend}
    wrong = []
    for name, (value, gx, gy) in true(scenario, dtype, temperature).items():
        found = run(policy, reference, name, **options)
        assert bool((found[0] >= 0).all()), name
        error = oracle.relative_error(found[0], value, SMALLEST)
        if not error <= oracle.VALUE_TOLERANCE[found[0].dtype]:
            wrong.append(f"{name}: value {error:.1e}")
        rows = (value >= SMALLEST) & value.isfinite()
        for part, gradient, side in zip(found[1:], (gx, gy), "xy", strict=True):
            error = oracle.relative_l2(part[rows], gradient[rows])
            # docs/numerics.md, "Parameters near the ends of their range"
            slack = 2 if backend == "triton" and name == "skew_kl 0.7" else 1
            if not error <= slack * oracle.GRADIENT_TOLERANCE[dtype]:
                wrong.append(f"{name}: d{side} {error:.1e}")
            infinite = value == math.inf
            torch.testing.assert_close(
                part[infinite].double(), gradient[infinite], rtol=4e-3, atol=1e-6
            )
    assert not wrong, wrong


def test_the_ends_of_a_parameter_are_the_divergence_they_stand_for(backend: str) -> None:
    policy, reference = torch.randn(2, 3, 400)
    for found, limit in (
        (fusedkl.jsd(policy, reference, beta=0.0, backend=backend), "forward_kl"),
        (fusedkl.jsd(policy, reference, beta=1.0, backend=backend), "reverse_kl"),
        (fusedkl.renyi(policy, reference, alpha=1.0, backend=backend), "forward_kl"),
    ):
        assert torch.equal(found, fusedkl.divergence(policy, reference, limit, backend=backend))


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_equal_rows_are_exactly_zero(backend: str, name: str, dtype: torch.dtype) -> None:
    logits = (torch.randint(-64, 64, (2, 1031)) / 8).to(dtype)
    for shift in (0.0, 8.0):
        for part in run(logits + shift, logits, name, backend=backend):
            assert torch.equal(part, torch.zeros_like(part))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_rows_agree_with_the_reference_backend(backend: str, dtype: torch.dtype) -> None:
    """Lengths around vectors, blocks and segments; rows near, far, and both in one."""
    for width in (1, 31, 4097, 70_001):
        policy = (3 * torch.randn(3, width)).to(dtype)
        noise = torch.randn(3, width) * torch.tensor([[0.05], [0.6], [4.0]])
        noise[0, ::97] *= 40
        reference = (policy.double() + noise).to(dtype)
        for name in FAMILY:
            found = run(policy, reference, name, backend=backend)
            true = run(policy.double(), reference.double(), name, backend="reference")
            assert oracle.relative_error(found[0], true[0], SMALLEST) <= 1e-5, name
            for a, b in zip(found[1:], true[1:], strict=True):
                error = oracle.relative_l2(a, b, 1e-12)
                assert error <= oracle.GRADIENT_TOLERANCE[dtype], f"{name} {width}: {error:.1e}"


@pytest.mark.parametrize("mass", [0.0, 0.6, 0.97])
def test_mixtures_of_near_and_far_tokens(backend: str, mass: float) -> None:
    """Whole warps of each kind, some with absent tokens, and with more or less on the top token."""
    policy = torch.randn(4, 2600)
    reference = policy + torch.randn(4, 2600) * torch.tensor([[0.2], [0.7], [2.0], [6.0]])
    policy[:, 700:710] = reference[:, 700:710] = -math.inf
    if mass:
        for rows in (policy, reference):
            rest = torch.cat((rows[:, :9], rows[:, 10:]), -1).logsumexp(-1)
            rows[:, 9] = rest + math.log(mass / (1 - mass))
    for kind, parameter in (
        *(("jsd", {"beta": beta}) for beta in (0.02, 0.1, 0.3, 0.5, 0.9)),
        *(("skew_kl", {"alpha": alpha}) for alpha in (0.1, 0.5, 0.9)),
    ):
        x, y = policy.clone().requires_grad_(), reference.clone().requires_grad_()
        u, v = policy.double().requires_grad_(), reference.double().requires_grad_()
        found = fusedkl.divergence(x, y, kind, **parameter, backend=backend)
        true = fusedkl.divergence(u, v, kind, **parameter, backend="reference")
        name = f"{kind} {parameter}"
        assert oracle.relative_error(found, true) <= 5e-6, name
        slopes = torch.autograd.grad(found.sum(), (x, y))
        for a, b in zip(slopes, torch.autograd.grad(true.sum(), (u, v)), strict=True):
            assert oracle.relative_l2(a, b) <= 2e-5, name


@pytest.mark.parametrize("order", [0.05, 0.5, 0.95, 1.05, 3.0, 10.0])
def test_renyi_of_any_order(backend: str, order: float) -> None:
    policy = 2 * torch.randn(4, 3000)
    reference = policy + torch.randn(4, 3000) * torch.tensor([[1e-3], [0.1], [1.0], [3.0]])
    x, y = policy.clone().requires_grad_(), reference.clone().requires_grad_()
    value = fusedkl.renyi(x, y, alpha=order, backend=backend)
    u, v = policy.double().requires_grad_(), reference.double().requires_grad_()
    true = fusedkl.renyi(u, v, alpha=order, backend="reference")
    plain = torch.logsumexp(order * v.log_softmax(-1) + (1 - order) * u.log_softmax(-1), -1) / (
        order - 1
    )
    torch.testing.assert_close(true[1:], plain[1:], rtol=1e-6, atol=0)
    assert oracle.relative_error(value, true) <= 1e-5
    found = torch.autograd.grad(value.sum(), (x, y))
    expected = torch.autograd.grad(true.sum(), (u, v))
    for a, b in zip(found, expected, strict=True):
        assert oracle.relative_l2(a, b) <= 2e-5


def test_disjoint_supports(backend: str) -> None:
    policy, reference = torch.randn(2, 2, 40)
    policy[:, :20], reference[:, 20:] = -math.inf, -math.inf
    expected = {
        "jsd 0.5": math.log(2),
        "skew_kl 0.1": -math.log(0.1),
        "renyi 0.5": math.inf,
        "renyi 2": math.inf,
        "tvd": 1.0,
        "hellinger": 1.0,
    }
    for name, value in expected.items():
        found, gx, gy = run(policy, reference, name, backend=backend)
        torch.testing.assert_close(found, torch.full((2,), value), rtol=1e-6, atol=0)
        assert not gx.isnan().any() and not gy.isnan().any()


@pytest.mark.slow
@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_a_bad_row_stays_alone(backend: str, bad: float | None) -> None:
    for width in (300, 70_000):
        policy, reference = torch.randn(2, 3, width)
        clean = {name: run(policy, reference, name, backend=backend) for name in FAMILY}
        if bad is None:
            reference[1] = -math.inf
        else:
            reference[1, 7] = bad
        for name in FAMILY:
            for dirty, before in zip(
                run(policy, reference, name, backend=backend), clean[name], strict=True
            ):
                assert bool(dirty[1].isnan().all()), name
                assert torch.equal(dirty[[0, 2]], before[[0, 2]])


def test_two_rows_without_a_token_are_no_distributions(backend: str) -> None:
    nothing = torch.full((1, 9), -math.inf)
    for name in FAMILY:
        for part in run(nothing, nothing, name, backend=backend):
            assert bool(part.isnan().all()), name


def test_16_bit_rows_far_from_each_other(backend: str) -> None:
    """At 1e4 a float holds a difference to 5e-4; a tvd was 1.4e-3 off, its gradient 0.25."""
    spread = torch.tensor([[0.1], [0.5], [2.0], [4.0]])
    for dtype in (torch.bfloat16, torch.float16):
        policy = (spread * torch.randn(4, 64) + 1e4).to(dtype)
        reference = (spread * torch.randn(4, 64)).to(dtype)
        for name in ("jsd 0.5", "skew_kl 0.7", "renyi 0.5", "tvd", "hellinger"):
            found = run(policy, reference, name, upstream=2.0**12, backend=backend)
            true = run(
                policy.double(), reference.double(), name, upstream=2.0**12, backend="reference"
            )
            assert oracle.relative_error(found[0], true[0]) <= 1e-5, name
            for a, b in zip(found[1:], true[1:], strict=True):
                error = oracle.relative_l2(a, b)
                assert error <= oracle.GRADIENT_TOLERANCE[dtype], f"{name} {dtype}: {error:.1e}"


@pytest.mark.parametrize("name", ["jsd 0.1", "skew_kl 0.7", "renyi 2", "tvd", "hellinger"])
def test_sums_of_slices_are_the_sums_of_the_row(backend: str, name: str) -> None:
    kind, parameter = FAMILY[name]
    number = next(iter(parameter.values()), None)
    op = torch.ops.fusedkl
    policy, reference = torch.randn(2, 3, 5000)
    policy[0, ::3] = reference[0, ::3] = policy[1, 5] = -math.inf
    _, state = op.row_stats(policy, reference, None, ["forward_kl"], *(None,) * 5, backend)
    whole = op.row_sums(policy, reference, state, kind, number, *(None,) * 4, backend)
    parts = [
        op.row_sums(policy[:, s], reference[:, s], state, kind, number, *(None,) * 4, backend)
        for s in (slice(0, 1200), slice(1200, 1201), slice(1201, 5000))
    ]
    rtol = 2e-6 if backend == "triton" else 1e-6
    torch.testing.assert_close(sum(parts), whole, rtol=rtol, atol=1e-9)
    value, _ = op.row_stats(policy, reference, None, [kind], number, *(None,) * 4, backend)
    if kind != "renyi":
        torch.testing.assert_close(whole[:, 0].float(), value[0], rtol=1e-6, atol=1e-9)
    if kind in ("jsd", "skew_kl"):  # the means are those of the slopes: they add up to the value
        torch.testing.assert_close(whole[:, 1] + whole[:, 2], whole[:, 0], rtol=1e-6, atol=1e-9)
    _, own = op.row_stats(policy, reference, None, ["forward_kl"], *(None,) * 5, "reference")
    other = op.row_sums(policy, reference, own, kind, number, *(None,) * 4, "reference")
    torch.testing.assert_close(whole, other, rtol=2e-5, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["jsd 0.1", "skew_kl 0.7", "renyi 0.5", "hellinger"])
def test_double_backward(backend: str, name: str) -> None:
    kind, parameter = FAMILY[name]
    policy, reference = (torch.randn(2, 6, dtype=torch.float64).requires_grad_() for _ in "xy")

    def function(x: Tensor, y: Tensor) -> Tensor:
        return fusedkl.divergence(x, y, kind, **parameter, backend=backend)

    assert torch.autograd.gradcheck(function, (policy, reference))
    assert torch.autograd.gradgradcheck(function, (policy, reference))


def test_inequalities(backend: str) -> None:
    """Pinsker, Bretagnolle-Huber, and the order of the distances."""
    for sigma in (1e-3, 0.1, 1.0, 10.0):
        x = 3 * torch.randn(16, 500, dtype=torch.float64)
        y = x + sigma * torch.randn_like(x)
        kl, tvd = (f(x, y, backend=backend) for f in (fusedkl.forward_kl, fusedkl.tvd))
        h2 = fusedkl.hellinger(x, y, backend=backend)
        jsd = fusedkl.jsd(x, y, backend=backend)
        slack = 1 + 1e-12
        assert bool((tvd <= (kl / 2).sqrt() * slack).all())
        assert bool((tvd <= (-torch.expm1(-kl)).sqrt() * slack).all())
        assert bool((h2 <= tvd * slack).all()) and bool((tvd <= (2 * h2).sqrt() * slack).all())
        assert bool((jsd <= tvd * math.log(2) * slack).all())
        orders = [fusedkl.renyi(x, y, alpha=a, backend=backend) for a in (0.2, 0.5, 0.99)]
        for low, high in zip(orders, [*orders[1:], kl], strict=True):
            assert bool((low <= high * slack).all())


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("jsd", {"beta": -0.1}, "beta of jsd must be from 0 to 1; got -0.1"),
        ("jsd", {"alpha": 0.5}, "alpha=0.5 has no effect"),
        ("skew_kl", {"alpha": 1.0}, "alpha of skew_kl must be greater than 0 and less than 1"),
        ("renyi", {}, "needs alpha"),
        ("renyi", {"alpha": 0.0}, "alpha of renyi must be greater than 0"),
        ("renyi", {"alpha": math.inf}, "alpha of renyi must be"),
        ("tvd", {"beta": 0.5}, "beta=0.5 has no effect"),
        ("forward_kl", {"alpha": 0.5}, "alpha=0.5 has no effect"),
    ],
)
def test_bad_parameters(kind: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fusedkl.divergence(torch.randn(2, 5), torch.randn(2, 5), kind, **options)
    with pytest.raises(TypeError, match="must be a number"):
        fusedkl.jsd(torch.randn(2, 5), torch.randn(2, 5), beta="half")
    with pytest.raises(TypeError, match="no option"):
        fusedkl.TVDLoss(beta=0.5)
    with pytest.raises(ValueError, match="beta of jsd"):
        fusedkl.JSDLoss(beta=2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["jsd 0.1", "skew_kl 0.7", "renyi 2", "tvd", "hellinger"])
def test_gradients_together_with_tokens(backend: str, name: str, dtype: torch.dtype) -> None:
    """One sweep for a divergence, log-probabilities of tokens and their mean."""
    kind, parameter = FAMILY[name]
    number = next(iter(parameter.values()), None)
    policy, reference = (t.to(dtype) for t in torch.randn(2, 3, 90))
    ids = torch.tensor([[3, 50], [7, 7], [89, -1]])
    fields = [kind, "logprob", "logsumexp", "mean_logprob"]
    grad = torch.rand(5, 3, dtype=torch.float64)
    found = []
    for name_, x, y in (
        (backend, policy, reference),
        ("reference", policy.double(), reference.double()),
    ):
        shared = (ids, fields, number, *(None,) * 4, name_)
        values, state = torch.ops.fusedkl.row_stats(x, y, *shared)
        gradients = torch.ops.fusedkl.row_stats_backward(
            grad.to(values.dtype), x, y, ids, state, fields, number, *(None,) * 3, True, True, name_
        )
        found.append((values, *gradients))
    assert oracle.relative_error(found[0][0], found[1][0]) <= 1e-5
    for slope, wanted in zip(found[0][1:], found[1][1:], strict=True):
        assert oracle.relative_l2(slope, wanted) <= oracle.GRADIENT_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_renyi_of_a_policy_that_collapsed_onto_an_unlikely_token(
    backend: str, dtype: torch.dtype
) -> None:
    """The largest logit that a 16-bit row's state knows need not be the row's: 3e-5 off."""
    reference = 3 * torch.randn(8, 20_003)
    policy = reference.clone()
    policy[torch.arange(8), torch.randint(20_003, (8,))] += 40
    policy, reference = policy.to(dtype), reference.to(dtype)
    found = fusedkl.renyi(policy, reference, alpha=0.5, backend=backend)
    true = fusedkl.renyi(policy.double(), reference.double(), alpha=0.5, backend="reference")
    assert oracle.relative_error(found, true, SMALLEST) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [5000, 40_001])
def test_renyi_of_rows_that_hardly_overlap(backend: str, width: int, dtype: torch.dtype) -> None:
    """37 came out as 62: float did not know the log-ratio of rows whose top tokens differ."""
    policy = torch.randn(4, width)
    reference = policy + 0.1 * torch.randn(4, width)
    gap = torch.tensor([10.0, 20.0, 30.0, 40.0])
    policy[:, 7] += gap
    reference[:, 11] += gap
    policy, reference = policy.to(dtype), reference.to(dtype)

    def renyi(x: Tensor, y: Tensor, alpha: float, on: str) -> tuple[Tensor, ...]:
        x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
        value = fusedkl.renyi(x, y, alpha=alpha, backend=on)
        return value.detach(), *torch.autograd.grad(value.sum(), (x, y))

    for alpha in (0.3, 0.5):
        found = renyi(policy, reference, alpha, backend)
        true = renyi(policy.double(), reference.double(), alpha, "reference")
        assert oracle.relative_error(found[0], true[0], SMALLEST) <= 1e-5
        for a, b in zip(found[1:], true[1:], strict=True):
            # what cancels to less than 0.1 is right to 1e-6 only; Triton's log-ratio stays in float
            tolerance = (2 if backend == "triton" else 1) * oracle.GRADIENT_TOLERANCE[dtype]
            assert oracle.relative_l2(a, b, 0.1) <= tolerance


def _against_float64(
    backend: str, x: Tensor, y: Tensor, kind: str, parameter: dict[str, float], temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Errors of a value and of both gradients, against a composition in float64."""
    found = []
    for u, v, on in ((x, y, backend), (x.double(), y.double(), None)):
        u, v = u.clone().requires_grad_(), v.clone().requires_grad_()
        if on is not None:
            options = {"temperature": temperature, "backend": on}
            value = fusedkl.divergence(u, v, kind, **parameter, **options)
        else:
            order = parameter.get("alpha", 0.5)
            log_p, log_q = ((t / temperature).log_softmax(-1) for t in (u, v))
            both = (u != -math.inf) & (v != -math.inf)  # 0 times infinity is the composition's
            tilted = order * log_q.where(both, 0) + (1 - order) * log_p.where(both, 0)
            log_z = tilted.where(both, -math.inf).logsumexp(-1)
            value = -log_z.expm1() if kind == "hellinger" else log_z / (order - 1)
        found.append((value.detach(), *torch.autograd.grad(value.sum(), (u, v))))
    (value, gx, gy), (true, true_x, true_y) = found
    return (
        oracle.relative_error(value, true, SMALLEST),
        oracle.relative_l2(gx, true_x, 0.1),
        oracle.relative_l2(gy, true_y, 0.1),
    )


INF = math.inf
ODD_ROWS = {
    # the exponent of a token's q^a p^(1-a): float had it cancel, or leave its range
    "peaks 60 apart": ([60.0, 0, 0], [0, 60.0, 0], 0.5, 1.0),
    "peaks 80 apart": ([80.0, 0, 0], [0, 80.0, 0], 0.5, 1.0),
    "peaks 200 apart": ([200.0, 0, 0], [0, 200.0, 0], 0.3, 1.0),
    "peaks 1000 apart": ([1000.0, 0, 0], [0, 1000.0, 0], 0.5, 1.0),
    "peaks at T = 0.1": ([10.0, -10.0, 0], [-10.0, 10.0, 0], 0.5, 0.1),
    "tiny p and q": ([0, 0, -200.0], [0, 1.0, -100.0], 2.0, 1.0),
    "tiny p and q at T = 0.1": ([0, 0, -20.0], [0, 1.0, -10.0], 2.0, 0.1),
    "a q that underflows": ([0, 0, -176.0], [0, 1.0, -89.0], 2.0, 1.0),
    # the sum of q^a p^(1-a) leaves the range of a double
    "order 50": ([0, 20.0, 1.0], [20.0, 0, 2.0], 50.0, 1.0),
    "a sum that underflows": ([0, 800.0, 0], [800.0, 0, 0], 0.5, 0.05),
    "a sum that overflows": ([0, -800.0, 900.0], [900.0, 0, 0], 3.0, 1.0),
    # a token of one row only, and a pair further apart than e^-v has a number
    "no p": ([0, -INF], [0, 0.0], 0.9999, 1.0),
    "no q": ([0, 0.0], [0, -INF], 1e-4, 1.0),
    "pairs 2e4 apart": ([0, 2e4, 0], [0, 0, 2e4], 0.001, 1.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", ODD_ROWS)
def test_renyi_of_rows_far_apart(backend: str, case: str, dtype: torch.dtype) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("no float64 logits")
    x, y, alpha, temperature = ODD_ROWS[case]
    rows = (torch.tensor([x], dtype=dtype), torch.tensor([y], dtype=dtype))
    value, gx, gy = _against_float64(backend, *rows, "renyi", {"alpha": alpha}, temperature)
    assert value <= (1e-5 if dtype == torch.float32 else 1e-9)
    # a token's w is right to 1e-7 of its exponents, which Triton has in float alone
    close = {"triton": 1e-3}.get(backend, 3e-5 if dtype == torch.float32 else 1e-8)
    assert max(gx, gy) <= close


def test_renyi_of_large_orders(backend: str) -> None:
    x, y = 3 * torch.randn(2, 2, 1000)
    for alpha, temperature in ((100.0, 1.0), (10.0, 0.1), (2.0, 0.05)):
        errors = _against_float64(backend, x, y, "renyi", {"alpha": alpha}, temperature)
        assert errors[0] <= 1e-5
        assert max(errors[1:]) <= (1e-3 if backend == "triton" else 2e-5), (alpha, errors)


@pytest.mark.parametrize("smallest", [-1e15, -1e20, torch.finfo(torch.float32).min])
def test_a_finite_mask_of_one_row(backend: str, smallest: float) -> None:
    mask = torch.tensor([[smallest, 1.0, 2.0]])
    other = torch.tensor([[0.0, 1.0, 2.0]])
    for kind, parameter in (
        ("hellinger", {}),
        ("renyi", {"alpha": 0.5}),
        ("renyi", {"alpha": 0.9}),
    ):
        for x, y in ((mask, other), (other, mask)):
            assert max(_against_float64(backend, x, y, kind, parameter, 1.0)) <= 1e-5


def test_tokens_that_neither_row_has(backend: str) -> None:
    """Their log-ratio is anything: Triton made e to the power of it the gradient, for alpha > 1."""
    policy, reference = torch.randn(2, 3, 67)
    policy[:, ::3] = reference[:, ::3] = -math.inf
    for dtype in (torch.float32, torch.bfloat16):
        x, y = policy.to(dtype), reference.to(dtype)
        for name in FAMILY:
            found = run(x, y, name, backend=backend)
            true = run(x.double(), y.double(), name, backend="reference")
            for part, exact in zip(found[1:], true[1:], strict=True):
                assert not part[:, ::3].any(), name
                slack = 2 if backend == "triton" else 1
                assert oracle.relative_l2(part, exact) <= slack * oracle.GRADIENT_TOLERANCE[dtype]


def test_parameters_near_their_ends(backend: str) -> None:
    """Terms that cancel to less than float holds."""
    if backend == "triton":
        pytest.skip("its range of parameters is smaller: docs/numerics.md")
    policy = 2 * torch.randn(3, 200)
    reference = policy + torch.randn(3, 200)
    for kind, parameter in (
        *(("skew_kl", {"alpha": a}) for a in (1e-6, 0.98, 0.999)),
        *(("jsd", {"beta": b}) for b in (1e-6, 1e-3, 1 - 1e-4)),
        *(("renyi", {"alpha": 1 + a}) for a in (1e-3, -1e-6, 1e-7)),
    ):
        x, y = policy.clone().requires_grad_(), reference.clone().requires_grad_()
        u, v = policy.double().requires_grad_(), reference.double().requires_grad_()
        found = fusedkl.divergence(x, y, kind, **parameter, backend=backend)
        true = fusedkl.divergence(u, v, kind, **parameter, backend="reference")
        assert oracle.relative_error(found, true) <= 1e-5, (kind, parameter)
        slopes = torch.autograd.grad(found.sum(), (x, y))
        for a, b in zip(slopes, torch.autograd.grad(true.sum(), (u, v)), strict=True):
            assert oracle.relative_l2(a, b) <= 2e-5, (kind, parameter)
