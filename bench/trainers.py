"""The loss part of TRL's training steps, as it is and by fusedkl: time and peak memory.

    python bench/trainers.py --output bench/results/trainers.json   # some minutes
    python bench/page.py bench/results/trainers.json   # its table into docs/integrations.md

Each call is forward and backward of what a step does with hidden states (or, for GKD, logits).
Times are on one thread, interleaved, on the process-CPU clock: the ratio is TRL's over ours. Memory
is the peak beyond the inputs and their gradients, each in a process of its own. Then TRL's trainers
themselves run 20 steps on SmolLM2, as they are and patched: the largest differences in their logs.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import machine
import memory
import timing
import torch
import trl_runs
from timing import Step
from torch import Tensor

import fusedkl.integrations.trl as adapter

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """A loss of a trainer on tokens x vocabulary x hidden size; a share of tokens is masked."""

    trainer: str
    dtype: str
    tokens: int = 64
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
    Case("distillation", "fp32", beta=1.0),
    Case("distillation", "fp32", beta=0.5),
    Case("distillation", "bf16", beta=1.0),
    Case("grpo", "fp32"),
    Case("dpo", "fp32", masked=0.5),
    Case("gkd", "fp32", beta=0.5),
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


def extra_memory(case: Case, ours: bool) -> int:
    """Peak bytes beyond the inputs and the gradients."""
    with adapter.patch() if ours else contextlib.nullcontext():
        small = Case(case.trainer, case.dtype, 4, 64, 16, beta=case.beta)
        step(small)()  # thread pools, libraries
        leaves, loss = problem(case)
        memory.settle()
        Path("/proc/self/clear_refs").write_text("5")
        before = memory.resident()
        gradients = torch.autograd.grad(loss(), leaves)
        peak = memory.resident("VmHWM") - before
    return max(peak - sum(g.nbytes for g in gradients), 1)


def memory_of(case: Case, ours: bool) -> int:
    """`extra_memory` in a process of its own, forked where no tensor has been made yet."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(extra_memory, (case, ours))


def cases(quick: bool) -> list[Case]:
    if not quick:
        return CASES
    return [
        Case(c.trainer, c.dtype, 32, 1031, 64, masked=c.masked, beta=c.beta) for c in CASES[::2]
    ]


def agreement(steps: int, layers: tuple[int, int] | None) -> list[dict[str, Any]]:
    """Of each trainer, stock and patched: how far apart the numbers are that both log."""
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        models = trl_runs.Models(layers, Path(scratch))
        for name, run in trl_runs.RUNS.items():
            stock = run(models, Path(scratch) / "stock", steps)
            with adapter.patch():
                fused = run(models, Path(scratch) / "fused", steps)
            loss = max(abs(a["loss"] - b["loss"]) for a, b in zip(fused, stock, strict=True))
            others = [
                abs(a[key] - b[key]) / max(1.0, abs(b[key]))
                for a, b in zip(fused, stock, strict=True)
                for key in a.keys() - {"loss", "step_time"}
            ]
            found.append(
                {
                    "trainer": name,
                    "model": "lowest layers" if layers else "whole",
                    "steps": len(stock),
                    "loss": loss,
                    "others": max(others),
                    "last_loss": stock[-1]["loss"],
                }
            )
            print(f"{name}: {len(stock)} steps, loss within {loss:.1e}", flush=True)
    return found


def section(content: dict[str, Any]) -> str:
    """The table of docs/integrations.md."""
    lines = [
        f"Forward and backward, one thread, at a load of {content['load'][0]:.1f}.",
        "",
        "| loss part of a step | time, TRL / fusedkl | memory, TRL / fusedkl |",
        "|---|---|---|",
    ]
    for r in content["results"]:
        lines.append(
            f"| {r['case']} | {r['trl_ms']:.0f} / {r['ours_ms']:.0f} ms = {r['ratio']:.2f} "
            f"({r['ratio_low']:.2f} to {r['ratio_high']:.2f}) "
            f"| {r['trl_MiB']:.1f} / {r['ours_MiB']:.1f} MiB = {r['memory_ratio']:.1f} |"
        )
    lines += [
        "",
        "| trainer, SmolLM2, fp32 | steps | largest difference: loss | any other number logged |",
        "|---|---|---|---|",
    ]
    for r in content["agreement"]:
        lines.append(
            f"| {r['trainer']}, {r['model']} | {r['steps']} | {r['loss']:.1e} | {r['others']:.1e} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run")
    parser.add_argument("--output", type=Path, help="JSON")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each comparison")
    arguments = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1")
    torch.set_num_threads(1)
    for module in ("trl.trainer.distillation_trainer", "trl.experimental.gkd.gkd_trainer"):
        importlib.import_module(module)
    chosen = cases(arguments.quick)
    peaks: dict[str, list[int]] = {}
    if memory.supported():
        peaks = {c.name: [memory_of(c, ours) for ours in (True, False)] for c in chosen}
    results = []
    for case in chosen:
        found = time_case(case, arguments.rounds, arguments.seconds)
        said = f"{found['trl_ms']:.0f} -> {found['ours_ms']:.0f} ms, {found['ratio']:.2f}x"
        if case.name in peaks:
            ours, theirs = (peak / memory.MIB for peak in peaks[case.name])
            found |= {"ours_MiB": ours, "trl_MiB": theirs, "memory_ratio": theirs / ours}
            said += f"; {theirs:.0f} -> {ours:.1f} MiB"
        results.append({"case": case.name, **found})
        print(f"{case.name}: {said}", flush=True)
    agreed = agreement(*((3, (2, 3)) if arguments.quick else (20, None)))
    if arguments.output:
        content = {
            "suite": "trainers",
            "command": " ".join(["python", "bench/trainers.py", *sys.argv[1:]]),
            "commit": machine.commit(),
            "isa": torch.ops.fusedkl._cpu_isa(),
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
            "machine": machine.describe(),
            "versions": {
                name: importlib.metadata.version(name) for name in ("fusedkl", "torch", "trl")
            },
            "load": machine.load(),
            "results": results,
            "agreement": agreed,
        }
        arguments.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
