"""KL estimates against their formulas in 60 digits, penalised rewards, controllers, units."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import pytest
import torch

import fusedkl

KINDS = ("k1", "k2", "k3", "abs", "k1+", "k3+")
RATIOS = [0.0, 1e-12, -1e-6, 3e-4, -0.02, 0.3, -0.31, 1.7, -4.0, 30.0, -60.0]


def exactly(kind: str, ratio: float) -> tuple[float, float]:
    """Value, and gradient by the policy's log-probability."""
    with mpmath.workdps(60):
        x = mpmath.mpf(ratio)
        values = {"k1": x, "k2": x * x / 2, "k3": mpmath.exp(-x) - 1 + x, "abs": abs(x)}
        slopes = {"k1": 1, "k2": x, "k3": 1 - mpmath.exp(-x), "abs": mpmath.sign(x)}
        name = kind.removesuffix("+")
        return float(values[name]), float(slopes["k2" if kind != name else name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_estimates_and_gradients_at_every_magnitude(kind: str, dtype: torch.dtype) -> None:
    # against 0: the ratio is then exactly the number given
    logprob = torch.tensor(RATIOS, dtype=dtype, requires_grad=True)
    ref = torch.zeros_like(logprob, requires_grad=True)
    value = fusedkl.kl_estimate(logprob, ref, kind)
    value.sum().backward()
    assert value.dtype == dtype and logprob.grad is not None and ref.grad is not None
    wanted = [exactly(kind, r) for r in logprob.tolist()]
    bound = 1e-14 if dtype == torch.float64 else 1e-6
    expected = torch.tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(value.double(), expected[:, 0], rtol=bound, atol=0)
    torch.testing.assert_close(logprob.grad.double(), expected[:, 1], rtol=bound, atol=0)
    assert torch.equal(ref.grad, -logprob.grad)


def test_16_bit_log_probabilities_are_not_subtracted_in_16_bits() -> None:
    logprob = torch.tensor([-1.0, -9.0625], dtype=torch.bfloat16)
    ref = torch.tensor([-1.0078125, -9.0], dtype=torch.float16)
    value = fusedkl.kl_estimate(logprob, ref, "k1")
    assert value.dtype == torch.float32
    assert value.tolist() == [0.0078125, -0.0625]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bounded_ratio_keeps_a_bounded_gradient(kind: str) -> None:
    ratios = torch.tensor([-500.0, -3.0, 0.5, 7.0], requires_grad=True)
    value = fusedkl.kl_estimate(ratios, torch.zeros(4), kind, max_log_ratio=2.0)
    value.sum().backward()
    assert ratios.grad is not None
    wanted = [exactly(kind, max(-2.0, min(2.0, r))) for r in ratios.tolist()]
    torch.testing.assert_close(value.detach(), torch.tensor([v for v, _ in wanted]))
    torch.testing.assert_close(ratios.grad, torch.tensor([g for _, g in wanted]))
    assert bool((ratios.grad != 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_a_bound_holds_infinite_ratios_too(kind: str) -> None:
    logprob = torch.tensor([-1.0, -math.inf, -math.inf], requires_grad=True)
    ref = torch.tensor([-math.inf, -1.0, -math.inf])
    value = fusedkl.kl_estimate(logprob, ref, kind, max_log_ratio=2.0)
    (slope,) = torch.autograd.grad(value[:2].sum(), logprob)
    wanted = torch.tensor([exactly(kind, r) for r in (2.0, -2.0)])
    torch.testing.assert_close(value[:2].detach(), wanted[:, 0])
    torch.testing.assert_close(slope[:2], wanted[:, 1])
    assert value[2].isnan()


def test_estimates_differentiate_twice() -> None:
    logprob, ref = torch.randn(2, 5, dtype=torch.float64).requires_grad_().unbind()
    for kind in ("k2", "k3"):
        assert torch.autograd.gradgradcheck(
            lambda a, b, kind=kind: fusedkl.kl_estimate(a, b, kind), (logprob, ref)
        )


def test_an_impossible_token_is_infinite_and_alone() -> None:
    logprob = torch.tensor([-math.inf, -1.0, -2.0])
    ref = torch.tensor([-1.0, -math.inf, -2.5])
    assert fusedkl.kl_estimate(logprob, ref, "k3").tolist()[:2] == [math.inf, math.inf]
    assert fusedkl.kl_estimate(logprob, ref, "k1").tolist() == [-math.inf, math.inf, 0.5]


REWARDS = torch.tensor([10.0, 20.0, 30.0])
KL = torch.tensor([[1.0, 2.0, 3.0], [1.0, math.nan, 3.0], [math.inf, math.nan, -math.inf]])
MASK = torch.tensor([[True, True, False], [True, False, True], [False, False, False]])


def test_a_sequence_is_rewarded_at_its_last_counted_token() -> None:
    found = fusedkl.kl_penalized_rewards(REWARDS, KL, MASK, 0.5)
    assert found.tolist() == [[-0.5, 9.0, 0.0], [-0.5, 0.0, 18.5], [0.0, 0.0, 0.0]]


def test_rewards_per_token_stay_where_they_are() -> None:
    rewards = torch.arange(9.0).view(3, 3)
    found = fusedkl.kl_penalized_rewards(rewards, KL, MASK, torch.tensor(2.0))
    assert found.tolist() == [[-2.0, -3.0, 0.0], [1.0, 0.0, -1.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("coef", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
def test_no_coefficient_is_no_penalty(coef: float | torch.Tensor) -> None:
    found = fusedkl.kl_penalized_rewards(REWARDS[1:], KL[1:], MASK[1:].logical_not(), coef)
    assert found.tolist() == [[0.0, 20.0, 0.0], [0.0, 0.0, 30.0]]


def test_penalised_rewards_carry_no_gradient_and_keep_float64() -> None:
    kl = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    found = fusedkl.kl_penalized_rewards(torch.ones(2), kl, torch.ones(2, 3, dtype=torch.bool), 1)
    assert found.dtype == torch.float64 and not found.requires_grad
    none = fusedkl.kl_penalized_rewards(torch.ones(0), torch.ones(0, 3), torch.ones(0, 3) > 0, 1)
    assert none.shape == (0, 3)


def test_the_adaptive_coefficient_follows_the_papers_rule() -> None:
    control = fusedkl.AdaptiveKLController(0.2, target=6.0, horizon=1000)
    assert control.update(6.6, steps=50) == pytest.approx(0.2 * (1 + 0.1 * 50 / 1000))
    before = control.coef
    assert control.update(torch.tensor(600.0), 50) == pytest.approx(before * 1.01)  # held to 0.2
    before = control.coef
    assert control.update(-3.0, 50) == pytest.approx(before * 0.99)
    assert control.update(math.inf, 50) > control.coef * 0.999
    before = control.coef
    assert control.update(6.0, 50) == pytest.approx(before)


def test_a_controlled_process_settles_at_its_target() -> None:
    control = fusedkl.AdaptiveKLController(1.0, target=3.0, horizon=100)
    for _ in range(400):
        control.update(1.2 / control.coef, 10)
    assert 1.2 / control.coef == pytest.approx(3.0, rel=1e-3)


def test_a_controller_goes_on_from_its_checkpoint() -> None:
    first = fusedkl.AdaptiveKLController(0.2, 6.0)
    first.update(9.0, 512)
    second = fusedkl.AdaptiveKLController(1.0, 6.0)
    second.load_state_dict(first.state_dict())
    assert second.update(2.0, 64) == first.update(2.0, 64)
    fixed = fusedkl.FixedKLController(0.1)
    assert fixed.update(100.0, 10_000) == 0.1
    fixed.load_state_dict({"coef": 0.3})
    assert fixed.state_dict() == {"coef": 0.3}


def test_bits() -> None:
    assert fusedkl.nats_to_bits(math.log(2)) == 1.0
    nats = torch.tensor([0.0, math.log(8)], requires_grad=True)
    bits = fusedkl.nats_to_bits(nats)
    torch.testing.assert_close(bits, torch.tensor([0.0, 3.0]))
    bits.sum().backward()
    assert nats.grad is not None
    torch.testing.assert_close(nats.grad, torch.full((2,), 1.4426950408889634))


L = torch.zeros(2, 3)
M = torch.ones(2, 3, dtype=torch.bool)
rewards, estimate = fusedkl.kl_penalized_rewards, fusedkl.kl_estimate
adaptive = fusedkl.AdaptiveKLController
BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "no tensor": (lambda: estimate(0.5, L), TypeError, "logprob must be a tensor, got float"),  # type: ignore[arg-type]
    "integers": (lambda: estimate(L, L.long()), TypeError, "ref_logprob .* got int64"),
    "shapes": (lambda: estimate(L, L[0]), ValueError, r"ref_logprob .* \[2, 3\]; got \[3\]"),
    "device": (lambda: estimate(L, L.to("meta")), ValueError, "ref_logprob .* cpu .* got meta"),
    "kind": (lambda: estimate(L, L, "k4"), ValueError, "kind must be one of k1, .*; got 'k4'"),
    "clamp": (lambda: estimate(L, L, max_log_ratio=0), ValueError, "max_log_ratio .* got 0"),
    "text": (lambda: estimate(L, L, max_log_ratio="1"), TypeError, "max_log_ratio .* got str"),  # type: ignore[arg-type]
    "rewards": (lambda: rewards(L[:1], L, M, 1), ValueError, r"rewards .* got \[1, 3\]"),
    "0-d kl": (lambda: rewards(L, L[0, 0], M, 1), ValueError, "kl must .* 0-d"),
    "float": (lambda: rewards(L, L, L, 1), TypeError, "mask must be .* got torch.float32"),
    "mask shape": (lambda: rewards(L, L, M[0], 1), ValueError, r"mask .* got \[3\]"),
    "coef": (lambda: rewards(L, L, M, -1), ValueError, "coef must be at least 0 .* got -1"),
    "coef tensor": (lambda: rewards(L, L, M, L[0, 0] - 1), ValueError, "coef .* 0 .* got -1"),
    "nan coef": (lambda: rewards(L, L, M, L[0, 0] * math.nan), ValueError, "coef .* got nan"),
    "coef shape": (lambda: rewards(L, L, M, L), ValueError, r"coef .* 0-d tensor; got shape"),
    "coef 0": (lambda: adaptive(0, 1), ValueError, "coef must be positive .* got 0"),
    "target": (lambda: adaptive(1, math.inf), ValueError, "target .* finite; got inf"),
    "horizon": (lambda: adaptive(1, 1, True), TypeError, "horizon must be a number; got bool"),
    "fixed": (lambda: fusedkl.FixedKLController(-1), ValueError, "coef must be at least 0"),
    "nan kl": (lambda: adaptive(1, 1).update(math.nan, 1), ValueError, "kl .* got nan"),
    "kl per token": (lambda: adaptive(1, 1).update(L, 1), ValueError, r"kl .* got shape \[2, 3\]"),
    "steps": (lambda: adaptive(1, 1, 10).update(1, 50), ValueError, "steps .* 50 at horizon 10"),
    "state": (lambda: adaptive(1, 1).load_state_dict({"beta": 1.0}), ValueError, "got .'beta'."),
    "state of 0": (lambda: adaptive(1, 1).load_state_dict({"coef": 0.0}), ValueError, "got 0.0"),
    "bits": (lambda: fusedkl.nats_to_bits("1"), TypeError, "nats must be a number; got str"),  # type: ignore[call-overload]
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    function, error, text = BAD[case]
    with pytest.raises(error, match=text):
        function()
