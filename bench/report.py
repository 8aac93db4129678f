"""The table a reader sees, and the JSON that a page or a later run can be compared with."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from goals import FAILURES, GOALS, OUT_OF_REACH, Result, verdict
from tabulate import tabulate

HEADERS = ("quantity", "case", "measured", "10-90%", "must", "aim", "verdict", "how")
WIDTHS = (32, 30, None, None, None, None, None, 46)
FOOTNOTE = """\
Ratios are medians of the ratios of neighbouring samples, A B A B in one process; 10-90% is their
spread. One thread, process-CPU clock; "two threads" on the wall clock. "memory allows": the peer's
time over the time that reading the inputs alone takes in the same run. A verdict in brackets is of
a goal that was set for another instruction set."""


def table(results: list[Result], judged: bool) -> str:
    """All results in the order of the goals, each quantity named once."""
    rows = [(*line, verdict(r, judged), r.wrong or r.note) for line, r in lines(results)]
    return tabulate(rows, HEADERS, tablefmt="simple", disable_numparse=True, maxcolwidths=WIDTHS)


def lines(results: list[Result]) -> list[tuple[tuple[str, ...], Result]]:
    """Quantity, case, measured, spread, must and aim of every result, in the order of the goals."""
    order = {goal: place for place, goal in enumerate(GOALS)}
    found: list[tuple[tuple[str, ...], Result]] = []
    last = ""
    for result in sorted(results, key=lambda r: order[r.goal]):
        goal = GOALS[result.goal]
        sign = ">=" if goal.higher_is_better else "<="
        line = (
            goal.label if goal.label != last else "",
            result.case,
            _number(result.value, goal.unit),
            _spread(result),
            "" if goal.must is None else f"{sign} {_number(goal.must, goal.unit)}",
            "" if goal.aim is None else f"{sign} {_number(goal.aim, goal.unit)}",
        )
        found.append((line, result))
        last = goal.label
    return found


def summary(results: list[Result], judged: bool) -> str:
    """How many of each verdict."""
    counts = Counter(verdict(result, judged) for result in results)
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def failures(results: list[Result], judged: bool, within_reach: bool) -> list[Result]:
    """The results that miss a must; `within_reach` forgives what memory makes impossible."""
    bad = [name for name in FAILURES if not (within_reach and name == OUT_OF_REACH)]
    return [result for result in results if verdict(result, judged) in bad]


def write(path: Path, results: list[Result], judged: bool, about: dict[str, object]) -> None:
    """One JSON file: `about` (machine, versions, commit, command, ...) and every result."""
    goals = {
        key: {"must": goal.must, "aim": goal.aim, "unit": goal.unit, "label": goal.label}
        for key, goal in GOALS.items()
    }
    entries = [asdict(result) | {"verdict": verdict(result, judged)} for result in results]
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"schema": 1, **about, "goals": goals, "results": entries}
    path.write_text(json.dumps(content, indent=1, allow_nan=True) + "\n")


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    text = f"{value:.1e}" if unit == "" else f"{value:.3g}"
    if unit == "x":
        return text + "x"
    return f"{text} {unit}".strip()


def _spread(result: Result) -> str:
    if result.low is None or result.high is None:
        return ""
    return f"{result.low:.3g} - {result.high:.3g}"
