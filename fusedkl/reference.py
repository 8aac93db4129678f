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

import torch
from torch import Tensor

from . import divergences, reference_family
from .reference_parts import Gap, Softmax, log_ratio, row_sum, softmax
from .reference_parts import gap as gap
from .reference_parts import pull as pull

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
    "logit_sum",
    "tokens",
    "divergence",
    "policy_slope",
    "reference_slope",
)


def inside(device: torch.device) -> torch.dtype:
    """The dtype of the arithmetic, of the state and of 1/T: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def result_dtype(policy: Tensor, reference: Tensor | None) -> torch.dtype:
    """float64 if either input is, else float32."""
    double = policy.dtype == torch.float64
    double = double or (reference is not None and reference.dtype == torch.float64)
    return torch.float64 if double else torch.float32


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
    nothing = -(p.log_mass + p.top * scale)  # slopes as a token elsewhere: see _at_tokens
    nothing = nothing - nothing.detach() - torch.inf
    values = torch.cat([torch.where(given, tokens, 0), torch.where(rest.bad, nothing, others)], -1)
    values = torch.where(p.bad, torch.nan, values)
    if torch.is_grad_enabled():
        values = values + pull(x, torch.where(p.bad, torch.nan, 0.0).expand_as(x))
    return values if mask is None else torch.where(mask[:, None], values, 0)


def _forward_kl(p: Softmax, q: Softmax, log_ratio: Tensor) -> Tensor:
    near = q.prob * Gap.apply(log_ratio.clamp(max=1))
    # Beyond 1, q e^l is taken from p: it may be 0 times infinity, and no longer cancels.
    far = p.prob - q.prob - q.prob * log_ratio
    terms = torch.where(log_ratio <= 1, near, far)
    return row_sum(torch.where(p.support & q.support, terms, p.prob))


def _entropy(p: Softmax) -> Tensor:
    # Both terms are >= 0; -sum p log p, or logsumexp less a mean, would cancel on peaked rows.
    return p.log_mass + row_sum(p.weight * -p.exponent) / p.mass


def capped(x: Tensor, softcap: float) -> Tensor:
    # -inf is an absent token, not a logit of -softcap; its slope is that of the cap, 0
    absent = torch.where(x == -torch.inf, x, 0).detach()
    return softcap * torch.tanh(x / softcap) + absent


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
        x = capped(x, softcap)
        y = None if y is None else capped(y, softcap)

    p = softmax(x, scale)
    columns = {"policy_max": p.top * scale, "policy_log_sum": _marked(p)}
    q, ratio = None, None
    if y is not None:
        q = softmax(y, scale)
        ratio, columns["residual"] = log_ratio(p, q, scale)
        columns |= {"reference_max": q.top * scale, "reference_log_sum": _marked(q)}
    columns["whole"] = torch.ones_like(p.mass)

    values = []
    for name in fields:
        field = divergences.FIELDS[name]
        bad = p.bad if field.side != "reference" else x.new_zeros(p.bad.shape, dtype=torch.bool)
        if field.side != "policy":
            assert q is not None
            bad = bad | q.bad
        value = _value(name, parameter, x, y, p, q, ratio, scale, token_ids)
        # An infinite divergence still pulls the policy towards the reference.
        pulled = torch.zeros_like(bad)
        if field.side == "both" and not field.needs_token_ids:
            pulled = value == torch.inf
        value = torch.where(bad, torch.nan, value)
        if torch.is_grad_enabled():  # rows without a number: the gradients of the conventions
            lost = torch.where(bad, torch.nan, 0.0)
            if field.side != "reference":
                slope = lost
                if q is not None:
                    slope = torch.where(pulled & ~bad, (p.prob - q.prob) * scale, lost)
                value = value + pull(x, slope.expand_as(x))
            if field.side != "policy":
                assert y is not None
                value = value + pull(y, lost.expand_as(x))
        if mask is not None:
            value = torch.where(mask[:, None], value, 0)
        if field.column is not None:
            columns[field.column] = value.detach()
        values.append(value)
    return torch.cat(values, -1).t(), columns


def _value(
    name: str,
    parameter: float | None,
    x: Tensor,
    y: Tensor | None,
    p: Softmax,
    q: Softmax | None,
    ratio: Tensor | None,
    scale: Tensor,
    token_ids: Tensor | None,
) -> Tensor:
    """One field of every row, [n, 1] or [n, K]."""
    if name == "entropy":
        return _entropy(p)
    if name == "logsumexp":
        return p.top * scale + p.log_mass
    if name == "mean_logprob":
        absent = -torch.inf + (p.top.detach() - p.top) * scale  # below the top as the others are
        below = torch.where(p.support, (x - p.top) * scale, absent)
        return row_sum(below) / x.shape[-1] - p.log_mass
    if name == "logprob":
        return _at_tokens(x, p, scale, token_ids)
    assert y is not None and q is not None and ratio is not None
    if name == "ref_entropy":
        return _entropy(q)
    if name == "ref_logsumexp":
        return q.top * scale + q.log_mass
    if name == "ref_logprob":
        return _at_tokens(y, q, scale, token_ids)
    if name == "log_ratio":
        own = _at_tokens(x, p, scale, token_ids) - _at_tokens(y, q, scale, token_ids)
        assert token_ids is not None
        inside_ = token_ids >= 0
        at = token_ids.clamp(0, x.shape[-1] - 1)
        joint = (p.support & q.support).gather(-1, at) & inside_
        # the centred value with the derivative of the plain one
        exact = torch.where(joint, ratio.detach().gather(-1, at), own.detach())
        return torch.where(joint, exact + (own - own.detach()), own)
    if name in ("forward_kl", "reverse_kl"):
        first, second, sign = (q, p, 1) if name == "forward_kl" else (p, q, -1)
        value = _forward_kl(second, first, sign * ratio)
        infinite = (first.support & ~second.support).any(-1, keepdim=True)
        return torch.where(infinite, torch.inf, value)
    return reference_family.value(name, parameter, p, q, ratio)


def _at_tokens(x: Tensor, p: Softmax, scale: Tensor, token_ids: Tensor | None) -> Tensor:
    """log p of token ids [n, K]; 0 at id -1, whose gradient is that of a token elsewhere."""
    assert token_ids is not None
    # ids of masked rows may be anything
    chosen = x.gather(-1, token_ids.clamp(0, x.shape[-1] - 1))
    elsewhere = -(p.log_mass + p.top * scale).expand_as(chosen)
    value = (chosen - p.top) * scale - p.log_mass
    value = torch.where(token_ids >= 0, value, elsewhere - elsewhere.detach())
    # where nobody has looked at the ids: a token that there is not
    return torch.where((token_ids < -1) | (token_ids >= x.shape[-1]), torch.nan, value)


def sums_of_rows(
    policy: Tensor,
    reference: Tensor,
    state: Tensor,
    field: str,
    parameter: float | None,
    inv_temperature: Tensor | None,
    valid_vocab: int | None,
    softcap: float | None,
) -> Tensor:
    """[n, 3] of operator row_sums over a slice [n, V], given the state of the whole rows."""
    dtype = inside(policy.device)
    scale = state.new_ones(1, 1) if inv_temperature is None else inv_temperature.to(dtype)[:, None]
    column = {name: state[:, i : i + 1] for i, name in enumerate(STATE)}

    def side(t: Tensor, name: str) -> Softmax:
        t = t[:, :valid_vocab].to(dtype)
        t = t if softcap is None else capped(t, softcap)
        about = column[f"{name}_max"] / scale
        log_mass = column[f"{name}_log_sum"]
        prob = torch.exp((t - about) * scale - log_mass)
        nothing = torch.zeros_like(about)
        none = nothing.bool()
        support = t != -torch.inf
        logits = torch.where(support, t, 0)
        exponent = torch.where(support, (logits - about) * scale, 0)
        return Softmax(none, none, support, logits, about, exponent, prob, nothing, log_mass, prob)

    p, q = side(policy, "policy"), side(reference, "reference")
    joint = p.support & q.support
    ratio = ((p.logits - q.logits) - column["centre"]) * scale - column["residual"]
    return reference_family.sums(field, parameter, p, q, torch.where(joint, ratio, 0))


def with_sums(state: Tensor, sums: Tensor, field: str, parameter: float | None) -> Tensor:
    """The state [n, S] of whole rows, with the sums [n, 3] of operator row_sums put in."""
    column = dict(zip(STATE, state.unbind(-1), strict=True))
    value = reference_family.value_of_sums(field, parameter, sums)
    # not a distribution: no number of the pair
    column["divergence"] = torch.where(column["residual"].isfinite(), value, torch.nan)
    column["policy_slope"], column["reference_slope"] = sums[:, 1], sums[:, 2]
    return torch.stack([column[name] for name in STATE], -1)
