"""The second-sweep divergences in 60 digits, from their definitions."""

from __future__ import annotations

import mpmath
import oracle
import torch
from torch import Tensor

# kind -> (options of fusedkl.divergence)
FAMILY: dict[str, tuple[str, dict[str, float]]] = {
    "jsd 0.5": ("jsd", {"beta": 0.5}),
    "jsd 0.1": ("jsd", {"beta": 0.1}),
    "jsd 0.9": ("jsd", {"beta": 0.9}),
    "skew_kl 0.1": ("skew_kl", {"alpha": 0.1}),
    "skew_kl 0.7": ("skew_kl", {"alpha": 0.7}),
    "renyi 0.5": ("renyi", {"alpha": 0.5}),
    "renyi 0.9": ("renyi", {"alpha": 0.9}),
    "renyi 2": ("renyi", {"alpha": 2.0}),
    "tvd": ("tvd", {}),
    "hellinger": ("hellinger", {}),
}

Numbers = list[mpmath.mpf]


def _slopes(
    kind: str, number: float, p: Numbers, q: Numbers
) -> tuple[mpmath.mpf, Numbers, Numbers]:
    """The value, p dD/dp and q dD/dq, as the definitions give them; 0 log 0 = 0."""
    n, w = len(p), mpmath.mpf(number)

    def log(a: mpmath.mpf, b: mpmath.mpf) -> mpmath.mpf:
        return mpmath.log(a / b) if a > 0 else mpmath.mpf(0)

    if kind in ("jsd", "skew_kl"):
        m = [(1 - w) * a + w * b for a, b in zip(p, q, strict=True)]
        to_q = [b * log(b, c) for b, c in zip(q, m, strict=True)]
        to_p = [a * log(a, c) for a, c in zip(p, m, strict=True)]
        if kind == "jsd":
            value = w * mpmath.fsum(to_q) + (1 - w) * mpmath.fsum(to_p)
            return value, [(1 - w) * v for v in to_p], [w * v for v in to_q]
        by_p = [-(1 - w) * a * b / c if c else 0 for a, b, c in zip(p, q, m, strict=True)]
        by_q = [t + b - w * b * b / c if c else 0 for t, b, c in zip(to_q, q, m, strict=True)]
        return mpmath.fsum(to_q), by_p, by_q
    if kind == "tvd":
        sign = [mpmath.sign(a - b) for a, b in zip(p, q, strict=True)]
        value = mpmath.fsum(s * (a - b) for s, a, b in zip(sign, p, q, strict=True)) / 2
        return (
            value,
            [s * a / 2 for s, a in zip(sign, p, strict=True)],
            [-s * b / 2 for s, b in zip(sign, q, strict=True)],
        )
    order = mpmath.mpf(1) / 2 if kind == "hellinger" else w
    tilted = [
        b**order * a ** (1 - order) if a and b else mpmath.mpf(0) for a, b in zip(p, q, strict=True)
    ]
    z = mpmath.fsum(tilted)
    if kind == "hellinger":
        return 1 - z, [-t / 2 for t in tilted], [-t / 2 for t in tilted]
    if z == 0 or (order > 1 and any(b and not a for a, b in zip(p, q, strict=True))):
        return mpmath.inf, [mpmath.mpf(0)] * n, [mpmath.mpf(0)] * n
    return (
        mpmath.log(z) / (order - 1),
        [-t / z for t in tilted],
        [order / (order - 1) * t / z for t in tilted],
    )


def _gradient(slopes: Numbers, mass: Numbers, temperature: float) -> Numbers:
    total = mpmath.fsum(slopes)
    return [(s - m * total) / mpmath.mpf(temperature) for s, m in zip(slopes, mass, strict=True)]


def truth(
    policy: Tensor, reference: Tensor, temperature: float | Tensor = 1.0
) -> dict[str, tuple[Tensor, ...]]:
    """Values [N] and gradients [N, V] to both of every entry of FAMILY, float64."""
    n = policy.shape[0]
    temperatures = torch.as_tensor(temperature, dtype=torch.float64).expand(n).tolist()
    xs, ys = policy.detach().double().tolist(), reference.detach().double().tolist()
    found: dict[str, list[tuple[float, list[float], list[float]]]] = {name: [] for name in FAMILY}
    with mpmath.workdps(60):
        for x, y, t in zip(xs, ys, temperatures, strict=True):
            p, q = ([mpmath.exp(v) for v in oracle.log_probs(z, t)[0]] for z in (x, y))
            for name, (kind, options) in FAMILY.items():
                value, by_p, by_q = _slopes(kind, next(iter(options.values()), 0), p, q)
                if value == mpmath.inf:  # pulls the policy to the reference
                    gx = [(a - b) / mpmath.mpf(t) for a, b in zip(p, q, strict=True)]
                    gy = [mpmath.mpf(0)] * len(p)
                else:
                    gx, gy = _gradient(by_p, p, t), _gradient(by_q, q, t)
                found[name].append((float(value), [float(v) for v in gx], [float(v) for v in gy]))
    return {
        name: tuple(torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
        for name, rows in found.items()
    }
