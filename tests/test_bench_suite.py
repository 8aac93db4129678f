"""The suite's logic: right ones are timed, wrong ones shown, memory is counted, a page is made."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_modules import (
    contenders,
    oracle_f64,
    speed,
    suite_batch,
    suite_compare,
    suite_contenders,
    suite_driver,
    suite_entry,
    suite_fake_memory,
    suite_judge,
    suite_measure,
    suite_models,
    suite_outputs,
    suite_plans,
    timing,
)
from browser import CHROMIUM, visit
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
Case, Entry = suite_batch.Case, suite_entry.Entry
KL = Case("models", "forward_kl", "small", 16)
QUICK = speed.Settings(True, rounds=2, seconds=0.05)


def _spread(median: float, by: float = 0.1) -> Any:
    return timing.Spread(median, median * (1 - by), median * (1 + by), median * (1 - by))


# -- inputs and the truth ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_the_truth_is_the_oracles(kind: str) -> None:
    case = dataclasses.replace(KL, operation=f"{kind}_kl", masked=0.5)
    batch = suite_batch.build(case)
    true = suite_judge.truth(case, batch)
    counted = batch.counted.nonzero().flatten().tolist()
    rows = [oracle_f64.row(batch.policy[i], batch.reference[i]) for i in counted]
    assert 1 < len(counted) < case.tokens
    expected = sum(float(getattr(row, f"{kind}_kl")) for row in rows) / len(rows)
    assert true.value == pytest.approx(expected, rel=1e-9)
    gradient = getattr(rows[-1], f"{kind}_gradient") / len(rows)
    assert oracle_f64.relative_l2(true.gradient(counted[-1]), gradient) < 1e-8
    assert not true.gradient(int((~batch.counted).nonzero()[0])).any()


def test_a_slice_stays_a_slice_and_its_copy_too() -> None:
    batch = suite_batch.build(dataclasses.replace(KL, layout="sliced"))
    for leaf in (suite_judge.leaf(batch.policy, copied) for copied in (False, True)):
        assert leaf.stride() == (4096 + suite_batch.PADDING, 1) and leaf.shape == (16, 4096)
    assert torch.equal(batch.policy, suite_batch.build(KL).policy)


@pytest.mark.parametrize(
    "operation", ["forward_kl", "reverse_kl", "jsd", "token_stats", "topk", "linear"]
)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_every_contender_is_right(operation: str, dtype: str) -> None:
    case = Case("operations", operation, "small", 16, dtype, masked=0.5)
    batch = suite_batch.build(case)
    true = suite_judge.truth(case, batch)
    for name, make in suite_contenders.makers(case, "cpu").items():
        if name.startswith("torch.compile") or name == "eager, no upcast":
            continue  # slow to make; of 16 bits, wrong by nature
        found = suite_judge.judge(make(case), case, batch, true)
        assert found.wrong == "", name
        assert found.gradient is not None and found.gradient < 3e-2


# -- correctness first ---------------------------------------------------------------------------


def _plant(loss: Callable[[Any], Tensor], monkeypatch: pytest.MonkeyPatch, case: Any) -> Any:
    def planted(case: Any, device: str) -> dict[str, Any]:
        ours = suite_contenders.ours(case, "reference")
        return {
            "fusedkl reference": lambda case: ours,
            "planted": lambda case: contenders.Contender("planted", loss),
        }

    monkeypatch.setattr(suite_measure, "makers", planted)
    item = suite_plans.Item(case)
    ours, other = suite_measure.times(item, QUICK, "cpu", lambda text: None)
    assert ours.wrong == "" and ours.seconds.median > 0 and ours.share > 0
    return other


def _right(b: Any) -> Tensor:
    return contenders.two_lines(b.policy, b.reference)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda b: 1.05 * _right(b), "value"),
        (lambda b: 2 * _right(b) - _right(b).detach(), "gradient off"),
        (lambda b: _right(b) * math.nan, "value nan"),
    ],
    ids=["value", "gradient", "nan"],
)
def test_wrong_numbers_are_shown_and_not_timed(
    loss: Callable[[Any], Tensor], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = _plant(loss, monkeypatch, KL)
    assert said in other.wrong and other.seconds is None and other.ratio is None


def test_a_gradient_on_a_masked_row_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaks(b: Any) -> Tensor:
        rows = torch.stack(
            [
                contenders.two_lines(x[None], y[None])
                for x, y in zip(b.policy, b.reference, strict=True)
            ]
        )
        mean = (rows * b.counted).sum() / b.counted.sum()
        other = (rows * ~b.counted).sum()
        return mean + other - other.detach()

    case = dataclasses.replace(KL, masked=0.5, dtype="fp32")
    assert "gradient off by inf" in _plant(leaks, monkeypatch, case).wrong


def test_a_right_peer_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    other = _plant(_right, monkeypatch, KL)
    assert other.wrong == "" and other.seconds.median > 0 and other.ratio.median > 0


def test_what_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite_measure, "available_bytes", lambda device: 16 * 4096 * 12)
    assert suite_measure.fits(KL, "fusedkl cpu", "cpu")
    assert not suite_measure.fits(KL, "eager", "cpu")


# -- plans ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_plan_covers_what_it_should(device: str) -> None:
    items = suite_plans.plan(device, quick=False)
    cases = [item.case for item in items]
    named = {"llama3", "qwen3", "qwen3.5", "gemma3", "gpt-oss", "deepseek-v3", "kimi-k2", "glm-5"}
    assert named <= {case.model for case in cases}
    assert {"smollm2", "gemma3-270m"} <= {case.model for case in cases}
    assert {case.operation for case in cases} == set(suite_contenders.OPERATIONS)
    assert {case.masked for case in cases} == {0.0, 0.5, 0.9}
    assert {case.dtype for case in cases} == {"bf16", "fp16", "fp32"}
    assert {case.layout for case in cases} == {"contiguous", "sliced"}
    assert len({case.name for case in cases}) == len(cases)
    if device == "cuda":
        assert {256, 32768} <= {case.tokens for case in cases}
    for item in items:
        assert set(filter(None, item.only.split(";"))) <= set(suite_contenders.PEERS)
        assert all(item.chooses(name) for name in item.peaks), item
        assert item.case.vocabulary == suite_models.MODELS[item.case.model].vocabulary


# -- the memory model ----------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["forward_kl", "jsd", "token_stats", "linear"])
@pytest.mark.parametrize("name", ["eager", "row loop", "chunked, checkpoint"])
def test_the_small_engine_finds_autograds_gradients(operation: str, name: str) -> None:
    case = dataclasses.replace(KL, operation=operation, tokens=5)
    batch = suite_batch.build(case)
    loss = suite_contenders.PEERS[name](case).loss
    leaf = batch.policy.detach().requires_grad_()
    (expected,) = torch.autograd.grad(loss(batch._replace(policy=leaf)), leaf)
    found = suite_fake_memory.backward(loss(batch._replace(policy=leaf)))[id(leaf)]
    assert torch.equal(found, expected) and bool(found.any())


def test_allocations_are_counted_while_they_live() -> None:
    with suite_fake_memory.Allocations() as seen:
        a = torch.ones(1000)
        b = a + 1
        view = b[:10]
        assert seen.now == 8000
        del a, b
        assert seen.now == 4000  # the view keeps what it looks at
        del view
        c = torch.ones(500)
        assert (seen.now, seen.most) == (2000, 8000)
        del c


def test_bytes_on_a_gpu_without_one() -> None:
    """10 gradients for eager is also what VmHWM says of the same code on a CPU."""
    case = Case("memory model", "forward_kl", "gemma3-270m", 32768)
    logits = 32768 * 262144 * 2
    found = {
        contender.name: suite_fake_memory.count(contender, case) / logits
        for contender in suite_fake_memory.contenders(case)
    }
    assert found["eager"] == pytest.approx(10, abs=0.01)
    assert found["eager, no upcast"] == pytest.approx(5, abs=0.01)
    assert found["chunked, checkpoint"] < found["chunked"] < found["eager"]
    assert found["fusedkl triton"] == pytest.approx(1, abs=0.001)
    assert found["fusedkl triton inplace_grad"] < 0.001


# -- what is written -----------------------------------------------------------------------------


@pytest.fixture
def found() -> Any:
    about = {
        **{"command": "c", "commit": "abc", "date": "d", "device": "cpu", "suite": "full"},
        **{"machine": {"cores": 2}, "isa": "avx2", "versions": {"torch": "2"}, "seconds": 1.0},
        **{"load_before": [], "load_after": []},
    }
    ours = Entry(KL, "fusedkl cpu", _spread(0.001), _spread(1.0), 1e-8, 1e-3, peak_bytes=2**20)
    eager = Entry(KL, "eager", _spread(0.01), _spread(10.0), 1e-5, 1e-3, peak_bytes=10 * 2**20)
    bad = Entry(KL, "<planted>", value_error=0.5, wrong="value 2, expected 1")
    ours.share, eager.share = 0.8, 0.08
    more = [
        dataclasses.replace(e, case=dataclasses.replace(KL, topic="tokens", tokens=64))
        for e in (ours, eager)
    ]
    points = [
        suite_entry.Point(name, kl, error / kl, 0, 8)
        for name, error in (("F.kl_div, float32", 1e-8), ("fusedkl, float32", 1e-12))
        for kl in (1e-6, 1e-3)
    ]
    row = {"operation": "jsd", "model": "m", "tokens": 8, "vocabulary": 9, "contender": "eager"}
    model = [row | {"bytes": 2**31, "times_logits": 3.5}]
    return suite_driver.Found(about, [ours, eager, bad, *more], points, model)


def test_results_survive_the_file(found: Any, tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(found.to_json())
    again = suite_driver.Found.read(path)
    assert again.entries == found.entries and again.points == found.points
    assert again.model == found.model
    assert json.loads(path.read_text())["entries"][0]["least_bytes"] == 3 * 16 * 4096 * 2


def test_comparison_tells_changes_from_noise() -> None:
    def entry(ms: float, ratio: float, name: str = "eager", wrong: str = "") -> Any:
        if wrong:
            return Entry(KL, name, wrong=wrong)
        return Entry(KL, name, _spread(ms), _spread(ratio), peak_bytes=100)

    old = entry(10.0, 5.0)
    change = suite_compare.change
    assert change(old, entry(20.0, 5.2)).verdict == "within the spread"  # a busier machine
    assert change(old, entry(10.0, 10.0)).verdict == "slower"
    assert change(old, entry(10.0, 2.0)).verdict == "faster"
    assert change(old, entry(0, 0, wrong="value")).verdict == "now wrong: value"
    assert (
        change(entry(1.0, 1.0, "fusedkl cpu"), entry(2.0, 1.0, "fusedkl cpu")).verdict == "slower"
    )
    assert suite_compare.rows([old], [entry(1.0, 1.0, "chunked")]) == []
    (found,) = suite_compare.rows([old], [entry(20.0, 10.0)])
    assert (found.time, found.ratio, found.peak) == (2.0, 2.0, 1.0)


def test_the_files_of_a_run(found: Any, tmp_path: Path) -> None:
    changes = suite_compare.rows(found.entries, found.entries)
    suite_outputs.write(found, tmp_path, changes, Path("old.json"))
    text, page = ((tmp_path / f"report.{kind}").read_text() for kind in ("md", "html"))
    for said in ("WRONG: value 2, expected 1", "10.00", "80.0%", "3.50", "New over old"):
        assert said in text and said in page, said
    assert "&lt;planted&gt;" in page and "<planted>" not in page
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    plots = {path.name for path in (tmp_path / "plots").iterdir()}
    names = ("time", "memory", "limit", "error", "tokens")
    assert plots == {f"{name}.{kind}" for name in names for kind in ("svg", "png")}
    assert re.findall(r"!\[.*\]\((.*)\)", text) == [f"plots/{name}.svg" for name in names]


SORTING = """<script>addEventListener("load", () => {
  const table = document.querySelectorAll("table")[0];
  const times = () => [...table.tBodies[0].rows].map((row) => row.cells[2].textContent);
  const button = table.tHead.rows[0].cells[2].firstElementChild;
  for (const expected of ["1,10,", "10,1,"]) {
    button.click();
    if (times().join() !== expected) throw new Error(`${times()} instead of ${expected}`);
  }
});</script></body>"""


@pytest.mark.full
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_the_page_in_a_browser(found: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    suite_outputs.write(found, out, [], None)
    clean = {"errors": [], "broken": [], "foreign": []}
    page = (out / "report.html").read_text()
    (out / "sorted.html").write_text(page.replace("</body>", SORTING))
    assert visit(out, "report.html", tmp_path) == clean
    assert visit(out, "sorted.html", tmp_path) == clean
    broken = page.replace("base64,", "base64,AAAA").replace("for (const table", "for (cnst table")
    (out / "broken.html").write_text(broken)
    seen = visit(out, "broken.html", tmp_path)
    assert len(seen["broken"]) >= 5 and seen["errors"]


@pytest.mark.full
def test_pytest_benchmark_runs_the_suite(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    path = tmp_path / "benchmark.json"
    command = [sys.executable, "-P", "-m", "pytest", "bench/", "--benchmark-only", "-q"]
    done = subprocess.run(
        [
            *command,
            f"--benchmark-json={path}",
            "-k",
            "reverse_kl or sliced",
            "-p",
            "no:cacheprovider",
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    groups = {entry["group"] for entry in json.loads(path.read_text())["benchmarks"]}
    assert any("sliced" in group for group in groups) and any(
        "reverse" in group for group in groups
    )
