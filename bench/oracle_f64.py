"""The float64 truth for one pair of rows: both KLs and the policy gradients of both.

Independent of the package, so that it can judge it. The difference of the log-probabilities is
formed from x - y and a difference of logsumexps that is itself centred, never from two rounded
logsumexps; every summand is >= 0. float64 then carries 1e-9 relative down to KL 1e-13.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """forward_kl = KL(q || p), reverse_kl = KL(p || q); p policy, q reference; nats, float64."""

    forward_kl: Tensor
    reverse_kl: Tensor
    forward_gradient: Tensor
    reverse_gradient: Tensor
    # How many times larger the terms of p (l - R) are than what is left of them. Where the policy
    # is the reference without its top token, l is the same large number everywhere and almost
    # nothing is left: beyond 1e8 not even float64 knows the gradient well enough to judge another.
    reverse_cancellation: float


def row(policy: Tensor, reference: Tensor) -> Row:
    """Both divergences of two 1-D rows and their gradients to the policy logits."""
    x, y = policy.double(), reference.double()
    inside = (x > -torch.inf) & (y > -torch.inf)
    p, q = torch.softmax(x, 0), torch.softmax(y, 0)
    log_ratio = _log_ratio(x, y, q, inside)
    only_p, only_q = p.masked_fill(inside, 0.0), q.masked_fill(inside, 0.0)
    forward = torch.where(inside, _bregman(log_ratio, p, q), only_p).sum()
    reverse = torch.where(inside, _bregman(-log_ratio, q, p), only_q).sum()
    # Support is read off the logits: a probability that underflows is not one that is zero.
    forward = forward.masked_fill(((y > -torch.inf) & ~inside).any(), torch.inf)
    reverse = reverse.masked_fill(((x > -torch.inf) & ~inside).any(), torch.inf)
    close = inside & (log_ratio.abs() < 1)
    forward_gradient = torch.where(close, q * torch.expm1(log_ratio), p - q)
    reverse_gradient = torch.where(p > 0, p * (log_ratio - reverse), 0.0)
    terms = torch.where(p > 0, p * (log_ratio.abs() + reverse), 0.0)
    cancellation = torch.linalg.vector_norm(terms) / torch.linalg.vector_norm(reverse_gradient)
    return Row(forward, reverse, forward_gradient, reverse_gradient, float(cancellation))


def _log_ratio(x: Tensor, y: Tensor, q: Tensor, inside: Tensor) -> Tensor:
    """log p - log q where both have mass, 0 elsewhere.

    It is u - log(sum q e^u) for u = x - y - centre and any centre; the q-mean of x - y makes both
    terms small, so the sum is taken of expm1. Rows that are far apart need no such care.
    """
    difference = (x - y).masked_fill(~inside, 0.0)
    q_inside = q.masked_fill(~inside, 0.0)
    centre = (q_inside * difference).sum() / q_inside.sum()
    u = (difference - centre).masked_fill(~inside, 0.0)
    excess = (q_inside * torch.expm1(u.clamp(max=600.0))).sum()
    policy_covers = bool((inside == (y > -torch.inf)).all())
    if policy_covers and abs(float(excess)) < 0.5 and float(u.max()) < 600.0:
        alone = torch.logsumexp(x, 0) - torch.logsumexp(x.masked_fill(~inside, -torch.inf), 0)
        shift = torch.log1p(excess) + alone
    else:
        shift = torch.logsumexp(x, 0) - torch.logsumexp(y, 0) - centre
    return (u - shift).masked_fill(~inside, 0.0)


def _bregman(ratio: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """q (e^l - 1 - l) with e^l = p / q: a short series, or the three terms where l is large."""
    tail = 1 + ratio / 5 * (1 + ratio / 6 * (1 + ratio / 7))
    series = ratio * ratio * (0.5 + ratio / 6 * (1 + ratio / 4 * tail))
    return torch.where(ratio.abs() < 1e-2, q * series, p - q - q * ratio)


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the expected gradient, in float64."""
    return float(
        torch.linalg.vector_norm(actual.double() - expected) / torch.linalg.vector_norm(expected)
    )
