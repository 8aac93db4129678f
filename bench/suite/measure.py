"""Measures a case: each contender's numbers first, then its time beside ours, then its memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import cases
import limits
import memory
import timing
import torch
from cases import EVERY_DTYPE
from contenders import Contender
from speed import Settings
from timing import Spread, Step
from torch import Tensor

from . import judge
from .batch import Batch, Case, build
from .contenders import makers
from .entry import Entry
from .models import REAL
from .plans import Item

# Twice the second-level cache of the largest GPU there is now.
FLUSHED_BYTES = 256 << 20
# Peak above the inputs, in float32 matrices of logits, forward and backward; to know what fits.
NEEDS = {"eager": 7, "eager, no upcast": 4, "row loop": 5, "chunked": 5, "chunked, checkpoint": 3}
NEEDS |= {"eager, float32 products": 7, "liger-kernel": 6}
NEEDS |= {"torch.compile": 3, "torch.compile, rewritten": 1}
MIXTURE = 2  # times as much for a divergence of three distributions
# Seconds that a call may take: a 16-bit product can take minutes where the machine emulates it.
LONGEST_CALL = 20.0
SAMPLE = 16, 4096  # tokens and vocabulary of the part of a head that tells how long a call takes


def clock(device: str) -> timing.Clock:
    return timing.GPU if device == "cuda" else timing.CPU


def available_bytes(device: str) -> int:
    """What a case may take, its inputs included."""
    if device == "cuda":
        return int(0.9 * torch.cuda.mem_get_info()[0])
    return int(0.6 * cases.memory_bytes())


def inputs_bytes(case: Case) -> int:
    return 2 * case.tokens * case.width * EVERY_DTYPE[case.dtype].itemsize


def fits(case: Case, contender: str, device: str) -> bool:
    logits = 4 * case.tokens * case.vocabulary
    times = NEEDS.get(contender, 1) * (MIXTURE if case.operation == "jsd" else 1)
    return inputs_bytes(case) + times * logits <= available_bytes(device)


def step(contender: Contender, case: Case, batch: Batch, device: str) -> Step:
    """What is timed; before each call, on a GPU, its cache is filled with something else."""
    leaves = judge.leaves(contender, case, batch)
    prepare: list[Callable[[], object]] = []
    if contender.inplace:
        prepare.append(functools.partial(_restore, leaves["policy"], batch.policy))
    if device == "cuda":
        other = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device)
        prepare.append(other.zero_)

    def before() -> None:
        for action in prepare:
            action()

    return Step(
        lambda: judge.call(contender, case, batch, leaves),
        before if prepare else None,
        repeatable=not prepare,
    )


def too_slow(contender: Contender, case: Case, batch: Batch, device: str) -> str:
    """Why a contender is not timed on a head, told from a small part of it, or nothing."""
    if batch.weight is None:
        return ""
    tokens, vocabulary = min(SAMPLE[0], case.tokens), min(SAMPLE[1], case.vocabulary)
    few = batch.part(slice(tokens))._replace(weight=batch.weight[:vocabulary])
    sample = step(contender, case, few, device)
    least = min(timing.sample(sample, clock(device)) for _ in range(2))
    seconds = least * (case.tokens / tokens) * (case.vocabulary / vocabulary)
    return "" if seconds < LONGEST_CALL else f"not timed: about {seconds:.0f} s a call"


@torch.no_grad()
def _restore(work: Tensor, original: Tensor) -> None:
    work.copy_(original)


def rate(case: Case, batch: Batch, settings: Settings, device: str) -> float | None:
    """Bytes per second of reading both inputs, as fast as torch does it here."""
    if case.least_bytes is None:
        return None
    policy, reference = batch.policy.contiguous(), batch.reference.contiguous()
    _, probe = limits.fastest_read(policy, reference, clock(device))
    times = [timing.sample(probe, clock(device)) for _ in range(settings.rounds)]
    return 2 * policy.nbytes / Spread.of(times).median


def times(
    item: Item, settings: Settings, device: str, say: Callable[[str], None]
) -> Iterator[Entry]:
    """An entry per contender that the item chooses, ours first."""
    case = item.case
    if case.model in REAL:
        import real_logits

        if absent := real_logits.missing(case.model):
            yield Entry(case, "everybody", skipped=absent)
            return
    say(f"{case.name}: making inputs and the truth")
    batch = build(case, device)
    true = judge.truth(case, batch)
    bytes_per_second = rate(case, batch, settings, device)
    base: Step | None = None
    for name, make in makers(case, device).items():
        if not item.chooses(name):
            continue
        entry = Entry(case, name)
        if not fits(case, name, device):
            entry.skipped = "does not fit this machine's memory"
            yield entry
            continue
        say(f"{case.name}: {name}")
        contender = make(case)
        if slow := too_slow(contender, case, batch, device):
            entry.skipped = slow
            yield entry
            continue
        found = judge.judge(contender, case, batch, true)
        entry.value_error, entry.gradient_error, entry.wrong = (
            found.value,
            found.gradient,
            found.wrong,
        )
        if not found.wrong:
            mine = step(contender, case, batch, device)
            entry.seconds, entry.ratio = _time(base or mine, mine, settings, device)
            base = base or mine
            if bytes_per_second and case.least_bytes:
                needed = case.least_bytes / bytes_per_second
                entry.share = needed / entry.seconds.median
            if device == "cuda":
                entry.peak_bytes = _peak_on_gpu(mine)
        yield entry


def _time(base: Step, other: Step, settings: Settings, device: str) -> tuple[Spread, Spread]:
    found = timing.compare(
        base,
        other,
        clock=clock(device),
        rounds=settings.rounds,
        seconds=settings.seconds,
        least_rounds=settings.slow_rounds,
    )
    return found.other, found.ratio


def _peak_on_gpu(step: Step) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = step.run()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    del kept
    return extra


def peak(case: Case, name: str) -> int:
    """Bytes above the inputs on the CPU; for a process that does nothing else."""
    batch = build(case)
    contender = makers(case, "cpu")[name](case)
    # thread pools and autograd; a compiled graph is made for the shape that it will see
    small = batch if name.startswith("torch.compile") else batch.part(slice(2))
    judge.call(contender, case, small, judge.leaves(contender, case, small))
    leaves = judge.leaves(contender, case, batch)
    return memory.peak(lambda: judge.call(contender, case, batch, leaves))
