"""What stands around a KL in RL training: estimates from samples, penalised rewards, controllers.

Which estimate is unbiased, in its value and in its gradient: docs/estimators.md.
"""

from __future__ import annotations

import math
from typing import Any, overload

import torch
from torch import Tensor

from . import autograd, reference, validation
from .forward_mode import applied

ESTIMATES = ("k1", "k2", "k3", "abs", "k1+", "k3+")


def kl_estimate(
    logprob: Tensor,
    ref_logprob: Tensor,
    kind: str = "k3",
    *,
    max_log_ratio: float | None = None,
) -> Tensor:
    """Estimate KL(p || q) from the log-probabilities of tokens that were drawn from p.

    With l = logprob - ref_logprob, per token::

        k1   l                     abs  |l|
        k2   l^2 / 2               k1+  the value of k1 with the gradient of k2
        k3   exp(-l) - 1 + l       k3+  the value of k3 with the gradient of k2

    k3 is never negative, and accurate for every l (``torch.exp(-l) - 1 + l`` is noise below 1e-3 in
    float32). The mean of k1 and of k3 under p is KL(p || q). As a loss on samples of p, only k2,
    k1+ and k3+ have the gradient of KL(p || q); k1's is 0 in the mean, k3's that of KL(q || p).
    Equivalent to, for k3: ``torch.expm1(-l) + l``, for k3+: ``k3.detach() + k2 - k2.detach()``.

    Args:
        logprob: log p of the token drawn, any shape, floating-point. Differentiable, twice too.
        ref_logprob: log q of it, the same shape and device. Differentiable.
        kind: one of the names above.
        max_log_ratio: a bias against outliers: values are those of l clamped to +-max_log_ratio,
            and the gradient that of the clamp's end instead of the 0 of torch.clamp, so that the
            tokens furthest away, at an infinite l too, are still pulled back. None: no bias.

    Returns:
        the inputs' shape, float32, or float64 if either is; nats. Tokens that do not count should
        be masked afterwards (`kl_penalized_rewards` does); where both log-probabilities are -inf
        the estimate is NaN, where one is, it is infinite or NaN without max_log_ratio.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is accepted.

    Schulman, "Approximating KL Divergence", 2020; the gradient of k2: docs/estimators.md.
    """
    validation.floating("logprob", logprob, ref_logprob)
    validation.floating("ref_logprob", ref_logprob, logprob)
    validation.alike("ref_logprob", ref_logprob, "logprob", logprob)
    validation.one_of("kind", kind, ESTIMATES)
    dtype = reference.result_dtype(logprob, ref_logprob)
    ratio = logprob.to(dtype) - ref_logprob.to(dtype)
    if max_log_ratio is not None:
        validation.positive("max_log_ratio", max_log_ratio)
        ratio = applied(_Clamp, ratio, max_log_ratio)
    name = kind.removesuffix("+")
    value = ratio
    if name == "k2":
        value = ratio * ratio / 2
    elif name == "k3":
        value = reference.gap(-ratio)
    elif name == "abs":
        value = ratio.abs()
    if name == kind:
        return value
    # k2's derivatives and the value 0, also where the square would overflow
    still = ratio.detach()
    return value.detach() + (ratio - still) * (ratio / 2 + still / 2)


class _Clamp(torch.autograd.Function):
    """x limited to +-limit, infinities too, with the derivative of x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, limit: float) -> Tensor:
        return x.clamp(-limit, limit)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def kl_penalized_rewards(rewards: Tensor, kl: Tensor, mask: Tensor, coef: float | Tensor) -> Tensor:
    """Rewards per token with a KL penalty: -coef * kl at each counted token, plus the reward.

    A reward per sequence goes to its last counted token, one per token where it stands::

        r[t] = -coef * kl[t] + (rewards if t is the last counted token else 0)    rewards [...]
        r[t] = -coef * kl[t] + rewards[t]                                         rewards [..., T]

    Equivalent to, for rewards per sequence, each of which has a token that counts::

        last = mask.shape[-1] - 1 - mask.flip(-1).int().argmax(-1, keepdim=True)
        torch.where(mask, -coef * kl, 0).scatter_add(-1, last, rewards.unsqueeze(-1))

    Args:
        rewards: floating-point, shape kl.shape[:-1] or kl.shape.
        kl: floating-point [..., T], nats: `kl_estimate` or `divergence` of every token.
        mask: bool [..., T], True = counted. What other tokens hold is ignored, NaN too.
        coef: the penalty's coefficient >= 0, a number or a 0-d tensor (looked at on the CPU only);
            see `AdaptiveKLController`. At 0 there is no penalty, of an infinite kl neither.

    Returns:
        [..., T], float32, or float64 if rewards or kl are; exactly 0 at tokens that do not count
        (a sequence without any gets no reward). It carries no gradient: a penalty in the reward
        acts through the policy gradient; for one in the loss, add coef * kl to the loss.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is accepted.

    Ziegler et al., "Fine-Tuning Language Models from Human Preferences", 2019, equation 2.
    """
    validation.floating("kl", kl)
    validation.floating("rewards", rewards)
    if kl.dim() == 0:
        raise ValueError("kl must have shape [..., T]; got a 0-d tensor")
    if rewards.shape not in (kl.shape, kl.shape[:-1]):
        raise ValueError(
            f"rewards must have the shape of kl, {list(kl.shape)}, or that without its last dim; "
            f"got {list(rewards.shape)}"
        )
    validation.on_device("rewards", rewards, kl)
    if validation.tensor("mask", mask).dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, True = counted; got {mask.dtype}")
    validation.alike("mask", mask, "kl", kl)
    if isinstance(coef, Tensor):
        if validation.tensor("coef", coef).dim() != 0:
            raise ValueError(f"coef must be a number or a 0-d tensor; got shape {list(coef.shape)}")
        if coef.device.type == "cpu" and not autograd.intercepted(coef):
            validation.not_negative("coef", coef.item())
    else:
        validation.not_negative("coef", coef)
    dtype = reference.result_dtype(kl, rewards)
    with torch.no_grad():
        given = rewards.to(dtype)
        if rewards.dim() < kl.dim():
            later = mask.flip(-1).to(torch.int32).cumsum(-1).flip(-1)
            given = torch.where(later == 1, given.unsqueeze(-1), 0)
        # 0 * inf is no number
        penalty = torch.where(mask & (coef != 0), coef * kl.to(dtype), 0)
        return torch.where(mask, given - penalty, 0)


class _KLController:
    """A coefficient that outlives a step, with what a checkpoint needs of it."""

    _valid = staticmethod(validation.not_negative)

    def __init__(self, coef: float) -> None:
        self.coef = self._valid("coef", coef)

    def state_dict(self) -> dict[str, float]:
        """What changes over a run: {"coef": float}."""
        return {"coef": self.coef}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Take over what `state_dict` returned."""
        if set(state_dict) != {"coef"}:
            raise ValueError(f"state_dict must hold coef alone; got {sorted(state_dict)}")
        self.coef = self._valid("coef", state_dict["coef"])


class FixedKLController(_KLController):
    """A KL coefficient that stays what it is; stands in for `AdaptiveKLController`.

    ``FixedKLController(0.05).coef`` is 0.05 for ever: rewards in it are -coef * kl, in the reward's
    units per nat. Equivalent to the number itself. coef: a finite number >= 0, else ValueError
    (TypeError if it is no number).

    Ziegler et al., "Fine-Tuning Language Models from Human Preferences", 2019.
    """

    def update(self, kl: float | Tensor, steps: int) -> float:
        """Returns coef, unchanged."""
        return self.coef


class AdaptiveKLController(_KLController):
    """A KL coefficient that steers the measured KL to a target, by proportional control.

    After each batch, with e = (kl / target - 1) limited to +-0.2::

        coef <- coef * (1 + e * steps / horizon)

    Equivalent to, in `update`::

        coef *= 1 + min(max(kl / target - 1, -0.2), 0.2) * steps / horizon

    Args:
        coef: where to start, a number > 0 (from 0 it would never move).
        target: the KL to hold, > 0, in the unit of what `update` is given (nats per sequence in the
            paper; any other, as long as it is the same).
        horizon: > 0: samples over which a KL far too high, or too low, moves coef by 20 %.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is accepted.

    Ziegler et al., "Fine-Tuning Language Models from Human Preferences", 2019, section 2.2.
    """

    _valid = staticmethod(validation.positive)

    def __init__(self, coef: float, target: float, horizon: float = 10_000) -> None:
        super().__init__(coef)
        self.target = validation.positive("target", target)
        self.horizon = validation.positive("horizon", horizon)

    def update(self, kl: float | Tensor, steps: int) -> float:
        """Take the mean KL of the last `steps` samples (a number or a 0-d tensor); returns coef.

        Reads a tensor's value: on a GPU, call it where the step waits for the device anyway.
        """
        if isinstance(kl, Tensor) and validation.tensor("kl", kl).numel() != 1:
            raise ValueError(f"kl must be a number or a 0-d tensor; got shape {list(kl.shape)}")
        measured = validation.real("kl", kl.item() if isinstance(kl, Tensor) else kl)
        if math.isnan(measured):
            raise ValueError("kl must be a number; got nan")
        if not 0 <= validation.real("steps", steps) < 5 * self.horizon:
            raise ValueError(
                "steps must be at least 0 and below 5 * horizon, where one update could turn coef "
                f"negative; got {steps} at horizon {self.horizon}"
            )
        error = min(max(measured / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * steps / self.horizon
        return self.coef


@overload
def nats_to_bits(nats: float) -> float: ...
@overload
def nats_to_bits(nats: Tensor) -> Tensor: ...
def nats_to_bits(nats: float | Tensor) -> float | Tensor:
    """Nats / ln 2: information in bits, of a number or of a tensor of any shape.

    A bit is what a fair coin tells. A floating-point tensor keeps its dtype, and its gradient; of
    anything else than a real number or a tensor: TypeError. Equivalent to ``nats / log(2)``.

    Shannon, "A Mathematical Theory of Communication", 1948, for the unit.
    """
    if not isinstance(nats, Tensor):
        nats = validation.real("nats", nats)
    return nats / math.log(2)
