"""Write the results of one JSON file into docs/performance.md.

    python bench/page.py bench/results/NAME.json

replaces what stands there between the two marks, so that no number on that page is typed by hand.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import report
from goals import Result, verdict
from tabulate import tabulate

PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- results:begin -->\n", "<!-- results:end -->\n"


def section(path: Path) -> str:
    """The Markdown between the marks: what was measured on what, and the table of all results."""
    content: dict[str, Any] = json.loads(path.read_text())
    names = Result.__dataclass_fields__
    results = [
        Result(**{name: value for name, value in entry.items() if name in names})
        for entry in content["results"]
    ]
    judged = content["suite"] == "full"
    machine = ", ".join(f"{name} {value}" for name, value in content["machine"].items())
    versions = ", ".join(f"{name} {value}" for name, value in content["versions"].items())
    rows = [(*line, verdict(result, judged)) for line, result in report.lines(results)]
    table = tabulate(rows, report.HEADERS[:7], tablefmt="github", disable_numparse=True)
    return (
        f"From `bench/results/{path.name}`, written by `{content['command']}` at commit "
        f"{content['commit']} on {content['date']}.\n\n"
        f"Machine: {machine}. Versions: {versions}.\n\n"
        f"{report.FOOTNOTE}\n\n{table}\n\n{report.summary(results, judged)}.\n"
    )


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    before, rest = PAGE.read_text().split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(before + BEGIN + section(Path(arguments[0])) + END + after)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
