"""Small pairs of rows by scenario, and their true numbers, computed once per session."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import oracle
import torch
from torch import Tensor

V = 67
N = 3
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
if os.environ.get("TRITON_INTERPRET") == "1":  # the run of the backend that takes no float64
    DTYPES.pop()
# float16 has no elements for small gradients: tested apart, under a loss scale.
GRADIENT_DTYPES = [dtype for dtype in DTYPES if dtype != torch.float16]
KINDS = ["forward_kl", "reverse_kl", "jeffreys"]


def _noise(sigma: float) -> Tensor:
    return sigma * torch.randn(N, V, dtype=torch.float64)


def _flat(sigma: float) -> tuple[Tensor, Tensor]:
    base = _noise(1)
    return base, base + _noise(sigma)


def _peaked(sigma: float) -> tuple[Tensor, Tensor]:
    base = _noise(2)
    base[:, 5] += 20
    return base, base + _noise(sigma)


def _one_token(sigma: float) -> tuple[Tensor, Tensor]:
    base = _noise(2)
    moved = base.clone()
    moved[:, 9] += sigma
    return base, moved


def _offset(sigma: float) -> tuple[Tensor, Tensor]:
    base = _noise(3)
    return base + 1e4, base + _noise(sigma) - 1e4


def _rounded_away(sigma: float) -> tuple[Tensor, Tensor]:
    """Differences of 1e4 that are one and the same float, and exact in float64."""
    base = torch.round(2**30 * (0.01 + _noise(sigma))) / 2**30
    return base, torch.full((N, V), 1e4, dtype=torch.float64)


def _masked(sigma: float) -> tuple[Tensor, Tensor]:
    base, moved = _flat(sigma)
    holes = torch.rand(N, V) < 0.5
    return base.masked_fill(holes, -torch.inf), moved.masked_fill(holes, -torch.inf)


def _policy_hole(sigma: float) -> tuple[Tensor, Tensor]:
    base, moved = _flat(sigma)
    base[:, 3] = -torch.inf
    return base, moved


def _reference_hole(sigma: float) -> tuple[Tensor, Tensor]:
    moved, base = _policy_hole(sigma)
    return base, moved


# Noise of 1e-6 to 8 spans KLs from 1e-13 to 1e2.
SCENARIOS: dict[str, tuple[Callable[[float], tuple[Tensor, Tensor]], float]] = {
    "flat 1e-6": (_flat, 1e-6),
    "flat 1e-3": (_flat, 1e-3),
    "flat 1": (_flat, 1.0),
    "flat 8": (_flat, 8.0),
    "peaked 1e-2": (_peaked, 1e-2),
    "peaked 2": (_peaked, 2.0),
    "one token 4": (_one_token, 4.0),
    "offset 1e-2": (_offset, 1e-2),
    "offset 1": (_offset, 1.0),
    "rounded away": (_rounded_away, 1e-4),
    "masked 1e-4": (_masked, 1e-4),
    "masked 2": (_masked, 2.0),
    "policy hole": (_policy_hole, 0.5),
    "reference hole": (_reference_hole, 0.5),
}
# One per row, as sampling servers have it.
TEMPERATURES: dict[str, float | Tensor] = {
    "T=1": 1.0,
    "T=0.7": 0.7,
    "T per row": torch.tensor([0.5, 1.0, 3.0]),
}


@functools.cache
def make(scenario: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Policy and reference [N, V]; clone before requiring a gradient."""
    build, sigma = SCENARIOS[scenario]
    generator_state = torch.get_rng_state()
    torch.manual_seed(len(scenario))
    policy, reference = build(sigma)
    torch.set_rng_state(generator_state)
    return policy.to(dtype), reference.to(dtype)


@functools.cache
def truth(scenario: str, dtype: torch.dtype, temperature: str) -> dict[str, Tensor]:
    """`oracle.fields` of it."""
    return oracle.fields(*make(scenario, dtype), TEMPERATURES[temperature])
