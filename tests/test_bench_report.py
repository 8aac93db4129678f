"""What a run of the suite writes: JSON, a comparison, Markdown, plots, a page for the browser."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bench_modules import (
    suite_batch,
    suite_compare,
    suite_driver,
    suite_entry,
    suite_outputs,
    timing,
)
from browser import CHROMIUM, visit

ROOT = Path(__file__).resolve().parents[1]
Entry = suite_entry.Entry
KL = suite_batch.Case("models", "forward_kl", "small", 16)


def _spread(median: float, by: float = 0.1) -> Any:
    return timing.Spread(median, median * (1 - by), median * (1 + by), median * (1 - by))


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


def test_a_case_has_a_line_with_the_first_of_ours_that_is_right(found: Any) -> None:
    wrong = Entry(KL, "fusedkl triton", value_error=0.1, wrong="value 2, expected 1")
    slow = Entry(KL, "chunked", skipped="not timed: about 99 s a call")
    compiled = Entry(KL, "torch.compile", value_error=0.1, wrong="value 2, expected 1")
    table = suite_outputs.in_short([wrong, *found.entries, slow, compiled])
    first, second = ([shown for shown, _ in row] for row in table.rows)
    assert first[1:] == ["1", "80%", "1e-08", "10 (9 - 11)", "not timed", "wrong"]
    assert second[4:] == ["10 (9 - 11)", "", ""] and len(table.columns) == len(first)
    (ours, *_), head = found.entries, Entry(KL, "eager", skipped="not timed: about 99 s a call")
    wide = Entry(KL, "eager, float32 products", _spread(0.004), _spread(4.0))
    (line,) = suite_outputs.in_short([ours, head, wide]).rows
    assert line[4][0] == "4 (3.6 - 4.4), float32 products"


@pytest.mark.slow
def test_the_files_of_a_run(found: Any, tmp_path: Path) -> None:
    changes = suite_compare.rows(found.entries, found.entries)
    suite_outputs.write(found, tmp_path, changes, Path("old.json"))
    text, page = ((tmp_path / f"report.{kind}").read_text() for kind in ("md", "html"))
    for said in ("WRONG: value 2, expected 1", "wrong", "10.00", "80.0%", "3.50", "New over old"):
        assert said in text and said in page, said
    assert "&lt;planted&gt;" in page and "<planted>" not in page
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    plots = {path.name for path in (tmp_path / "plots").iterdir()}
    names = ("time", "memory", "error", "tokens", "limit")
    assert plots == {f"{name}.{kind}" for name in names for kind in ("svg", "png")}
    assert re.findall(r"!\[.*\]\((.*)\)", text) == [f"plots/{name}.svg" for name in names]


SORTING = """<script>addEventListener("load", () => {
  const table = document.querySelectorAll("table")[1];
  const times = () => [...table.tBodies[0].rows].map((row) => row.cells[2].textContent);
  const button = table.tHead.rows[0].cells[2].firstElementChild;
  for (const expected of ["1,10,wrong", "10,1,wrong"]) {
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


def measured(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "run.py", "--suite", "quick", *arguments],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.full
def test_a_small_run_by_model_and_its_page(tmp_path: Path) -> None:
    """`make bench`, smaller: everything is measured, judged, drawn, and opens in a browser."""
    measured("--models", "--out", str(tmp_path / "out"))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(results["entries"]) > 20
    assert not any(e["wrong"] for e in results["entries"] if e["contender"].startswith("fusedkl"))
    assert "fusedkl" in (tmp_path / "out" / "report.md").read_text()
    if CHROMIUM is not None:
        seen = visit(tmp_path / "out", "report.html", tmp_path)
        assert seen == {"errors": [], "broken": [], "foreign": []}


@pytest.mark.full
def test_a_small_run_on_this_cpu(tmp_path: Path) -> None:
    """`make bench-cpu`, smaller: the jobs run, and what they measure is right."""
    path = tmp_path / "found.json"
    jobs = ("accuracy", "forward", "backward-huge", "family", "inputs", "growth", "threads")
    measured("--device", "cpu", "--out", str(path), "--only", ",".join(jobs))
    found = json.loads(path.read_text())
    assert not found["failed_jobs"] and len(found["results"]) > 30
    assert not [r for r in found["results"] if r["wrong"]]


@pytest.mark.full
def test_pytest_benchmark_runs_the_suite(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    path = tmp_path / "benchmark.json"
    command = [sys.executable, "-I", "-m", "pytest", "bench/", "--benchmark-only", "-q"]
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
        # of a worker of pytest-xdist it would inherit that benchmarks are off
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
        | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    groups = {entry["group"] for entry in json.loads(path.read_text())["benchmarks"]}
    assert any("sliced" in group for group in groups) and any(
        "reverse" in group for group in groups
    )
