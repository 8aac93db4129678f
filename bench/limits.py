"""The memory limit of this machine, measured beside the kernels, with torch operations only.

There is no compiled probe: the fastest of several torch operations that stream both tensors stands
for the limit. On a server core where it was compared with hand-written AVX-512 loops over the same
two tensors (plain and with software prefetch) the fastest of these was within 4% of the best loop
when reading; when reading two and writing one, torch.add was 20% below non-temporal stores, so
"times the 2 reads + 1 write limit" flatters by up to that much. A probe that is slower than the
hardware makes a kernel look closer to the limit than it is, never further.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import timing
import torch
from cases import Problem
from timing import Step
from torch import Tensor


def read_probe(problem: Problem) -> tuple[str, Step]:
    """The fastest operation that reads both tensors once each, and its name."""
    return fastest_read(problem.policy, problem.reference)


def fastest_read(
    policy: Tensor, reference: Tensor, clock: timing.Clock = timing.CPU
) -> tuple[str, Step]:
    x, y = policy.view(-1), reference.view(-1)
    # Reinterpreted bits: as integers any bits are equal; as floats, logits drawn from N(0, 3^2)
    # give ordinary exponents, so no subnormal slows a dot product down.
    probes: dict[str, Callable[[Tensor, Tensor], object]] = {
        "sum of int64": lambda a, b: (a.view(torch.int64).sum(), b.view(torch.int64).sum()),
        "amax of int32": lambda a, b: (a.view(torch.int32).amax(), b.view(torch.int32).amax()),
        "dot of fp32": lambda a, b: torch.dot(a.view(torch.float32), b.view(torch.float32)),
        "dot of fp64": lambda a, b: torch.dot(a.view(torch.float64), b.view(torch.float64)),
    }
    steps = {name: Step(functools.partial(probe, x, y)) for name, probe in probes.items()}
    best = timing.fastest(steps, clock, tries=4)
    return best, steps[best]


def write_probe(problem: Problem, out: Tensor) -> tuple[str, Step]:
    """Read both tensors, write one of their size into memory that is already mapped."""
    x, y, z = (t.view(-1).view(torch.int64) for t in (problem.policy, problem.reference, out))
    return "add of int64", Step(lambda: torch.add(x, y, out=z))


def bytes_read(problem: Problem) -> int:
    return 2 * problem.pairs * problem.policy.element_size()
