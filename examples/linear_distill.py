"""Distillation from hidden states: the student's and the teacher's logits never exist.

The student is the lower half of the teacher's layers, its head stays as it is. The same steps are
made four times, with the loss by fusedkl.linear_divergence, by full logits, by logits of 128 tokens
at a time, and by torch's own linear_cross_entropy with the teacher's probabilities, where torch has
it (its value is the divergence plus the teacher's entropy, its gradient the same). The table has
the time and the growth of memory of the loss with its backward; the curves must agree.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from common import Language, Tiny, arguments, curve, load, optimizer, panels, save
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fusedkl

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))

from memory import PeakMemory

ROWS, LENGTH, CHUNK = 4, 128, 128
# Relative difference of two curves' losses: the same sums in another order.
TOLERANCE = 1e-3


class Head(NamedTuple):
    """A model in two pieces."""

    body: Callable[[Tensor], Tensor]  # ids [B, T] -> hidden states [B, T, H]
    weight: Tensor
    bias: Tensor | None

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight, self.bias)


def split(model: nn.Module) -> Head:
    if isinstance(model, Tiny):
        weight, bias = model.head.weight, model.head.bias
        model.head = nn.Identity()  # type: ignore[assignment]
        return Head(model, weight.requires_grad_(False), bias.requires_grad_(False))
    inner: Any = model.model
    inner.lm_head.weight.requires_grad_(False)
    return Head(
        lambda ids: inner.model(ids, use_cache=False).last_hidden_state, inner.lm_head.weight, None
    )


def fused(hidden: Tensor, teacher_hidden: Tensor, student: Head, teacher: Head) -> Tensor:
    return fusedkl.linear_divergence(
        hidden,
        student.weight,
        teacher_hidden,
        teacher.weight,
        bias=student.bias,
        ref_bias=teacher.bias,
        reduction="mean",
    )


def full(hidden: Tensor, teacher_hidden: Tensor, student: Head, teacher: Head) -> Tensor:
    log_p = F.log_softmax(student.logits(hidden), -1)
    log_q = F.log_softmax(teacher.logits(teacher_hidden), -1)
    return F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")


def chunked(hidden: Tensor, teacher_hidden: Tensor, student: Head, teacher: Head) -> Tensor:
    total = hidden.new_zeros(())
    for h, t in zip(hidden.split(CHUNK), teacher_hidden.split(CHUNK), strict=True):
        part = checkpoint(full, h, t, student, teacher, use_reentrant=False)
        total = total + part * len(h)
    return total / len(hidden)


def soft_targets(hidden: Tensor, teacher_hidden: Tensor, student: Head, teacher: Head) -> Tensor:
    with torch.no_grad():
        logits = teacher.logits(teacher_hidden)
        entropy = fusedkl.entropy(logits).mean()
        target = logits.softmax(-1)
    cross = F.linear_cross_entropy(hidden, student.weight, target, linear_bias=student.bias,
                                   ignore_index=None)  # fmt: skip
    return cross - entropy


WAYS = {"fusedkl": fused, "full logits": full, f"{CHUNK}-token chunks": chunked}
if hasattr(F, "linear_cross_entropy"):
    WAYS["torch linear_cross_entropy"] = soft_targets


class Run(NamedTuple):
    """What one way of computing the loss gave."""

    losses: list[float]
    seconds: float
    peak: int | None


def train(way: str, language: Language, start: nn.Module, steps: int, seed: int) -> Run:
    model = copy.deepcopy(start)
    student, teacher = split(model), split(copy.deepcopy(language.model).requires_grad_(False))
    optimise = optimizer(model, 1e-2 if language.name == "tiny" else 1e-4)
    losses, seconds, peaks = [], [], []
    for batch in language.batches(steps, ROWS, LENGTH, seed):
        with torch.no_grad():
            teacher_hidden = teacher.body(batch.inputs).flatten(0, 1)
        hidden = student.body(batch.inputs).flatten(0, 1)
        leaf = hidden.detach().requires_grad_()
        with PeakMemory() as memory:
            began = time.perf_counter()
            loss = WAYS[way](leaf, teacher_hidden, student, teacher)
            loss.backward()
            seconds.append(time.perf_counter() - began)
        peaks.append(memory.bytes)
        hidden.backward(leaf.grad)
        optimise.step()
        optimise.zero_grad()
        losses.append(float(loss.detach()))
    known = [peak for peak in peaks if peak is not None]
    return Run(losses, statistics.median(seconds), max(known) if known else None)


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    options = arguments(__doc__, argv, steps=5, models=("tiny", "smollm2", "gemma3"))
    language = load(options.model, options.seed)
    start = language.smaller()
    runs = {way: train(way, language, start, options.steps, options.seed) for way in WAYS}
    print(f"{'':28}{'loss and backward':>20}{'memory':>12}{'last loss':>12}")
    for way, run in runs.items():
        peak = "unknown" if run.peak is None else f"{run.peak / 2**20:.0f} MiB"
        print(f"{way:28}{run.seconds * 1e3:>17.0f} ms{peak:>12}{run.losses[-1]:>12.6f}")
    ours = runs["fusedkl"].losses
    apart = max(
        abs(a - b) / b for run in runs.values() for a, b in zip(ours, run.losses, strict=True)
    )
    print(f"curves agree to {apart:.1e} (at most {TOLERANCE:.0e})")
    if not apart <= TOLERANCE:
        raise SystemExit("the losses differ")
    figure, (left, right) = panels(2)
    curve(left, "loss (nats per token)", {way: run.losses for way, run in list(runs.items())[:2]})
    names = list(runs)
    bars = right.barh(names, [(runs[way].peak or 0) / 2**20 for way in names])
    right.bar_label(bars, fmt="%.0f", padding=3)  # the smallest one cannot be seen
    right.margins(x=0.15)
    right.set_title("memory of loss and backward (MiB)", fontsize=10, loc="left")
    right.invert_yaxis()
    save(figure, options.out, "linear_distill")
    return {way: run.losses for way, run in runs.items()}


if __name__ == "__main__":
    main()
