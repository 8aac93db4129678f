"""The second-sweep divergences in plain torch: the part of reference.py that needs log(p/q).

    m = w q + (1 - w) p,  h(z) = z - log1p(z) >= 0,  t = 1 - a

    KL(q || m) = sum q h((1 - w) expm1(l))                     l = log(p/q)
    tvd = sum q |expm1(l)| / 2
    N = 1 - sum q^a p^t = sum q (t g(l) - g(t l))
    renyi = log1p(-N) / (a - 1),  hellinger = N at a = 1/2

Every sum has terms of one sign and none that cancels; where l is large, the larger of p and q
stands for q e^l. A token that one row excludes adds the limit of its term. Of renyi, 1 - N may have
no number: its logarithm is formed from those of its terms.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .reference_parts import Gap, Softmax, limits, row_sum


class _Bend(torch.autograd.Function):
    """h(z) = z - log1p(z) to full relative accuracy; h' = z / (1 + z)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor) -> Tensor:
        # With s = z / (2 + z): log1p(z) = 2 atanh(s) and z - 2 s = z s.
        near = z.abs() <= 0.3
        v = torch.where(near, z, 0)
        s = v / (2 + v)
        tail = torch.zeros_like(s)
        for n in range(23, 1, -2):
            tail = tail * s * s + 2 / n
        return torch.where(near, v * s - tail * s * s * s, z - torch.log1p(z))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return grads[0] * (z / (1 + z))


def _to_mixture(p: Softmax, q: Softmax, l: Tensor, weight: float) -> Tensor:  # noqa: E741
    """Terms of KL(q || weight q + (1 - weight) p)."""
    rest = 1 - weight
    near = q.prob * _Bend.apply(rest * torch.expm1(l.clamp(max=1)))
    beyond = l.clamp(min=1)
    log_m = beyond + math.log(rest) + torch.log1p(weight / rest * torch.exp(-beyond))
    far = rest * (p.prob - q.prob) - q.prob * log_m
    alone = torch.where(q.support, q.prob * (-rest - math.log(weight)), rest * p.prob)
    return torch.where(p.support & q.support, torch.where(l <= 1, near, far), alone)


def _variation(p: Softmax, q: Softmax, l: Tensor) -> Tensor:  # noqa: E741
    near = q.prob * torch.expm1(l.clamp(max=1)).abs()
    terms = torch.where(l <= 1, near, p.prob - q.prob)
    return torch.where(p.support & q.support, terms, p.prob + q.prob) / 2


def _affinity(p: Softmax, q: Softmax, l: Tensor, order: float) -> tuple[Tensor, Tensor]:  # noqa: E741
    """Terms of N, and log of q^a p^(1-a), -inf where that is 0."""
    t, joint = 1 - order, p.support & q.support
    _, largest = limits(l.dtype)
    close, apart = l.clamp(-1, 1), t * (p.prob - q.prob)
    near = q.prob * (t * Gap.apply(close) - Gap.apply(t * close))
    # what is cut off here is beyond any use of N
    below = apart - q.prob * torch.expm1((t * l.clamp(max=-1)).clamp(max=largest))
    above = q.prob + apart - p.prob * torch.exp(-order * l.clamp(min=1))
    lost = torch.where(l > 1, above, torch.where(l < -1, below, near))
    log_p, log_q = (s.exponent - s.log_mass for s in (p, q))
    kept = torch.where(l > 1, log_p - order * l, log_q + t * l)
    return torch.where(joint, lost, q.prob + apart), torch.where(joint, kept, -torch.inf)


def terms(name: str, parameter: float | None, p: Softmax, q: Softmax, l: Tensor) -> Tensor:  # noqa: E741
    """What is summed over the vocabulary, [n, V]."""
    if name == "tvd":
        return _variation(p, q, l)
    if name in ("hellinger", "renyi"):
        return _affinity(p, q, l, 0.5 if name == "hellinger" else _given(name, parameter))[0]
    weight = _given(name, parameter)
    to_q = _to_mixture(p, q, l, weight)
    if name == "skew_kl":
        return to_q
    if name != "jsd":
        raise ValueError(f"the reference backend has no field {name!r}")
    return weight * to_q + (1 - weight) * _to_mixture(q, p, -l, 1 - weight)


def _given(name: str, parameter: float | None) -> float:
    if parameter is None:
        raise ValueError(f"field {name} needs a parameter")
    return parameter


def value(name: str, parameter: float | None, p: Softmax, q: Softmax, l: Tensor) -> Tensor:  # noqa: E741
    """The divergence of every row [n, 1]; +inf where the supports say so."""
    total = row_sum(terms(name, parameter, p, q, l))
    if name == "hellinger":
        # Where the rows hardly overlap, the gradients of the terms of N all but cancel. Not expm1,
        # whose derivative is expm1 + 1.
        small = total < 0.5
        log_z = torch.where(small, 0, _log_sum(_affinity(p, q, l, 0.5)[1]))
        return torch.where(small, total, 1 - log_z.exp())
    if name != "renyi":
        return total
    order = _given(name, parameter)
    found = _renyi(total, _log_sum(_affinity(p, q, l, order)[1]), order)
    if order > 1:
        found = torch.where((q.support & ~p.support).any(-1, keepdim=True), torch.inf, found)
    return found


def _log_sum(exponents: Tensor) -> Tensor:
    """log sum e^exponent over the last dim; -inf where all are."""
    top = exponents.detach().amax(-1, keepdim=True)
    top = torch.where(top.isfinite(), top, 0)
    here = exponents > -torch.inf
    total = row_sum(torch.where(here, torch.exp(torch.where(here, exponents - top, 0)), 0))
    return top + torch.where(total > 0, torch.log(torch.where(total > 0, total, 1)), -torch.inf)


def _renyi(lost: Tensor, log_kept: Tensor, order: float) -> Tensor:
    """By N or by the logarithm of 1 - N, whichever has the digits."""
    small = lost.abs() < 0.5
    none = log_kept.isinf()
    log_z = torch.where(
        small,
        torch.log1p(-torch.where(small, lost, 0)),
        torch.where(small | none, 0, log_kept),
    )
    return torch.where(none, torch.inf, log_z / (order - 1))


def value_of_sums(name: str, parameter: float | None, found: Tensor) -> Tensor:
    """The divergence of every row [n] from [n, 3] of operator row_sums, of all its slices."""
    total, kept, _ = found.unbind(-1)
    if name == "renyi":
        total = _renyi(total, torch.log(kept), _given(name, parameter))
    return total.clamp(0, 1 if name == "hellinger" else None)


def sums(name: str, parameter: float | None, p: Softmax, q: Softmax, l: Tensor) -> Tensor:  # noqa: E741
    """[n, 3] of operator row_sums; the derivatives of a term by p and q by autograd.

    The value is the sum of both means: every term is homogeneous of degree 1 in p and q.
    """
    if name in ("hellinger", "renyi"):
        order = 0.5 if name == "hellinger" else _given(name, parameter)
        lost, kept = _affinity(p, q, l, order)
        lost, kept = row_sum(lost), row_sum(torch.exp(kept))
        if order > 1:
            beyond = torch.where((q.support & ~p.support).any(-1, keepdim=True), torch.inf, 0.0)
            lost, kept = lost - beyond, kept + beyond
        return torch.cat([lost, kept, torch.zeros_like(lost)], -1)
    if name == "tvd":
        above = p.support & ((l > 0) | ~q.support)
        below = (torch.where(above, 0, p.prob), torch.where(above, q.prob, 0))
        return torch.cat([row_sum(t) for t in (_variation(p, q, l), *below)], -1)
    with torch.enable_grad():
        log_p = torch.zeros_like(l, requires_grad=True)  # of what p is multiplied by
        moved = p._replace(prob=p.prob * log_p.exp())
        each = terms(name, parameter, moved, q, l + log_p)
        (policy,) = torch.autograd.grad(each.sum(), log_p)
    total, slope = row_sum(each.detach()), row_sum(policy)
    return torch.cat([total, slope, total - slope], -1)
