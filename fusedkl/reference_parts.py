"""Softmax rows and their log-ratio in plain torch: what reference.py is made of."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .forward_mode import applied


def limits(dtype: torch.dtype) -> tuple[float, float]:
    """What stands for infinity in a difference of logits, and the largest exponent to take."""
    return (1e300, 500.0) if dtype == torch.float64 else (1e37, 60.0)


class _RowSum(torch.autograd.Function):
    """Sum over the last dim, kept, by halving: torch.sum's bits change with threads and rows."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        if x.shape[-1] <= 1:
            return x.sum(-1, keepdim=True)
        while x.shape[-1] > 1:
            width = x.shape[-1]
            half = (width + 1) // 2
            folded = x[..., :half].clone()
            folded[..., : width - half] += x[..., half:]
            x = folded
        return x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.width = inputs[0].shape[-1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].expand(*grads[0].shape[:-1], ctx.width)


class Gap(torch.autograd.Function):
    """g(u) = expm1(u) - u to full relative accuracy; g' = expm1."""

    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor) -> Tensor:
        near = u.abs() <= 0.3
        v = torch.where(near, u, 0)
        series = torch.ones_like(v)
        for n in range(17, 2, -1):  # 1 + v/3 (1 + v/4 (1 + ... v/17)), times v^2/2
            series = 1 + series * v / n
        # e^100 has no digit left for 100, and infinity must not meet itself
        return torch.where(near, series * v * v / 2, torch.expm1(u) - u.clamp(max=100))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * torch.expm1(ctx.saved_tensors[0])


class _Pull(torch.autograd.Function):
    """Zeros [n, 1] whose derivative by x is `slope`: the gradient of a row that has no number.

    The slope is differentiated where it is the gradient, never as a factor of the value.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, slope: Tensor) -> Tensor:
        return x.new_zeros((*x.shape[:-1], 1))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        # 0 times the NaN of a field that nobody asked a gradient of would be NaN
        slope = torch.where((grads[0] == 0) & slope.isnan(), 0, slope)
        return grads[0] * slope, None


def gap(u: Tensor) -> Tensor:
    """g(u) of every element, differentiable any number of times."""
    out: Tensor = applied(Gap, u)
    return out


def pull(x: Tensor, slope: Tensor) -> Tensor:
    """Zeros [n, 1] whose derivative by x is `slope`."""
    out: Tensor = applied(_Pull, x, slope)
    return out


def row_sum(x: Tensor) -> Tensor:
    total: Tensor = applied(_RowSum, x)
    return total


class Softmax(NamedTuple):
    """Rows about their largest logit, [n, V] and [n, 1]. A bad row holds harmless numbers."""

    bad: Tensor  # [n, 1] the row has NaN, +inf, or nothing but -inf
    empty: Tensor  # [n, 1] nothing but -inf
    support: Tensor  # logit is not -inf
    logits: Tensor  # 0 outside the support
    top: Tensor  # [n, 1] the largest logit
    exponent: Tensor  # (logit - top) / T <= 0; 0 outside the support
    weight: Tensor  # exp(exponent); 0 outside the support
    mass: Tensor  # [n, 1] sum of the weights
    log_mass: Tensor  # [n, 1] by log1p of all but the top: a peaked row keeps its digits
    prob: Tensor


def softmax(x: Tensor, scale: Tensor) -> Softmax:
    top, at = x.max(-1, keepdim=True)
    bad, empty = ~torch.isfinite(top), top == -torch.inf
    top = torch.where(bad, 0, top)
    support = (x != -torch.inf) & ~bad
    logits = torch.where(support, x, 0)
    # The top's exponent and weight are the constants 0 and 1: its derivative is then minus the sum
    # of the others', without cancellation on a peaked row.
    is_top = torch.zeros_like(support).scatter(-1, at, True) & ~bad
    others = support & ~is_top
    far, _ = limits(x.dtype)
    exponent = torch.where(others, ((logits - top) * scale).clamp(min=-far), 0)
    weight = torch.where(others, torch.exp(exponent), 0)
    rest = row_sum(weight)
    weight = torch.where(is_top, 1, weight)
    mass = 1 + rest
    log_mass = torch.log1p(rest)
    prob = weight / mass
    return Softmax(bad, empty, support, logits, top, exponent, weight, mass, log_mass, prob)


def log_ratio(p: Softmax, q: Softmax, scale: Tensor) -> tuple[Tensor, Tensor]:
    """log(p/q) on the joint support (0 elsewhere), and lse(x/T) - lse(y/T) [n, 1]."""
    far, largest = limits(p.prob.dtype)
    joint = p.support & q.support
    with torch.no_grad():
        # Two centres, neither of which changes the ratio: one token's own difference, so that a
        # constant difference becomes exactly 0, then the reference-weighted mean of what is left.
        difference = torch.where(joint, p.logits - q.logits, 0)
        # of a token likely under both: where one logit is -1e20, the difference has no digits
        likely = torch.minimum(p.exponent, q.exponent)
        at = torch.where(joint, likely, -torch.inf).argmax(-1, keepdim=True)
        anchor = difference.gather(-1, at)
        left = torch.where(joint, ((difference - anchor) * scale).clamp(-far, far), 0)
        q_joint = torch.where(joint, q.prob, 0)
        mass = row_sum(q_joint)
        mean = torch.where(mass > 0, row_sum(q_joint * left) / mass, 0)
        mean = torch.where(mean.abs() <= 1, mean, 0)  # a far one would swallow what it centres
        u = torch.where(joint, left - mean, 0)
        # lse(x/T) - lse(y/T) about the centres = log1p(sum q expm1(u) + p alone - q alone), which
        # is relatively accurate; where that overflows or cancels, the plain form will do.
        tops = ((p.top - q.top) - anchor) * scale - mean
        p_alone = torch.where(p.support, torch.exp((p.exponent + tops).clamp(max=largest)), 0)
        p_alone = p_alone * torch.exp(-q.log_mass)
        excess = torch.where(joint, q_joint * torch.expm1(u.clamp(max=largest)), p_alone - q.prob)
        z = row_sum(excess)
        fits = (u.amax(-1, keepdim=True) <= largest) & (mass > 0) & (z > -0.5) & (z < torch.inf)
        centred = torch.where(fits, torch.log1p(z.clamp(min=-0.5)), tops + p.log_mass - q.log_mass)
        value = u - centred
        normalisers = anchor * scale + mean + centred
    # The centred value with the derivative of the plain one.
    plain = (p.exponent - p.log_mass) - (q.exponent - q.log_mass)
    return torch.where(joint, value + (plain - plain.detach()), 0), normalisers
