"""The inputs that are timed: named vocabularies, their sizes, and what the rows look like."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import oracle_f64
import torch
from torch import Tensor

# The vocabularies of the two model families that are fine-tuned most, one of them not a multiple
# of a power of two beyond 128 (151936 = 128 * 1187), so that tails are timed too.
VOCABULARIES = {"llama3": 128256, "qwen2.5": 151936}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# What the suite measures besides; the goals are set for the two above.
EVERY_DTYPE = DTYPES | {"fp16": torch.float16}
QUICK_VOCABULARIES = {"quick": 4096}

# Rows that differ; the rest repeat them at other addresses. What a row costs depends on its values
# and on where it comes from, not on the rows before it, and checking 32 rows is cheap.
DISTINCT = 32

# Name, how the policy differs from the reference. The KL in brackets holds for logits N(0, 3^2).
NARROW = "noise 0.1"  # KL 5e-3: a policy after some updates
KINDS = (NARROW, "noise 1", "noise 4", "noise 24", "collapsed", "half masked", "drifted")


@dataclass(frozen=True)
class Problem:
    """Two tensors [rows, vocabulary] whose rows repeat the first `distinct` ones."""

    name: str
    dtype: str
    policy: Tensor
    reference: Tensor
    distinct: int

    @property
    def pairs(self) -> int:
        return self.policy.numel()

    @property
    def vocabulary(self) -> int:
        return self.policy.shape[1]

    @property
    def rows(self) -> int:
        return self.policy.shape[0]

    def truths(self) -> list[oracle_f64.Row]:
        """The float64 truth of each distinct row."""
        return [oracle_f64.row(self.policy[i], self.reference[i]) for i in range(self.distinct)]

    def expected_rows(self) -> Tensor:
        """KL(reference || policy) of the distinct rows, float64."""
        return torch.stack([truth.forward_kl for truth in self.truths()])

    def expected_both(self) -> Tensor:
        """The sum of both directions of the distinct rows, float64."""
        return torch.stack([truth.forward_kl + truth.reverse_kl for truth in self.truths()])

    def expected_mean(self, rows: Tensor) -> float:
        """Mean over all rows, given the distinct ones."""
        return float(rows[torch.arange(self.rows) % self.distinct].mean())


def last_level_cache_bytes() -> int:
    """The largest cache of the first core; 32 MiB where the system does not say."""
    sizes = [32 << 20] if not _CACHES.is_dir() else []
    for entry in sorted(_CACHES.glob("index*/size")):
        text = entry.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KMG")) * unit)
    return max(sizes, default=32 << 20)


_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def rows_for(vocabulary: int, dtype: torch.dtype, quick: bool) -> int:
    """Rows that make both tensors together four times the last-level cache.

    Capped at 1/24 of the memory: eager needs 14 times one tensor, and the copies stand beside it.
    """
    if quick:
        return 64
    row = 2 * vocabulary * dtype.itemsize
    rows = -(-4 * last_level_cache_bytes() // row)
    return max(DISTINCT, min(-(-rows // 8) * 8, memory_bytes() // 24 // row))


def memory_bytes() -> int:
    """Physical memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def vocabularies(quick: bool) -> dict[str, int]:
    return QUICK_VOCABULARIES if quick else VOCABULARIES


def make(
    kind: str, vocabulary: int, rows: int, dtype: str, seed: int = 0, distinct: int = DISTINCT
) -> Problem:
    """Random logits N(0, 3^2) as the reference, and a policy that differs from it by `kind`."""
    generator = torch.Generator().manual_seed(seed)
    shape = (min(distinct, rows), vocabulary)
    reference = torch.randn(shape, generator=generator) * 3
    noise = torch.randn(shape, generator=generator)
    if kind == "collapsed":
        # All mass on one token that the reference finds ordinary: seen when training diverges.
        policy = reference.clone()
        policy[:, vocabulary // 3] += 80
    elif kind == "half masked":
        policy = reference + 0.1 * noise
        masked = torch.rand(shape, generator=generator) < 0.5
        policy[masked] = reference[masked] = float("-inf")
    elif kind == "drifted":
        # All logits higher by as much, which no softmax sees: nothing in training keeps them.
        policy = reference + 0.1 * noise + 8
    else:
        policy = reference + float(kind.split()[1]) * noise
    name = f"{dtype} {rows}x{vocabulary} {kind}"
    return Problem(
        name, dtype, repeat(policy, rows, dtype), repeat(reference, rows, dtype), shape[0]
    )


def repeat(distinct: Tensor, rows: int, dtype: str) -> Tensor:
    """The rows of `distinct` over and over, `rows` in all."""
    out = torch.empty(rows, distinct.shape[1], dtype=EVERY_DTYPE[dtype])
    for start in range(0, rows, len(distinct)):
        block = out[start : start + len(distinct)]
        block.copy_(distinct[: len(block)])
    return out
