"""Runs the plan, a process per case and per peak, and writes what was found."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jobs_io
import machine
import torch
from speed import Settings
from tqdm import tqdm

from . import compare, errors, fake_memory, measure, outputs
from .batch import Case
from .entry import Entry, Point
from .plans import Item, plan

# Huge pages for torch's tensors; ours asks for them by itself.
ENVIRONMENT = {"THP_MEM_ALLOC_ENABLE": "1"}
QUICK = Settings(True, rounds=3, seconds=0.5, slow_rounds=2)
FULL = Settings(False, rounds=5, seconds=2.0)


@dataclass
class Found:
    """Everything a run measured."""

    about: dict[str, Any]
    entries: list[Entry] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    # Bytes that contenders would allocate on a GPU: rows of fake_memory.table().
    model: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> str:
        content = {
            "schema": 1,
            **self.about,
            "entries": [entry.to_json() for entry in self.entries],
            "points": [asdict(point) for point in self.points],
            "memory_model": self.model,
        }
        return json.dumps(content, indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> Found:
        content = json.loads(path.read_text())
        entries = [Entry.from_json(entry) for entry in content.pop("entries")]
        points = [Point(**point) for point in content.pop("points")]
        return cls(content, entries, points, content.pop("memory_model"))


def run(device: str, quick: bool, out: Path, old: Path | None) -> int:
    """0, or 1 if a job failed or a number of ours is wrong."""
    before = Found.read(old) if old else None
    found = Found(_about(device, quick))
    started = time.perf_counter()
    failed, took = _measure(device, quick, found)
    found.about |= {
        "seconds": round(time.perf_counter() - started, 1),
        "job_seconds": took,
        "load_after": machine.load(),
        "failed_jobs": failed,
    }
    comparison = compare.rows(before.entries, found.entries) if before else []
    outputs.write(found, out, comparison, old)
    wrong = [entry for entry in found.entries if entry.ours and entry.wrong]
    print(outputs.markdown(found, comparison, old))
    print(f"{found.about['seconds']} s. Written to {out}: report.html, report.md, results.json")
    for entry in wrong:
        print(f"WRONG: {entry.case.name}, {entry.contender}: {entry.wrong}")
    if failed:
        print(f"Jobs that failed: {'; '.join(failed)}")
    return 1 if failed or wrong else 0


def _about(device: str, quick: bool) -> dict[str, Any]:
    return {
        "command": machine.command(),
        "commit": machine.commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "suite": "quick" if quick else "full",
        "machine": machine.describe() | (machine.gpu() if device == "cuda" else {}),
        "isa": machine.instruction_set(),
        "versions": machine.versions(),
        "load_before": machine.load(),
    }


def _measure(device: str, quick: bool, found: Found) -> tuple[list[str], dict[str, float]]:
    """Fills `found`; the jobs that failed, and how long each took."""
    jobs: list[dict[str, Any]] = [{"kind": "errors"}, {"kind": "memory_model"}]
    for item in plan(device, quick):
        jobs.append({"kind": "times", "case": asdict(item.case), "only": item.only})
        # A GPU's allocator tells the peak while the time is taken.
        names = item.peaks if device == "cpu" else ()
        jobs += [{"kind": "peak", "case": asdict(item.case), "name": name} for name in names]
    failed, took = [], {}
    with tqdm(jobs, unit="job", dynamic_ncols=True) as bar:
        for job in bar:
            title = _title(job)
            bar.set_description(title[:60])
            started = time.perf_counter()
            status, tail = _child(job | {"device": device, "quick": quick}, found, bar)
            took[title] = round(time.perf_counter() - started, 1)
            if status != 0:
                failed.append(title)
                bar.write(f"{title} failed ({status}):\n{tail}")
    return failed, took


def _title(job: dict[str, Any]) -> str:
    where = Case(**job["case"]).name if "case" in job else ""
    return " ".join(part for part in (job["kind"], where, job.get("name", "")) if part)


def _child(job: dict[str, Any], found: Found, bar: tqdm[Any]) -> tuple[int, str]:
    peaks = {entry.key: entry for entry in found.entries}

    def take(line: str) -> None:
        kind, content = jobs_io.receive(line)
        if kind == "step":
            bar.set_postfix_str(content)
        elif kind == "entry":
            found.entries.append(Entry.from_json(content))
        elif kind == "point":
            found.points.append(Point(**content))
        elif kind == "model":
            found.model.append(content)
        elif kind == "peak":
            entry = peaks.get((Case(**job["case"]).name, job["name"]))
            if entry is not None:  # None: its times failed, which is reported
                entry.peak_bytes = content

    arguments = ["--work", json.dumps(job)]
    return jobs_io.child(arguments, dict(os.environ) | ENVIRONMENT, take)


def work(job: dict[str, Any]) -> None:
    """The child's side."""
    device, quick = job["device"], job["quick"]
    if device == "cpu":
        torch.set_num_threads(1)

    def say(text: str) -> None:
        jobs_io.send("step", text)

    if job["kind"] == "errors":
        for point in errors.points(say, device, quick):
            jobs_io.send("point", asdict(point))
    elif job["kind"] == "memory_model":
        for row in fake_memory.table(say, quick):
            jobs_io.send("model", row)
    elif job["kind"] == "peak":
        jobs_io.send("peak", measure.peak(Case(**job["case"]), job["name"]))
    else:
        settings = QUICK if quick else FULL
        item = Item(Case(**job["case"]), job["only"])
        for entry in measure.times(item, settings, device, say):
            jobs_io.send("entry", entry.to_json())
