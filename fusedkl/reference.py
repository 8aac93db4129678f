"""The reference backend: every number in plain torch, float64 inside, gradients by autograd only.

It is the portable fallback, the composition behind double backward, and one of the three places where
the mathematics stands (the others: csrc/row_math.h and the Triton module). Written for accuracy; it
makes many temporaries of a block of rows.

    x, y     policy and reference logits of a row, T temperature; p = softmax(x/T), q = softmax(y/T)
    l        log(p/q), from the difference x - y centred before anything is subtracted from it
    g(u)     expm1(u) - u >= 0

    forward_kl = KL(q || p) = sum q g(l)         reverse_kl = KL(p || q) = sum p g(-l)

Both sums have non-negative terms only, and an error of l that is the same for all tokens (that of the
log-ratio of the normalisers) enters to second order: small divergences keep their digits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Columns of the state tensor, in the order of RowState in csrc/row_math.h.
STATE = (
    "policy_max",
    "policy_log_sum",
    "reference_max",
    "reference_log_sum",
    "log_ratio",
    "forward_kl",
    "reverse_kl",
    "entropy",
    "reference_entropy",
)

# Elements of a block of rows: 16 MiB a temporary. A row's numbers do not depend on its block.
_BLOCK = 2**21


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
        return torch.where(near, series * v * v / 2, torch.expm1(u) - u)

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


def _row_sum(x: Tensor) -> Tensor:
    total: Tensor = _RowSum.apply(x)
    return total


class _Softmax(NamedTuple):
    """Rows about their largest logit, [n, V] and [n, 1]. A bad row holds harmless numbers."""

    bad: Tensor  # [n, 1] the row has NaN, +inf, or nothing but -inf
    support: Tensor  # logit is not -inf
    logits: Tensor  # 0 outside the support
    top: Tensor  # [n, 1] the largest logit
    exponent: Tensor  # (logit - top) / T <= 0; 0 outside the support
    weight: Tensor  # exp(exponent); 0 outside the support
    mass: Tensor  # [n, 1] sum of the weights
    log_mass: Tensor  # [n, 1] by log1p of all but the top: a peaked row keeps its digits
    prob: Tensor


def _softmax(x: Tensor, scale: Tensor) -> _Softmax:
    top, at = x.max(-1, keepdim=True)
    bad = ~torch.isfinite(top)
    top = torch.where(bad, 0, top)
    support = (x != -torch.inf) & ~bad
    logits = torch.where(support, x, 0)
    # The top's exponent and weight are the constants 0 and 1: its derivative is then minus the sum of
    # the others', without cancellation on a peaked row.
    is_top = torch.zeros_like(support).scatter(-1, at, True) & ~bad
    others = support & ~is_top
    far, _ = _limits(x.dtype)
    exponent = torch.where(others, ((logits - top) * scale).clamp(min=-far), 0)
    weight = torch.where(others, torch.exp(exponent), 0)
    rest = _row_sum(weight)
    weight = torch.where(is_top, 1, weight)
    mass = 1 + rest
    log_mass = torch.log1p(rest)
    prob = weight / mass
    return _Softmax(bad, support, logits, top, exponent, weight, mass, log_mass, prob)


def _log_ratio(p: _Softmax, q: _Softmax, scale: Tensor) -> tuple[Tensor, Tensor]:
    """log(p/q) on the joint support (0 elsewhere), and lse(x/T) - lse(y/T) [n, 1]."""
    far, largest = _limits(p.prob.dtype)
    joint = p.support & q.support
    with torch.no_grad():
        # Two centres, neither of which changes the ratio: one token's own difference, so that a
        # constant difference becomes exactly 0, then the reference-weighted mean of what is left.
        difference = torch.where(joint, p.logits - q.logits, 0)
        at = torch.where(joint, q.exponent, -torch.inf).argmax(-1, keepdim=True)
        anchor = difference.gather(-1, at)
        left = torch.where(joint, ((difference - anchor) * scale).clamp(-far, far), 0)
        q_joint = torch.where(joint, q.prob, 0)
        mass = _row_sum(q_joint)
        mean = torch.where(mass > 0, _row_sum(q_joint * left) / mass, 0)
        mean = torch.where(mean.abs() <= 1, mean, 0)  # a far one would swallow what it centres
        u = torch.where(joint, left - mean, 0)
        # lse(x/T) - lse(y/T) about the centres = log1p(sum q expm1(u) + p alone - q alone), which is
        # relatively accurate; where that overflows or cancels, the plain form is accurate enough.
        tops = ((p.top - q.top) - anchor) * scale - mean
        p_alone = torch.where(p.support, torch.exp((p.exponent + tops).clamp(max=largest)), 0)
        p_alone = p_alone * torch.exp(-q.log_mass)
        excess = torch.where(joint, q_joint * torch.expm1(u.clamp(max=largest)), p_alone - q.prob)
        z = _row_sum(excess)
        fits = (u.amax(-1, keepdim=True) <= largest) & (mass > 0) & (z > -0.5) & (z < torch.inf)
        centred = torch.where(fits, torch.log1p(z.clamp(min=-0.5)), tops + p.log_mass - q.log_mass)
        value = u - centred
        normalisers = anchor * scale + mean + centred
    # The centred value with the derivative of the plain one.
    plain = (p.exponent - p.log_mass) - (q.exponent - q.log_mass)
    return torch.where(joint, value + (plain - plain.detach()), 0), normalisers


def _forward_kl(p: _Softmax, q: _Softmax, log_ratio: Tensor) -> Tensor:
    near = q.prob * _Gap.apply(log_ratio.clamp(max=1))
    # Beyond 1, q e^l is taken from p: it may be 0 times infinity, and no longer cancels.
    far = p.prob - q.prob - q.prob * log_ratio
    terms = torch.where(log_ratio <= 1, near, far)
    return _row_sum(torch.where(p.support & q.support, terms, p.prob))


def _reverse_kl(p: _Softmax, q: _Softmax, log_ratio: Tensor) -> Tensor:
    return _forward_kl(q, p, -log_ratio)


def _entropy(p: _Softmax) -> Tensor:
    # Both terms are >= 0; -sum p log p, or logsumexp less a mean, would cancel on peaked rows.
    return p.log_mass + _row_sum(p.weight * -p.exponent) / p.mass


def rows(
    policy: Tensor,
    reference: Tensor | None,
    token_ids: Tensor | None,
    fields: list[str] | tuple[str, ...],
    inv_temperature: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Values [R, n], differentiable any number of times, and the state's columns [n, 1].

    policy, reference [n, V]; token_ids [n, K]; inv_temperature [n] or [1]; mask [n].
    """
    dtype = inside(policy.device)
    x = policy.to(dtype)
    y = None if reference is None else reference.to(dtype)
    scale = x.new_ones(1, 1) if inv_temperature is None else inv_temperature.to(dtype)[:, None]
    if mask is not None:  # before any arithmetic: a masked row may hold NaN
        x = torch.where(mask[:, None], x, 0)
        y = None if y is None else torch.where(mask[:, None], y, 0)

    p = _softmax(x, scale)
    columns = {"policy_max": p.top * scale, "policy_log_sum": p.log_mass}
    q = None
    if y is not None:
        q = _softmax(y, scale)
        ratio, columns["log_ratio"] = _log_ratio(p, q, scale)
        columns |= {"reference_max": q.top * scale, "reference_log_sum": q.log_mass}

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


def _blocks(rows_: int, width: int) -> Iterator[slice]:
    step = max(1, _BLOCK // width)
    for at in range(0, max(rows_, 1), step):  # one empty block where there are no rows
        yield slice(at, min(at + step, rows_))


def _part(t: Tensor | None, part: slice) -> Tensor | None:
    return t if t is None or t.shape[0] == 1 else t[part]


def _flat(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().reshape(-1, t.shape[-1])


def row_stats(
    policy: Tensor,
    reference: Tensor | None,
    token_ids: Tensor | None,
    fields: list[str],
    inv_temperature: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Operator `row_stats` (fusedkl/ops.py)."""
    x, y = _flat(policy), _flat(reference)
    assert x is not None
    values = []
    state = x.new_zeros((x.shape[0], len(STATE)), dtype=inside(x.device))
    with torch.no_grad():
        for part in _blocks(*x.shape):
            ids, inv, counted = (_part(t, part) for t in (token_ids, inv_temperature, mask))
            block, columns = rows(
                x[part], None if y is None else y[part], ids, fields, inv, counted
            )
            values.append(block)
            for name, column in columns.items():
                kept = column if counted is None else torch.where(counted[:, None], column, 0)
                state[part, STATE.index(name)] = kept.squeeze(-1)
        dtype = result_dtype(policy, reference)
        return torch.cat(values, -1).to(dtype).contiguous(), state


def row_stats_backward(
    grad: Tensor,
    policy: Tensor,
    reference: Tensor | None,
    token_ids: Tensor | None,
    state: Tensor,
    fields: list[str],
    inv_temperature: Tensor | None,
    policy_grad: bool,
    reference_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Operator `row_stats_backward` (fusedkl/ops.py): autograd through `rows`."""
    x, y = _flat(policy), _flat(reference)
    assert x is not None
    outputs = [
        torch.empty(t.shape if t is not None and wanted else 0, dtype=t.dtype, device=t.device)
        if t is not None
        else x.new_empty(0)
        for t, wanted in ((policy, policy_grad), (reference, reference_grad))
    ]
    flat = [t.view(x.shape) if t.dim() > 1 else None for t in outputs]
    for part in _blocks(*x.shape):
        with torch.enable_grad():
            inputs = [t if t is None else t[part].detach() for t in (x, y)]
            wanted = [(t, o) for t, o in zip(inputs, flat, strict=True) if o is not None]
            for t, _ in wanted:
                t.requires_grad_(True)
            ids, inv = (_part(t, part) for t in (token_ids, inv_temperature))
            values, _ = rows(inputs[0], inputs[1], ids, fields, inv, None)
        upstream = grad[:, part]
        found = torch.autograd.grad(values, [t for t, _ in wanted], upstream.to(values.dtype))
        live = (upstream != 0).any(0)[:, None]  # 0 times the NaN of a bad row would be NaN
        for (_, out), g in zip(wanted, found, strict=True):
            out[part] = torch.where(live, g, 0)
    return outputs[0], outputs[1]


def row_stats_backward_(
    grad: Tensor,
    policy: Tensor,
    reference: Tensor | None,
    token_ids: Tensor | None,
    state: Tensor,
    fields: list[str],
    inv_temperature: Tensor | None,
    reference_grad: bool,
) -> Tensor:
    """Operator `row_stats_backward_` (fusedkl/ops.py); this backend computes beside, then copies."""
    policy_out, reference_out = row_stats_backward(
        grad, policy, reference, token_ids, state, fields, inv_temperature, True, reference_grad
    )
    policy.copy_(policy_out)
    return reference_out


def log_softmax(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Operator `log_softmax` (fusedkl/ops.py)."""
    x = _flat(logits)
    assert x is not None
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    for part in _blocks(*x.shape):
        block = x[part].to(inside(x.device))
        p = _softmax(block, block.new_ones(1, 1))
        out[part] = torch.where(p.bad, torch.nan, (block - p.top) - p.log_mass)
    return out.view(logits.shape)


def log_softmax_backward(grad: Tensor, output: Tensor, dtype: torch.dtype) -> Tensor:
    """Operator `log_softmax_backward` (fusedkl/ops.py): grad - exp(output) sum(grad)."""
    g, z = _flat(grad), _flat(output)
    assert g is not None and z is not None
    out = torch.empty(z.shape, dtype=dtype, device=z.device)
    for part in _blocks(*z.shape):
        upstream = g[part].to(inside(z.device))
        out[part] = upstream - torch.exp(z[part].to(upstream.dtype)) * _row_sum(upstream)
    return out.view(output.shape)


def ordered_sum(values: Tensor, weight: Tensor | None) -> Tensor:
    """Operator `ordered_sum` (fusedkl/ops.py)."""
    terms = values.to(inside(values.device))
    if weight is not None:
        terms = terms * weight.to(terms.dtype)
    return _row_sum(terms).squeeze(-1).to(values.dtype)
