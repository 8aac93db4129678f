"""Random calls of the public functions: what one backend does, the reference must do as well.

    python tests/fuzz.py --seconds 60        # or: make fuzz SECONDS=60

Each example is one call: tensors of any shape, stride, dtype and content (holes, infinities, NaN,
offsets), options that fit and options that do not. Either both backends raise the same TypeError or
ValueError, or both return, and values, gradients, NaN and infinities agree. It looks for what is
plainly wrong and for crashes; the last digits are tested elsewhere.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz_calls
import hypothesis
import torch
from fuzz_inputs import Call
from hypothesis import HealthCheck, given, settings
from torch import Tensor

# Twice what is promised and more: a tolerance that no rounding reaches.
VALUE = 1e-4
GRADIENT = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 2e-2}
ACCEPTED = (TypeError, ValueError, IndexError)


def outcome(call: Call, backend: str) -> list[Tensor] | Exception:
    """The results and gradients of a call on its own copies of the tensors, or what it raised."""
    arguments = call.fresh()
    before = [t.detach().clone() for t in arguments.tensors]
    try:
        found = call.function(backend, *arguments.positional, **arguments.options)
    except ACCEPTED as error:
        return error
    results = [t for t in (found if isinstance(found, tuple) else (found,)) if t is not None]
    wanted = [t for t in arguments.tensors if t.requires_grad]
    moving = [r for r in results if isinstance(r, Tensor) and r.requires_grad]
    for t, was in zip(arguments.tensors, before, strict=True):
        assert torch.equal(t.detach().nan_to_num(7.0), was.nan_to_num(7.0)), "an input was changed"
    gradients: list[Tensor] = []
    if wanted and moving:
        weights = [torch.linspace(0.5, 1.5, r.numel()).reshape(r.shape).to(r.dtype) for r in moving]
        given_back = torch.autograd.grad(moving, wanted, weights, allow_unused=True)
        gradients = [
            torch.zeros_like(t) if g is None else g for g, t in zip(given_back, wanted, strict=True)
        ]
        for g, t in zip(gradients, wanted, strict=True):
            assert g.dtype == t.dtype and g.shape == t.shape
    return [torch.as_tensor(r).detach() for r in results] + gradients


def check(call: Call) -> None:
    """Both backends do the same."""
    ours, theirs = outcome(call, "cpu"), outcome(call, "reference")
    if isinstance(ours, Exception) or isinstance(theirs, Exception):
        assert type(ours) is type(theirs), f"{call}: {ours!r} and {theirs!r}"
        return
    assert len(ours) == len(theirs)
    values = len(ours) - sum(t.requires_grad for t in call.fresh().tensors)
    for place, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype, f"{call}: {a.dtype} and {b.dtype}"
        # Results of 16 bits may be rounded to neighbours.
        rounded = max(VALUE, torch.finfo(a.dtype).eps)
        tolerance = GRADIENT[a.dtype] if place >= values else rounded
        agree(a.double(), b.double(), tolerance, call.floor, str(call))


def agree(a: Tensor, b: Tensor, tolerance: float, floor: float, what: str) -> None:
    """NaN and infinities in the same places; elsewhere close, in proportion to each row."""
    assert torch.equal(a.isnan(), b.isnan()), f"{what}: NaN in other places\n{a}\n{b}"
    assert torch.equal(a.isinf(), b.isinf()), f"{what}: infinities in other places\n{a}\n{b}"
    if not a.numel():
        return
    a, b = (torch.where(t.isfinite(), t, 0) for t in (a, b))
    size = b.abs() if b.dim() < 2 else b.abs().amax(-1, keepdim=True)
    wrong = (a - b).abs() - tolerance * size
    most = float(wrong.max())
    assert most <= floor, f"{what}: off by {most}\n{a}\n{b}"


def run(name: str, examples: int, seed: int | None) -> int:
    """That many calls of one family; returns how many there were."""
    count = 0

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=seed is None,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(call=fuzz_calls.FAMILIES[name]())
    def one(call: Call) -> None:
        nonlocal count
        count += 1
        check(call)

    test: Callable[[], None] = one if seed is None else hypothesis.seed(seed)(one)
    test()
    return count


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Random calls of the public functions.")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=random.randrange(2**30))
    parser.add_argument("--out", type=Path, help="JSON of a run that found nothing")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    counts: dict[str, int] = dict.fromkeys(fuzz_calls.FAMILIES, 0)
    start, seed = time.monotonic(), options.seed
    while time.monotonic() - start < options.seconds:
        for name in counts:
            counts[name] += run(name, 100, seed)
            spent = time.monotonic() - start
            print(f"\r{spent:6.0f} s  {sum(counts.values())} calls  {name:24}", end="", flush=True)
        seed += 1
    print(f"\nnothing found in {sum(counts.values())} calls, seeds {options.seed} to {seed - 1}")
    if options.out is not None:
        about: dict[str, Any] = {
            "command": f"python tests/fuzz.py --seconds {options.seconds:g} --seed {options.seed}",
            "seconds": round(time.monotonic() - start),
            "cpu_seconds": round(time.process_time()),
            "seeds": [options.seed, seed - 1],
            "calls": counts,
            "torch": torch.__version__,
        }
        options.out.write_text(json.dumps(about, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
