"""Measure fusedkl on this machine and judge it: `python bench/run.py --device cpu`.

With `--models`, and always on a GPU, it measures by model instead, everybody beside ours, and
writes a report with plots (suite/).

Every job runs in a process of its own, because huge pages, instruction sets and peak memory are
properties of a process. A job prints its results as it goes; this file starts the jobs, shows the
progress, prints the table, writes the JSON.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType

# Explicit, so that it also works where PYTHONSAFEPATH keeps the script's folder off the path.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import accuracy
import family
import growth
import inputs
import jobs_io
import linear
import machine
import memory
import report
import speed
import threads
import torch
from goals import Result
from speed import Settings
from tqdm import tqdm

AVX2 = {"FUSEDKL_CPU_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2"}


@dataclass(frozen=True)
class Job:
    """What to run in a fresh process, and the environment that it is about."""

    run: Callable[[jobs_io.Reporter, Settings], None]
    environment: dict[str, str] = field(default_factory=dict)
    threads: int | None = 1
    optional: bool = False
    needs_avx2: bool = False
    asked: bool = False  # only if it is named


def _memory(case: memory.Case) -> Job:
    run = functools.partial(_run_memory, case=case)
    return Job(run, threads=None)


def _run_memory(reporter: jobs_io.Reporter, settings: Settings, case: memory.Case) -> None:
    memory.run(reporter, settings.quick, case)


JOBS: dict[str, Job] = {
    "accuracy": Job(accuracy.run),
    "accuracy-avx2": Job(accuracy.run, AVX2, needs_avx2=True),
    "forward": Job(speed.run_forward),
    "family-accuracy": Job(family.run_accuracy),
    "family": Job(family.run_steps, {"THP_MEM_ALLOC_ENABLE": "1"}),
    "inputs": Job(inputs.run_inputs),
    # torch's own switch for its side; ours asks for huge pages by itself.
    "backward-huge": Job(speed.run_backward, {"THP_MEM_ALLOC_ENABLE": "1"}),
    "backward-plain": Job(speed.run_backward, {"FUSEDKL_HUGE_PAGES": "0"}),
    "backward-returned": Job(
        speed.run_backward, {"THP_MEM_ALLOC_ENABLE": "1", "FUSEDKL_KEEP_MEMORY": "0"}
    ),
    "avx2": Job(speed.run_avx2, AVX2 | {"THP_MEM_ALLOC_ENABLE": "1"}, needs_avx2=True),
    "growth": Job(growth.run),
    **{case.name: _memory(case) for case in memory.CASES},
    "linear-accuracy": Job(linear.run_accuracy),
    **{
        f"linear-{width}": Job(functools.partial(linear.run, width=width)) for width in (1024, 4096)
    },
    **{
        f"linear-memory-{'train' if backward else 'forward'}-{'fast' if fast else 'default'}": Job(
            functools.partial(linear.run_memory, backward=backward, fast=fast)
        )
        for backward in (False, True)
        for fast in (True, False)
    },
    "sweep-linear": Job(linear.run_sweep, asked=True),
    "threads": Job(threads.run, {"THP_MEM_ALLOC_ENABLE": "1"}, threads=2),
    "real": Job(inputs.run_real, {"THP_MEM_ALLOC_ENABLE": "1"}, optional=True),
}


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    quick = options.suite == "quick"
    if options.work:
        _suite().work(json.loads(options.work))
        return 0
    if options.models or options.device == "cuda":
        old = Path(options.compare) if options.compare else None
        out = Path(options.out or "out/bench")
        return _suite().run(options.device, quick, out, old)
    if options.job:
        _work(options.job, quick)
        return 0
    if not quick and machine.instruction_set() == "reference":
        print(
            "The compiled kernels are not in use (`python -m fusedkl info` says why); the full "
            "suite would time the reference implementation. Build them, or use --suite quick.",
            file=sys.stderr,
        )
        return 2
    about = {
        "command": machine.command(),
        "commit": machine.commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "suite": options.suite,
        "machine": machine.describe(),
        "isa": machine.instruction_set(),
        "versions": machine.versions(),
        "environment": machine.environment(),
        "load_before": machine.load(),
    }
    started = time.perf_counter()
    results, failed, took = _measure(_chosen(options), options.suite)
    about |= {
        "seconds": round(time.perf_counter() - started, 1),
        "job_seconds": took,
        "load_after": machine.load(),
        "failed_jobs": failed,
    }
    return _finish(options, results, failed, about)


def _suite() -> ModuleType:
    """Imported here: the jobs above need no plots."""
    return importlib.import_module("suite.driver")


def _finish(
    options: argparse.Namespace, results: list[Result], failed: list[str], about: dict[str, object]
) -> int:
    judged = options.suite == "full"
    path = Path(options.out or "out/bench-cpu.json")
    report.write(path, results, judged, about)
    print(report.table(results, judged))
    print("\n" + report.FOOTNOTE)
    print(f"\n{report.summary(results, judged)}. {about['seconds']} s. Written to {path}")
    if not judged:
        print("Quick suite: too small to judge speed and memory; accuracy is judged.")
    if failed:
        print(f"Jobs that failed: {', '.join(failed)}", file=sys.stderr)
        return 1
    missed = report.failures(results, judged, options.check == "reachable")
    return 1 if options.check and missed else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, prog="bench/run.py")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--suite", choices=["quick", "full"], default="full")
    parser.add_argument(
        "--only", default="", metavar="JOB,...", help="job names or their beginnings: see --list"
    )
    parser.add_argument("--list", action="store_true", help="print the job names")
    parser.add_argument("--real", action="store_true", help="also time a language model's logits")
    parser.add_argument(
        "--models", action="store_true", help="by model, with plots: report.html; implied by cuda"
    )
    parser.add_argument("--compare", metavar="OLD.json", help="with --models: an earlier run's")
    parser.add_argument(
        "--out", help="the JSON (out/bench-cpu.json), with --models the folder (out/bench)"
    )
    parser.add_argument(
        "--check",
        nargs="?",
        const="all",
        choices=["all", "reachable"],
        help="exit 1 when a must is missed; `reachable` forgives what this machine's memory "
        "bandwidth makes impossible for any kernel",
    )
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.compare and not (options.models or options.device == "cuda"):
        parser.error("--compare needs --models")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    if options.list:
        print("\n".join(JOBS))
        parser.exit()
    unknown = [p for p in _prefixes(options.only) if not any(j.startswith(p) for j in JOBS)]
    if unknown:
        parser.error(f"--only: no job begins with {', '.join(unknown)}; jobs: {', '.join(JOBS)}")
    return options


def _prefixes(only: str) -> list[str]:
    return [part.strip() for part in only.split(",") if part.strip()]


def _chosen(options: argparse.Namespace) -> list[str]:
    wanted = _prefixes(options.only)
    if wanted:
        return [job for job in JOBS if any(job.startswith(prefix) for prefix in wanted)]
    here = machine.instruction_set()
    return [
        job
        for job, what in JOBS.items()
        if (options.real or not what.optional)
        and (here in ("avx2", "avx512") or not what.needs_avx2)
        # where AVX2 is the best there is, the job beside it has done this
        and not (here == "avx2" and job == "accuracy-avx2")
        and not what.asked
    ]


def _measure(
    jobs: list[str], suite: str
) -> tuple[list[Result], list[str], dict[str, dict[str, float]]]:
    """Run the jobs one after the other: all results, the jobs that failed, how long each took."""
    results: list[Result] = []
    failed: list[str] = []
    took: dict[str, dict[str, float]] = {}
    with tqdm(jobs, unit="job", dynamic_ncols=True) as bar:
        for job in bar:
            bar.set_description(job)
            started = time.perf_counter(), _child_cpu()
            if not _run_job(job, suite, results, bar):
                failed.append(job)
            took[job] = {
                "wall": round(time.perf_counter() - started[0], 1),
                "cpu": round(_child_cpu() - started[1], 1),
            }
    return results, failed, took


def _child_cpu() -> float:
    """Processor seconds of the children so far; beside wall time it tells a busy machine."""
    times = os.times()
    return times.children_user + times.children_system


def _run_job(name: str, suite: str, results: list[Result], bar: tqdm[str]) -> bool:
    environment = {k: v for k, v in os.environ.items() if k not in _CLEARED}
    environment |= JOBS[name].environment

    def take(line: str) -> None:
        said = jobs_io.parse(line)
        if isinstance(said, Result):
            results.append(said)
        elif said is not None:
            bar.set_postfix_str(said)

    status, tail = jobs_io.child(["--job", name, "--suite", suite], environment, take)
    if status != 0:
        bar.write(f"job {name} failed ({status}):\n{tail}")
    return status == 0


# A job states its environment; what the caller happens to have set must not leak in.
_CLEARED = {name for name in machine.ENVIRONMENT if name not in ("FUSEDKL_BACKEND", "LD_PRELOAD")}


def _work(name: str, quick: bool) -> None:
    """The child's side."""
    job = JOBS[name]
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    settings = Settings(quick, rounds=3, seconds=1.0, slow_rounds=2) if quick else Settings(quick)
    job.run(jobs_io.Reporter(machine.instruction_set()), settings)


if __name__ == "__main__":
    sys.exit(main())
