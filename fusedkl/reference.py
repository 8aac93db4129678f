"""The mathematics in plain torch: float64 inside, differentiable any number of times by autograd.

One of the three places where it stands (the others: csrc/row_math.h and the Triton module). Behind
the reference backend (reference_backend.py) and behind double backward on every backend.

    x, y     policy and reference logits of a row, T temperature; p = softmax(x/T), q = softmax(y/T)
    l        log(p/q), from the difference x - y centred before anything is subtracted from it
    g(u)     expm1(u) - u >= 0

    forward_kl = KL(q || p) = sum q g(l)         reverse_kl = KL(p || q) = sum p g(-l)

Both sums have non-negative terms only, and an error of l that is the same for all tokens (that of
the log-ratio of the normalisers) enters to second order: small divergences keep their digits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

# Columns of the state tensor, in the order of RowState in csrc/row_math.h. A release that changes
# their number renames the operators: compile caches on disk know an operator by its name only.
STATE = (
    "policy_max",
    "policy_log_sum",
    "reference_max",
    "reference_log_sum",
    "centre",
    "residual",
    "forward_kl",
    "reverse_kl",
    "entropy",
    "reference_entropy",
    "whole",
)


def inside(device: torch.device) -> torch.dtype:
    """The dtype of the arithmetic, of the state and of 1/T: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def result_dtype(policy: Tensor, reference: Tensor | None) -> torch.dtype:
    """float64 if either input is, else float32."""
    double = policy.dtype == torch.float64
    double = double or (reference is not None and reference.dtype == torch.float64)
    return torch.float64 if double else torch.float32


def _limits(dtype: torch.dtype) -> tuple[float, float]:
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


class _Gap(torch.autograd.Function):
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
        return grads[0] * ctx.saved_tensors[0], None


def gap(u: Tensor) -> Tensor:
    """g(u) of every element, differentiable any number of times."""
    out: Tensor = _Gap.apply(u)
    return out


def row_sum(x: Tensor) -> Tensor:
    total: Tensor = _RowSum.apply(x)
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
    far, _ = _limits(x.dtype)
    exponent = torch.where(others, ((logits - top) * scale).clamp(min=-far), 0)
    weight = torch.where(others, torch.exp(exponent), 0)
    rest = row_sum(weight)
    weight = torch.where(is_top, 1, weight)
    mass = 1 + rest
    log_mass = torch.log1p(rest)
    prob = weight / mass
    return Softmax(bad, empty, support, logits, top, exponent, weight, mass, log_mass, prob)


def _marked(p: Softmax) -> Tensor:
    """log_mass for the state: -inf for a row without any token, NaN for one with no number."""
    missing = torch.where(p.empty, -torch.inf, torch.nan)
    return torch.where(p.bad, missing, p.log_mass)


def fisher_vector(x: Tensor, v: Tensor, scale: Tensor) -> Tensor:
    """(diag(p) - p p^T) v scale^2, p = softmax(x scale); x, v [..., V], scale [..., 1]."""
    p = softmax(x, scale)
    v = v - v.gather(-1, x.argmax(-1, keepdim=True))  # a constant must not swallow what varies
    mean = row_sum(torch.where(p.support, p.prob * v, 0))
    product = torch.where(p.support, p.prob * (v - mean), 0) * (scale * scale)
    return torch.where(p.bad, torch.nan, product)


def topk_logprobs(
    policy: Tensor, token_ids: Tensor, inv_temperature: Tensor | None, mask: Tensor | None
) -> Tensor:
    """[n, K + 1]: log p of the tokens (0 where token_ids < 0), and log of the mass of all others.

    policy [n, V]; token_ids [n, K]; inv_temperature [n] or [1]; mask [n].
    """
    dtype = inside(policy.device)
    x = policy.to(dtype)
    scale = x.new_ones(1, 1) if inv_temperature is None else inv_temperature.to(dtype)[:, None]
    if mask is not None:
        x = torch.where(mask[:, None], x, 0)
    given = token_ids >= 0
    at = torch.where(given, token_ids, x.shape[-1])  # padding goes to one column more
    covered = torch.zeros_like(x[:, :1], dtype=torch.bool).expand(-1, x.shape[-1] + 1)
    covered = covered.scatter(-1, at, True)[:, :-1]
    p, rest = softmax(x, scale), softmax(torch.where(covered, -torch.inf, x), scale)
    tokens = (x.gather(-1, token_ids.clamp(min=0)) - p.top) * scale - p.log_mass
    others = (rest.top - p.top) * scale + (rest.log_mass - p.log_mass)
    values = torch.cat(
        [torch.where(given, tokens, 0), torch.where(rest.bad, -torch.inf, others)], -1
    )
    values = torch.where(p.bad, torch.nan, values)
    if torch.is_grad_enabled():
        values = values + _Pull.apply(x, torch.where(p.bad, torch.nan, 0.0).expand_as(x))
    return values if mask is None else torch.where(mask[:, None], values, 0)


def pull(x: Tensor, slope: Tensor) -> Tensor:
    """Zeros [n, 1] with gradient `slope` to x [n, V]: what rows without a number have."""
    out: Tensor = _Pull.apply(x, slope)
    return out


def _log_ratio(p: Softmax, q: Softmax, scale: Tensor) -> tuple[Tensor, Tensor]:
    """log(p/q) on the joint support (0 elsewhere), and lse(x/T) - lse(y/T) [n, 1]."""
    far, largest = _limits(p.prob.dtype)
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


def _forward_kl(p: Softmax, q: Softmax, log_ratio: Tensor) -> Tensor:
    near = q.prob * gap(log_ratio.clamp(max=1))
    # Beyond 1, q e^l is taken from p: it may be 0 times infinity, and no longer cancels.
    far = p.prob - q.prob - q.prob * log_ratio
    terms = torch.where(log_ratio <= 1, near, far)
    return row_sum(torch.where(p.support & q.support, terms, p.prob))


def _reverse_kl(p: Softmax, q: Softmax, log_ratio: Tensor) -> Tensor:
    return _forward_kl(q, p, -log_ratio)


def _entropy(p: Softmax) -> Tensor:
    # Both terms are >= 0; -sum p log p, or logsumexp less a mean, would cancel on peaked rows.
    return p.log_mass + row_sum(p.weight * -p.exponent) / p.mass


def _capped(x: Tensor, softcap: float) -> Tensor:
    # -inf is an absent token, not a logit of -softcap
    finite = x != -torch.inf
    return torch.where(finite, softcap * torch.tanh(torch.where(finite, x, 0) / softcap), x)


def rows(
    policy: Tensor,
    reference: Tensor | None,
    token_ids: Tensor | None,
    fields: list[str] | tuple[str, ...],
    parameter: float | None,
    inv_temperature: Tensor | None,
    mask: Tensor | None,
    valid_vocab: int | None,
    softcap: float | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Values [R, n], differentiable any number of times, and the state's columns [n, 1].

    policy, reference [n, V]; token_ids [n, K]; inv_temperature [n] or [1]; mask [n].
    """
    dtype = inside(policy.device)
    x = policy[:, :valid_vocab].to(dtype)
    y = None if reference is None else reference[:, :valid_vocab].to(dtype)
    scale = x.new_ones(1, 1) if inv_temperature is None else inv_temperature.to(dtype)[:, None]
    if mask is not None:  # before any arithmetic: a masked row may hold NaN
        x = torch.where(mask[:, None], x, 0)
        y = None if y is None else torch.where(mask[:, None], y, 0)
    if softcap is not None:
        x = _capped(x, softcap)
        y = None if y is None else _capped(y, softcap)

    p = softmax(x, scale)
    columns = {"policy_max": p.top * scale, "policy_log_sum": _marked(p)}
    q = None
    if y is not None:
        q = softmax(y, scale)
        ratio, columns["residual"] = _log_ratio(p, q, scale)
        columns |= {"reference_max": q.top * scale, "reference_log_sum": _marked(q)}
    columns["whole"] = torch.ones_like(p.mass)

    values = []
    for name in fields:
        bad_y: Tensor | None = None
        slope: Tensor | float = 0.0
        if name in ("forward_kl", "reverse_kl"):
            assert q is not None
            if name == "forward_kl":
                value = _forward_kl(p, q, ratio)
                infinite = (q.support & ~p.support).any(-1, keepdim=True)
            else:
                value = _reverse_kl(p, q, ratio)
                infinite = (p.support & ~q.support).any(-1, keepdim=True)
            # An infinite row still pulls the policy towards the reference.
            value = torch.where(infinite, torch.inf, value)
            slope = torch.where(infinite, (p.prob - q.prob) * scale, 0)
            bad_y = q.bad
        elif name == "entropy":
            value = _entropy(p)
        elif name == "logsumexp":
            value = p.top * scale + p.log_mass
        elif name == "logprob":
            assert token_ids is not None
            value = (x.gather(-1, token_ids) - p.top) * scale - p.log_mass
        else:
            raise ValueError(f"the reference backend has no field {name!r}")
        bad = p.bad if bad_y is None else p.bad | bad_y
        value = torch.where(bad, torch.nan, value)
        if torch.is_grad_enabled():  # rows without a number: the gradients of the conventions
            value = value + _Pull.apply(x, torch.where(bad, torch.nan, slope).expand_as(x))
            if y is not None and bad_y is not None:
                value = value + _Pull.apply(y, torch.where(bad, torch.nan, 0.0).expand_as(y))
        if mask is not None:
            value = torch.where(mask[:, None], value, 0)
        if name in STATE:
            columns[name] = value
        values.append(value)
    return torch.cat(values, -1).t(), columns
