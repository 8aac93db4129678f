"""Write the results of one JSON file into its page of docs/.

    python bench/page.py bench/results/NAME.json [KIND]

replaces what stands there between the two marks of its kind, or of one of its kinds (a run of
bench/run.py, whose results of the lm_head have a page of their own, of the same with --models, of
bench/memory_model.py, bench/linear_tables.py, bench/cpu_loops.py, bench/dropin.py,
bench/trainers.py or bench/sharding.py), so that no number on these pages is typed by hand.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import report
from goals import Result, verdict
from tabulate import tabulate

DOCS = Path(__file__).resolve().parent.parent / "docs"
# Of each kind of file, the page that shows it.
PAGES = {
    "results-avx512": DOCS / "performance.md",
    "cpu-loops": DOCS / "performance.md",
    "results-avx2": DOCS / "performance.md",
    "memory-model": DOCS / "performance.md",
    "models-cpu": DOCS / "performance.md",
    "models-cuda": DOCS / "performance.md",
    "linear-results": DOCS / "linear.md",
    "linear-tables": DOCS / "linear.md",
    "dropin": DOCS / "dropin.md",
    "trainers": DOCS / "integrations.md",
    "sharding": DOCS / "sharding.md",
}
# Scripts that say what their results look like, with a `section(content)`.
SCRIPTS = {
    "cpu-loops": "cpu_loops",
    "linear-tables": "linear_tables",
    "dropin": "dropin",
    "trainers": "trainers",
    "sharding": "sharding",
}
# Between the marks of results that nobody has committed yet.
NOTHING = "No results are committed yet: they want a quiet machine.\n"


def marks(kind: str) -> tuple[str, str]:
    return f"<!-- {kind}:begin -->\n", f"<!-- {kind}:end -->\n"


def kinds(content: dict[str, Any]) -> list[str]:
    """Which marks a file's sections belong between: a run has those of its instruction set."""
    if "products" in content:
        return ["linear-tables"]
    if "entries" in content:
        return [f"models-{content['device']}"]
    if "memory_model" in content:
        return ["memory-model"]
    if "goals" not in content:
        suite = content.get("suite", "")  # none: a figure's
        return [suite] if suite in SCRIPTS else []
    linear = {_of_linear(entry) for entry in content["results"]}
    return [f"results-{content['isa']}"] * (False in linear) + ["linear-results"] * (True in linear)


def _of_linear(entry: dict[str, Any]) -> bool:
    return str(entry["goal"]).startswith("linear_")


def section(path: Path, of: str) -> str:
    """The Markdown between the marks of one kind, of one JSON file."""
    content = json.loads(path.read_text())
    if of in SCRIPTS:
        return _of_script(path, content, SCRIPTS[of])
    if of == "memory-model":
        return _memory_model(path, content)
    if of.startswith("models-"):
        return _models(path)
    linear = of == "linear-results"
    return _results(path, content, [e for e in content["results"] if _of_linear(e) == linear])


def _of_script(path: Path, content: dict[str, Any], script: str) -> str:
    # Here, because it imports fusedkl, which the other tables do without.
    module = importlib.import_module(script)
    machine = ", ".join(f"{name} {value}" for name, value in content.get("machine", {}).items())
    where = f" Machine: {machine}, {content['isa']} kernels." if machine else ""  # or nothing ran
    versions = ", ".join(f"{name} {value}" for name, value in content["versions"].items())
    return (
        f"From `bench/results/{path.name}`, written by `{content['command']}` at commit "
        f"{content['commit']} on {content['date']}.{where} Versions: {versions}.\n\n"
        f"{module.section(content)}"
    )


def _memory_model(path: Path, content: dict[str, Any]) -> str:
    """The table of bytes that contenders would allocate on a GPU."""
    # Here, because it imports what draws plots, which the tables of goals do without.
    from suite import outputs

    table = outputs.memory_model(content["memory_model"])
    cells = [[shown for shown, _ in row] for row in table.rows]
    versions = ", ".join(f"{name} {value}" for name, value in content["versions"].items())
    return (
        f"From `bench/results/{path.name}`, written by `{content['command']}` at commit "
        f"{content['commit']} on {content['date']}. Versions: {versions}.\n\n"
        f"{tabulate(cells, table.columns, tablefmt='github', disable_numparse=True)}\n"
    )


def _models(path: Path) -> str:
    """What was measured on what, and a line per case."""
    # Here, because it imports what draws plots, which the tables of goals do without.
    from suite import driver, outputs

    found = driver.Found.read(path)
    about = dict(outputs.about(found))
    table = outputs.in_short(found.entries)
    cells = [[shown for shown, _ in row] for row in table.rows]
    return (
        f"From `bench/results/{path.name}`, written by `{about['command']}` at commit "
        f"{about['commit']}, in {about['took']}. Machine: {about['machine']}; "
        f"{about['instruction set']} kernels; load {about['load']}. Versions: "
        f"{about['versions']}. {outputs.PLACES[found.about['device']]}\n\n"
        f"{tabulate(cells, table.columns, tablefmt='github', disable_numparse=True)}\n"
    )


def _results(path: Path, content: dict[str, Any], entries: list[dict[str, Any]]) -> str:
    """What was measured on what, and the table of all results."""
    names = Result.__dataclass_fields__
    results = [
        Result(**{name: value for name, value in entry.items() if name in names})
        for entry in entries
    ]
    judged = content["suite"] == "full"
    machine = ", ".join(f"{name} {value}" for name, value in content["machine"].items())
    versions = ", ".join(f"{name} {value}" for name, value in content["versions"].items())
    rows = [(*line, verdict(result, judged)) for line, result in report.lines(results)]
    table = tabulate(rows, report.HEADERS[:7], tablefmt="github", disable_numparse=True)
    return (
        f"From `bench/results/{path.name}`, written by `{content['command']}` at commit "
        f"{content['commit']} on {content['date']}.\n\n"
        f"Machine: {machine}; load before {_loads(content['load_before'])}, after "
        f"{_loads(content['load_after'])} (of 1, 5, 15 minutes). Versions: {versions}.\n\n"
        f"{report.FOOTNOTE}\n\n{table}\n\n{report.summary(results, judged)}.\n"
    )


def _loads(of: list[float]) -> str:
    return ", ".join(f"{load:.1f}" for load in of)


def main(arguments: list[str]) -> int:
    path = Path(arguments[0]) if arguments else None
    found = kinds(json.loads(path.read_text())) if path else []
    if path is None or len(arguments) > 2 or not {*arguments[1:]} <= {*found}:
        print(__doc__, f"kinds: {', '.join(found)}" if found else "", sep="\n", file=sys.stderr)
        return 2
    for of in arguments[1:] or found:
        begin, end = marks(of)
        page = PAGES[of]
        before, rest = page.read_text().split(begin)
        after = rest.split(end)[1]
        page.write_text(before + begin + section(path, of) + end + after)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
