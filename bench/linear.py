"""lm_head and divergence together against full logits: time, memory, accuracy.

Time is judged against the same products: tiles of them alone (what the divergence adds), and full
logits made by them, then the divergence by PyTorch's operators; "fast" against full logits made by
PyTorch's bfloat16 product. A machine without bfloat16 multipliers takes 20 times as long over a
product as one that has them, and more over a gradient's: how many tokens there are follows from the
time of a sample, so that the jobs end in time everywhere, and is in the case's name.
`python bench/run.py --only linear` runs the jobs, `--only sweep-linear` all sizes.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import memory
import oracle_f64
import timing
import torch
import torch.nn.functional as F
from goals import Result
from jobs_io import Reporter
from speed import Settings
from timing import Step
from torch import Tensor

import fusedkl
from fusedkl.linear_arguments import Inputs
from fusedkl.linear_ops import engine_of
from fusedkl.linear_products import bf16_multipliers

MIB = 1 << 20
TOKENS, QUICK_TOKENS = (512, 256, 128, 64), 64
VOCABULARY, QUICK_VOCABULARY = 128256, 4096
VOCABULARIES = {1024: (128256, 262144), 4096: (128256,)}
PRECISIONS = {"fast": "fast", "default": None}
Sizes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # of tokens, vocabularies, H
SWEEP: Sizes = (64, 512, 4096, 16384), (32768, 128256, 262144), (1024, 4096)
# Seconds that one call of the slowest contender may take where fewer tokens help, forward and with
# gradients (where few tokens share a tile of the weight, backward is another story than where many
# do), that it may take at all, and that the calls of one comparison may.
CALL, TRAINING_CALL, LONGEST_CALL, COMPARISON = 8.0, 30.0, 120.0, 40.0


@dataclass(frozen=True)
class Heads:
    """Two bfloat16 heads whose logits are about N(0, 3^2), KL about 1e-2."""

    hidden: Tensor
    weight: Tensor
    ref_hidden: Tensor
    ref_weight: Tensor

    @property
    def name(self) -> str:
        tokens, width = self.hidden.shape
        return f"bf16 {tokens}x{self.weight.shape[0]}, H = {width}"

    def first(self, tokens: int) -> Heads:
        return Heads(self.hidden[:tokens], self.weight, self.ref_hidden[:tokens], self.ref_weight)


def make(tokens: int, vocabulary: int, width: int) -> Heads:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator)
    weight = torch.empty(vocabulary, width, dtype=torch.bfloat16)
    for at in range(0, vocabulary, 8192):  # no fp32 copy of the weight
        part = weight[at : at + 8192]
        part.copy_(torch.randn(part.shape, generator=generator) * (3 / width**0.5))
    moved = hidden + 0.05 * torch.randn(tokens, width, generator=generator)
    # one weight's memory under two tensors: what is read is the same, at half the memory
    return Heads(hidden.bfloat16(), weight, moved.bfloat16(), weight.detach().view_as(weight))


def ours(heads: Heads, precision: str | None) -> Tensor:
    return fusedkl.linear_divergence(
        heads.hidden, heads.weight, heads.ref_hidden, heads.ref_weight,
        reduction="mean", precision=precision,
    )  # fmt: skip


def inputs(heads: Heads, fast: bool) -> Inputs:
    return Inputs(
        heads.hidden, heads.weight, None, heads.ref_hidden, heads.ref_weight, None, None, None,
        None, None, ["forward_kl"], None, None, None, [1.0, 1.0], [0.0, 0.0], fast, [], "cpu",
    )  # fmt: skip


def products(heads: Heads, fast: bool) -> None:
    """The tiles' products alone."""
    engine = engine_of(inputs(heads, fast))
    for columns in engine.columns():
        for tokens in engine.blocks():
            engine.logits(tokens, columns)


def divergence(x: Tensor, y: Tensor) -> Tensor:
    log_p, log_q = F.log_softmax(x.float(), -1), F.log_softmax(y.float(), -1)
    return F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")


def eager(heads: Heads, fast: bool) -> Tensor:
    """Full logits: bfloat16 by PyTorch's product, or float32 by those of the tiles."""
    if fast:
        x = heads.hidden @ heads.weight.t()
        with torch.no_grad():
            y = heads.ref_hidden @ heads.ref_weight.t()
        return divergence(x, y)
    with bf16_multipliers():
        x = heads.hidden.float() @ heads.weight.float().t()
        with torch.no_grad():
            y = heads.ref_hidden.float() @ heads.ref_weight.float().t()
    return divergence(x, y)


def eager_forward(heads: Heads, fast: bool) -> Tensor:
    """As `eager` without a graph, the float32 logits by the very products of the tiles."""
    if fast:
        return eager(heads, fast)
    engine = engine_of(inputs(heads, fast))
    shape = heads.hidden.shape[0], heads.weight.shape[0]
    x, y = torch.empty(shape), torch.empty(shape)
    for columns in engine.columns():
        for tokens in engine.blocks():
            a, b = engine.logits(tokens, columns)
            assert b is not None
            x[tokens, columns], y[tokens, columns] = a, b
    return divergence(x, y)


def gradients(heads: Heads, loss: Callable[[Heads], Tensor]) -> tuple[Tensor, ...]:
    """To hidden and weight."""
    leaves = heads.hidden.detach().requires_grad_(), heads.weight.detach().requires_grad_()
    with bf16_multipliers():  # for the backward products of eager, too
        value = loss(Heads(*leaves, heads.ref_hidden, heads.ref_weight))
        return torch.autograd.grad(value, leaves)


Call = Callable[[Heads], object]


def forwards(label: str) -> tuple[Call, Call, Call]:
    """The tiles' products alone, ours, and full logits."""
    precision, fast = PRECISIONS[label], label == "fast"
    return (
        torch.no_grad()(lambda heads: products(heads, fast)),
        torch.no_grad()(lambda heads: ours(heads, precision)),
        torch.no_grad()(lambda heads: eager_forward(heads, fast)),
    )


def trainings(label: str) -> tuple[Call, Call]:
    """Ours and full logits, forward and backward."""
    precision, fast = PRECISIONS[label], label == "fast"
    return (
        lambda heads: gradients(heads, lambda h: ours(h, precision)),
        lambda heads: gradients(heads, lambda h: eager(h, fast)),
    )


def seconds(call: Call, vocabulary: int, width: int) -> float:
    """Of one token, from a sample of few tokens and a small vocabulary."""
    sample = make(TOKENS[-1], QUICK_VOCABULARY, width)
    step = Step(lambda: call(sample))
    least = min(timing.sample(step, timing.CPU) for _ in range(3))
    return least / TOKENS[-1] * vocabulary / QUICK_VOCABULARY


def affordable(
    calls: Iterable[Call], vocabulary: int, width: int, within: float = CALL
) -> tuple[int, float]:
    """How many tokens each of the calls ends in time with, or the fewest there are; its seconds."""
    each = max(seconds(call, vocabulary, width) for call in calls)
    tokens = next((n for n in TOKENS if n * each < within), TOKENS[-1])
    return tokens, tokens * each


def run(reporter: Reporter, settings: Settings, width: int) -> None:
    """One hidden size, its vocabularies, both precisions."""
    if settings.quick:
        heads = make(QUICK_TOKENS, QUICK_VOCABULARY, 64)
        for label in PRECISIONS:
            _measure_forward(reporter, settings, heads, label, width)
            _measure_training(reporter, settings, heads, label)
        return
    for vocabulary in VOCABULARIES[width]:
        reporter.step(f"H = {width}, V = {vocabulary}: making heads")
        heads = make(TOKENS[0], vocabulary, width)
        for label in PRECISIONS:
            tokens, _ = affordable(forwards(label), vocabulary, width)
            _measure_forward(reporter, settings, heads.first(tokens), label, width)
            if vocabulary == VOCABULARY:  # a larger one is the same story
                tokens, longest = affordable(trainings(label), vocabulary, width, TRAINING_CALL)
                given = heads.first(tokens)
                if longest < LONGEST_CALL:
                    _measure_training(reporter, settings, given, label)
                else:
                    note = f"not timed: {longest:.0f} s a call"
                    reporter.emit(Result(f"linear_train/{label}", given.name, note=note))


def run_sweep(reporter: Reporter, settings: Settings) -> None:
    """All sizes, hours on some machines: only if it is asked for by name."""
    quick: Sizes = (8, 64), (QUICK_VOCABULARY,), (64,)
    every_tokens, vocabularies, widths = quick if settings.quick else SWEEP
    for width in widths:
        for vocabulary in vocabularies:
            heads = make(every_tokens[-1], vocabulary, width)
            for tokens in every_tokens:
                for label in PRECISIONS:
                    reporter.step(f"{heads.name}, {tokens} tokens, {label}")
                    _measure_forward(reporter, settings, heads.first(tokens), label, width)
                    if tokens <= TOKENS[0]:
                        _measure_training(reporter, settings, heads.first(tokens), label)


def _measure_forward(
    reporter: Reporter, settings: Settings, heads: Heads, label: str, width: int
) -> None:
    size = "small" if width == 1024 else "large"
    steps = [Step(functools.partial(call, heads)) for call in forwards(label)]
    goals = {f"linear_products/{label}": (0, 1), f"linear_forward_{size}/{label}": (1, 2)}
    if heads.hidden.shape[0] > TOKENS[0]:  # full logits of more would not fit everywhere
        del steps[2], goals[f"linear_forward_{size}/{label}"]
    _emit(reporter, settings, heads, steps, goals)


def _measure_training(reporter: Reporter, settings: Settings, heads: Heads, label: str) -> None:
    steps = [Step(functools.partial(call, heads)) for call in trainings(label)]
    _emit(reporter, settings, heads, steps, {f"linear_train/{label}": (0, 1)})


def _emit(
    reporter: Reporter,
    settings: Settings,
    heads: Heads,
    steps: list[Step],
    goals: dict[str, tuple[int, int]],
) -> None:
    """Each goal is the time of its second step over that of its first, taken in turn."""
    reporter.step(f"{heads.name}: {', '.join(goals)}")
    for step in steps:  # a call of a few tokens warms up nothing of a large one
        step.run()
    started, rounds = time.perf_counter(), list[list[float]]()
    while len(rounds) < settings.slow_rounds:
        rounds.append([timing.sample(step, timing.CPU) for step in steps])
        if len(rounds) > 1 and time.perf_counter() - started > COMPARISON:
            break
    for goal, (base, other) in goals.items():
        ratio = timing.Spread.of([taken[other] / taken[base] for taken in rounds])
        ms = [timing.Spread.of([taken[i] for taken in rounds]).median * 1e3 for i in (base, other)]
        note = f"{ms[0]:.0f} vs {ms[1]:.0f} ms, {len(rounds)} times"
        reporter.emit(Result(goal, heads.name, ratio.median, ratio.low, ratio.high, note=note))


def run_accuracy(reporter: Reporter, settings: Settings) -> None:
    """Gradients end to end against float64 of the same inputs, at KL of 1e-2 and more."""
    heads = make(48, 4099 if settings.quick else 32003, 256)
    exact = Heads(*(getattr(heads, name).double() for name in Heads.__dataclass_fields__))
    upstream = gradients(exact, lambda h: divergence_f64(h))
    x, y = exact.hidden @ exact.weight.t(), exact.ref_hidden @ exact.ref_weight.t()
    kl = sum(oracle_f64.row(a, b).forward_kl for a, b in zip(x, y, strict=True)) / len(x)
    for dtype in (torch.float32, torch.bfloat16):
        given = Heads(*(getattr(heads, name).to(dtype) for name in Heads.__dataclass_fields__))
        found = gradients(given, lambda h: ours(h, None))
        label = "fp32" if dtype == torch.float32 else "bf16"
        for name, a, e in zip(("hidden", "weight"), found, upstream, strict=True):
            error = oracle_f64.relative_l2(a.flatten(), e.flatten())
            reporter.emit(
                Result(
                    f"linear_gradient/{label}", f"d {name}, {label}", error,
                    note=f"KL {float(kl):.2g}",
                )
            )  # fmt: skip


def divergence_f64(heads: Heads) -> Tensor:
    log_p = F.log_softmax(heads.hidden @ heads.weight.t(), -1)
    log_q = F.log_softmax(heads.ref_hidden @ heads.ref_weight.t(), -1)
    return F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")


def run_memory(reporter: Reporter, settings: Settings, backward: bool, fast: bool) -> None:
    """Peak of full logits over the peak of ours; inputs and their gradients are not counted."""
    label = "fast" if fast else "default"
    goal = f"linear_memory_{'train' if backward else 'forward'}/{label}"
    if not memory.supported():
        reporter.emit(Result(goal, label, note="this system cannot reset VmHWM"))
        return
    if settings.quick:
        heads = make(QUICK_TOKENS, QUICK_VOCABULARY, 64)
    else:  # logits are as large at any hidden size
        calls = trainings(label) if backward else forwards(label)
        slow = affordable(calls, VOCABULARY, 1024)[0] < TOKENS[0]
        heads = make(TOKENS[0], VOCABULARY, 256 if slow else 1024)
    kept = heads.hidden.nbytes + heads.weight.nbytes if backward else 0

    def call(loss: Callable[[Heads], Tensor], given: Heads) -> object:
        if backward:
            return gradients(given, loss)
        with torch.no_grad():
            return loss(given)

    peaks = []
    for loss in (lambda h: ours(h, "fast" if fast else None), lambda h: eager(h, fast)):
        small = Heads(heads.hidden[:2], heads.weight[:64], heads.ref_hidden[:2], heads.weight[:64])
        call(loss, small)  # thread pools, libraries
        peaks.append(max(memory.peak(functools.partial(call, loss, heads)) - kept, 1))
    reporter.emit(
        Result(
            goal, heads.name, peaks[1] / peaks[0],
            note=f"{peaks[0] / MIB:.1f} vs {peaks[1] / MIB:.0f} MiB",
        )
    )  # fmt: skip
