"""The loss part of TRL's training steps, as it is and by fusedkl: time and peak memory.

    python bench/trainers.py [--quick] [--output bench/results/trainers.json]

Each call is forward and backward of what a step does with hidden states (or, for GKD, logits).
Times are on one thread, interleaved, on the process-CPU clock: the ratio is TRL's over ours. Memory
is the peak beyond the inputs and their gradients, each in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import machine
import memory
import timing
import torch
from timing import Step
from torch import Tensor

import fusedkl.integrations.trl as adapter

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """A loss of a trainer on tokens x vocabulary x hidden size; a share of tokens is masked."""

    trainer: str
    dtype: str
    tokens: int = 256
    vocabulary: int = 49152
    width: int = 576
    masked: float = 0.0
    beta: float = 0.0

    @property
    def name(self) -> str:
        of = f"beta = {self.beta:g}, " if self.trainer in ("distillation", "gkd") else ""
        left = f", {self.masked:.0%} masked" if self.masked else ""
        shape = f"{self.tokens}x{self.vocabulary}, H = {self.width}"
        return f"{self.trainer}, {of}{self.dtype} {shape}{left}"


CASES = [
    *(Case("distillation", "fp32", beta=beta) for beta in (0.0, 1.0, 0.5)),
    Case("distillation", "fp32", beta=1.0, masked=0.5),
    Case("distillation", "bf16", beta=1.0),
    Case("grpo", "fp32"),
    Case("grpo", "bf16"),
    Case("dpo", "fp32", masked=0.5),
    *(Case("gkd", dtype, beta=0.5) for dtype in DTYPES),
]


def problem(case: Case) -> tuple[list[Tensor], Callable[[], Tensor]]:
    """What requires a gradient, and the loss, through TRL's own names."""
    torch.manual_seed(0)
    dtype = DTYPES[case.dtype]
    hidden = torch.randn(1, case.tokens, case.width).to(dtype).requires_grad_()
    weight = (torch.randn(case.vocabulary, case.width) * (3 / case.width**0.5)).to(dtype)
    weight.requires_grad_()
    moved = (hidden.detach() + 0.1 * torch.randn(hidden.shape)).to(dtype)
    mask = torch.arange(case.tokens).unsqueeze(0) >= round(case.masked * case.tokens)
    if case.trainer == "distillation":
        module = importlib.import_module("trl.trainer.distillation_trainer")
        other = weight.detach().clone()

        def distillation() -> Tensor:
            loss: Tensor = module._chunked_divergence_loss(
                hidden, moved, weight, other, mask.int(), case.beta
            )[0]
            return loss

        return [hidden, weight], distillation
    if case.trainer == "gkd":
        trainer = importlib.import_module("trl.experimental.gkd.gkd_trainer").GKDTrainer
        student = (hidden.detach() @ weight.detach().t()).requires_grad_()
        teacher = moved @ weight.detach().t()

        def gkd() -> Tensor:
            loss: Tensor = trainer.generalized_jsd_loss(student, teacher, beta=case.beta)
            return loss

        return [student], gkd
    utils = importlib.import_module("trl.trainer.utils")
    targets = torch.randint(case.vocabulary, (1, case.tokens))
    outputs: tuple[str, ...] = ("log_probs", "entropy")
    if case.trainer == "dpo":
        outputs += ("mean_logits", "is_top1")

    def log_probabilities() -> Tensor:
        # as the forward that add_fused_lm_head gives to a model
        compact = utils._use_triton(hidden.device)
        found = utils._ChunkedLogProbFunction.apply(
            hidden[mask] if compact else hidden[0], weight, None,
            targets[mask] if compact else targets[0], 1.0, utils._CHUNKED_LOGPROB_CHUNK_SIZE,
            None, 1.0, outputs,
        )  # fmt: skip
        scored: Tensor = found[0] if compact else found[0].masked_fill(~mask[0], 0)
        return scored.sum()

    return [hidden, weight], log_probabilities


def step(case: Case) -> Callable[[], list[float]]:
    leaves, loss = problem(case)

    def call() -> list[float]:
        value = loss()
        gradients = torch.autograd.grad(value, leaves)
        return [float(value.detach()), *(float(g.float().norm()) for g in gradients)]

    return call


def time_case(case: Case, rounds: int, seconds: float) -> dict[str, Any]:
    call = step(case)
    with adapter.patch():
        ours = call()
    theirs = call()
    # untimed: looking through all modules for names takes milliseconds
    patched = Step(call, before=adapter.patch, repeatable=False)
    plain = Step(call, before=adapter.unpatch, repeatable=False)
    result = timing.compare(patched, plain, rounds=rounds, seconds=seconds)
    adapter.unpatch()
    return {
        "ours_ms": result.base.median * 1e3,
        "trl_ms": result.other.median * 1e3,
        "ratio": result.ratio.median,
        "ratio_low": result.ratio.low,
        "ratio_high": result.ratio.high,
        "rounds": result.rounds,
        "loss_and_gradient_norms": {"ours": ours, "trl": theirs},
    }


def measure_memory(index: int, quick: bool, ours: bool) -> None:
    """In a process of its own: prints bytes."""
    case = cases(quick)[index]
    context = adapter.patch() if ours else contextlib.nullcontext()
    with context:
        small = Case(case.trainer, case.dtype, 4, 64, 16, beta=case.beta)
        step(small)()  # thread pools, libraries
        leaves, loss = problem(case)
        memory.settle()
        Path("/proc/self/clear_refs").write_text("5")
        before = memory.resident()
        gradients = torch.autograd.grad(loss(), leaves)
        peak = memory.resident("VmHWM") - before
    kept = sum(g.nbytes for g in gradients)
    print(json.dumps({"extra_bytes": max(peak - kept, 1), "gradient_bytes": kept}))


def memory_of(index: int, quick: bool, ours: bool) -> dict[str, int]:
    command = [sys.executable, "-P", __file__, "--memory", str(index), "ours" if ours else "trl"]
    if quick:
        command.append("--quick")
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def cases(quick: bool) -> list[Case]:
    if not quick:
        return CASES
    return [
        Case(c.trainer, c.dtype, 32, 1031, 64, masked=c.masked, beta=c.beta) for c in CASES[::3]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run")
    parser.add_argument("--output", type=Path, help="JSON")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each comparison")
    parser.add_argument("--memory", nargs=2, metavar=("CASE", "WHO"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1")
    torch.set_num_threads(1)
    if arguments.memory:
        index, who = arguments.memory
        return measure_memory(int(index), arguments.quick, who == "ours")
    results = []
    for index, case in enumerate(cases(arguments.quick)):
        found = time_case(case, arguments.rounds, arguments.seconds)
        if memory.supported():
            ours, theirs = (memory_of(index, arguments.quick, mine) for mine in (True, False))
            found |= {
                "ours_extra_MiB": ours["extra_bytes"] / memory.MIB,
                "trl_extra_MiB": theirs["extra_bytes"] / memory.MIB,
                "memory_ratio": theirs["extra_bytes"] / ours["extra_bytes"],
                "gradient_MiB": ours["gradient_bytes"] / memory.MIB,
            }
        results.append({"case": case.name, **found})
        print(
            f"{case.name}: {found['trl_ms']:.0f} -> {found['ours_ms']:.0f} ms "
            f"({found['ratio']:.2f}x), {found.get('trl_extra_MiB', 0):.0f} -> "
            f"{found.get('ours_extra_MiB', 0):.1f} MiB",
            flush=True,
        )
    if arguments.output:
        content = {
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
            "machine": machine.describe(),
            "versions": machine.versions() | {"trl": importlib.metadata.version("trl")},
            "load": machine.load(),
            "results": results,
        }
        arguments.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
