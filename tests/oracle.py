"""The truth, in 60 digits, for one small row at a time; and the tolerances of the promises.

It evaluates the definitions as they stand (log-probabilities, then sums), shares no formula with
the package, and states the conventions at the edges in its own words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import mpmath
import torch
from torch import Tensor

# Relative L2 of a gradient, by the dtype it is stored in (DESIGN promise 2).
GRADIENT_TOLERANCE = {
    torch.float64: 1e-8,
    torch.float32: 1e-5,
    torch.bfloat16: 4e-3,
    torch.float16: 1e-3,
}
# Relative error of a value, by the dtype of the result, never of the inputs: they are exact.
# float64: a difference of two logits of 1e4 is itself rounded by 1e-12.
VALUE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


@dataclass
class Row:
    """Numbers of one row and their gradients, (to the policy, to the reference)."""

    values: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)
    log_prob: list[float] = field(default_factory=list)


def log_probs(logits: Sequence[float], temperature: float) -> tuple[list[mpmath.mpf], mpmath.mpf]:
    scaled = [mpmath.mpf(v) / mpmath.mpf(temperature) for v in logits]
    top = max(scaled)
    total = mpmath.fsum(mpmath.exp(v - top) for v in scaled)
    lse = top + mpmath.log(total)
    return [v - lse for v in scaled], lse


def _number(value: mpmath.mpf) -> float:
    return float(value)


def _has_no_number(logits: Sequence[float]) -> bool:
    return any(math.isnan(v) or v == math.inf for v in logits) or max(logits) == -math.inf


def _kl(log_a: list[mpmath.mpf], log_b: list[mpmath.mpf]) -> mpmath.mpf:
    total = mpmath.mpf(0)
    for a, b in zip(log_a, log_b, strict=True):
        if a != -mpmath.inf:
            total += mpmath.inf if b == -mpmath.inf else mpmath.exp(a) * (a - b)
    return total


def row(
    policy: Sequence[float], reference: Sequence[float] | None = None, temperature: float = 1.0
) -> Row:
    """Values and gradients of every field of one row; lists of floats in, floats out."""
    out = Row()
    n, nan = len(policy), math.nan
    zeros = [0.0] * n
    with mpmath.workdps(60):
        t = mpmath.mpf(temperature)
        if _has_no_number(policy):
            for name in ("entropy", "logsumexp"):
                out.values[name], out.gradients[name] = nan, ([nan] * n, zeros)
            out.log_prob = [nan] * n
        else:
            lp, lse = log_probs(policy, temperature)
            p = [mpmath.exp(v) for v in lp]
            h = -mpmath.fsum(a * b for a, b in zip(p, lp, strict=True) if a > 0)
            out.values = {"entropy": _number(h), "logsumexp": _number(lse)}
            slope = [-a * (b + h) / t if a > 0 else 0 for a, b in zip(p, lp, strict=True)]
            out.gradients["entropy"] = ([float(v) for v in slope], zeros)
            out.gradients["logsumexp"] = ([float(a / t) for a in p], zeros)
            out.log_prob = [float(v) for v in lp]
        if reference is None:
            return out
        if _has_no_number(policy) or _has_no_number(reference):
            for name in ("forward_kl", "reverse_kl"):
                out.values[name], out.gradients[name] = nan, ([nan] * n, [nan] * n)
            return out
        lq, _ = log_probs(reference, temperature)
        q = [mpmath.exp(v) for v in lq]
        for name, value in (("forward_kl", _kl(lq, lp)), ("reverse_kl", _kl(lp, lq))):
            out.values[name] = _number(value)
            gap = [(a - b) / t for a, b in zip(p, q, strict=True)]
            if value == mpmath.inf:  # still pulls the policy to the reference
                out.gradients[name] = ([float(v) for v in gap], zeros)
                continue
            ratio = [
                a - b if mpmath.isfinite(a) and mpmath.isfinite(b) else mpmath.mpf(0)
                for a, b in zip(lp, lq, strict=True)
            ]
            if name == "forward_kl":
                gx = gap
                gy = [-b * (r + value) / t for b, r in zip(q, ratio, strict=True)]
            else:
                gx = [a * (r - value) / t for a, r in zip(p, ratio, strict=True)]
                gy = [-v for v in gap]
            out.gradients[name] = ([float(v) for v in gx], [float(v) for v in gy])
    return out


def fields(
    policy: Tensor, reference: Tensor | None = None, temperature: float | Tensor = 1.0
) -> dict[str, Tensor]:
    """Values [N] and gradients [N, V] ("d_<field>", "d_<field>_reference") of rows, in float64.

    policy, reference [N, V]; every element is taken as the exact number it is.
    """
    n = policy.shape[0]
    temperatures = torch.as_tensor(temperature, dtype=torch.float64).expand(n).tolist()
    xs = policy.detach().double().tolist()
    ys = [None] * n if reference is None else reference.detach().double().tolist()
    found = [row(x, y, t) for x, y, t in zip(xs, ys, temperatures, strict=True)]
    out: dict[str, Tensor] = {
        "log_prob": torch.tensor([r.log_prob for r in found], dtype=torch.float64)
    }
    for name in found[0].values:
        out[name] = torch.tensor([r.values[name] for r in found], dtype=torch.float64)
        for i, suffix in enumerate(("", "_reference")):
            out[f"d_{name}{suffix}"] = torch.tensor(
                [r.gradients[name][i] for r in found], dtype=torch.float64
            )
    if "forward_kl" in out:
        for name in ("", "d_"):
            for suffix in ("", "_reference") if name else ("",):
                out[f"{name}jeffreys{suffix}"] = (
                    out[f"{name}forward_kl{suffix}"] + out[f"{name}reverse_kl{suffix}"]
                )
    return out


def log_ratio(policy: Tensor, reference: Tensor, temperature: float | Tensor) -> Tensor:
    """log p - log q [N, V] of rows, the difference taken in 60 digits."""
    temperatures = torch.as_tensor(temperature, dtype=torch.float64).expand(policy.shape[0])
    rows = []
    with mpmath.workdps(60):
        for x, y, t in zip(
            policy.double().tolist(), reference.double().tolist(), temperatures, strict=True
        ):
            pair = (log_probs(z, float(t))[0] for z in (x, y))
            rows.append([float(a - b) for a, b in zip(*pair, strict=True)])
    return torch.tensor(rows, dtype=torch.float64)


def relative_error(actual: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Largest |actual - expected| / max(|expected|, floor); where both are 0, or both inf, 0."""
    a, e = actual.detach().double(), expected.detach().double()
    same = (a == e) | (a.isnan() & e.isnan())
    error = ((a - e).abs() / e.abs().clamp(min=floor)).masked_fill(same, 0.0)
    return float(error.nan_to_num(math.inf).max()) if error.numel() else 0.0


def relative_l2(actual: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Largest |actual - expected| / max(|expected|, floor) over rows, in the 2-norm."""
    a, e = actual.detach().double(), expected.detach().double()
    error, size = (a - e).norm(dim=-1), e.norm(dim=-1).clamp(min=floor)
    relative = torch.where(error == 0, 0.0, error / size)
    return float(relative.nan_to_num(math.inf).max()) if relative.numel() else 0.0
