"""The files of a run: results.json, plots/, report.md, and report.html with everything inside."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup
from tabulate import tabulate
from timing import Spread

from . import plots
from .compare import Change
from .entry import Entry

if TYPE_CHECKING:
    from .driver import Found

HERE = Path(__file__).resolve().parent
TOPICS = {
    "models": "Vocabularies of models",
    "operations": "Operations",
    "inputs": "Types, masks, slices, and logits of models over text",
    "tokens": "Numbers of tokens",
}
# Who stands beside ours where a case has one line.
BESIDE = ("eager", "chunked", "torch.compile")
COLUMNS = (
    *("case", "contender", "ms", "10-90%", "times ours", "10-90%"),
    *("value error", "gradient error", "peak MiB", "share of memory limit", "remark"),
)
NOTE = """\
Times are medians, interleaved with ours (A B A B in one process), and "times ours" is the median of
the ratios of neighbouring samples; 10-90% is the spread. Errors are relative, against float64; a
contender whose numbers are off by more than a percent (ours: by more than rounding) is shown as
wrong and is not timed. Peak is memory above the inputs. The share of the memory limit is the time
that reading the inputs once and writing the gradient once would take at the rate at which this
machine was measured to read them, over the time taken."""
PLACES = {"cpu": "One thread, process-CPU clock.", "cuda": "Events on the stream, cold L2 cache."}


@dataclass(frozen=True)
class Table:
    """Cells are (what is shown, what it is sorted by)."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[tuple[str, float | str]]]


def write(found: Found, out: Path, comparison: list[Change], old: Path | None) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(found.to_json())
    figures = plots.draw(found, out / "plots")
    (out / "report.md").write_text(markdown(found, comparison, old, figures))
    (out / "report.html").write_text(page(found, comparison, old, figures))


def tables(found: Found, comparison: list[Change], old: Path | None) -> list[Table]:
    made = [
        in_short(found.entries),
        *(
            Table(title, COLUMNS, [_row(e) for e in found.entries if e.case.topic == topic])
            for topic, title in TOPICS.items()
        ),
    ]
    if found.model:
        made.append(memory_model(found.model))
    if old is not None:
        made.insert(0, _changes(comparison, old))
    return [table for table in made if table.rows]


def in_short(entries: list[Entry]) -> Table:
    """A line per case: the first of ours that is right, and how many times longer others take."""
    columns = ("case", "ms", "share of memory limit", "value error")
    rows = []
    for case in dict.fromkeys(entry.case for entry in entries):
        of_case = {entry.contender: entry for entry in entries if entry.case == case}
        ours = next((entry for entry in of_case.values() if entry.ours and entry.seconds), None)
        if ours is None or ours.seconds is None:
            continue
        rows.append(
            [
                *(_text(case.name), _digits(1e3 * ours.seconds.median)),
                *(_number(ours.share, ".0%"), _number(ours.value_error, ".0e")),
                *(_times(of_case, name) for name in BESIDE),
            ]
        )
    return Table("In short", (*columns, *(f"{name}, times ours" for name in BESIDE)), rows)


def _times(of_case: dict[str, Entry], name: str) -> tuple[str, float | str]:
    entry, remark = of_case.get(name), ""
    if entry is None:
        return _text("")
    if entry.wrong:
        return "wrong", ""
    if entry.ratio is None:  # its float32 products, which are slow nowhere, may have been
        entry, remark = of_case.get(f"{name}, float32 products", entry), ", float32 products"
    if entry.ratio is None:
        return "not timed", ""
    median = entry.ratio.median
    return f"{_digits(median)[0]} ({_spread(entry.ratio)[0]}){remark}", median


def memory_model(model: list[dict[str, Any]]) -> Table:
    columns = ("operation", "model", "tokens", "contender", "GiB", "times the policy's logits")
    rows = [
        [
            *(_text(row[name]) for name in ("operation", "model")),
            _number(float(row["tokens"]), ".0f"),
            _text(row["contender"]),
            _number(row["bytes"] / 2**30, ".2f"),
            _number(row["times_logits"], ".2f"),
        ]
        for row in model
    ]
    title = "What a GPU's allocator would be asked for above the inputs, bfloat16, with gradient"
    return Table(title, columns, rows)


def _changes(comparison: list[Change], old: Path) -> Table:
    columns = ("case", "contender", "time", "times ours", "peak", "verdict")
    rows = [
        [
            *(_text(change.case), _text(change.contender)),
            *(_number(change.time, ".2f"), _number(change.ratio, ".2f")),
            *(_number(change.peak, ".2f"), _text(change.verdict)),
        ]
        for change in comparison
    ]
    return Table(f"New over old ({old.name})", columns, rows)


def _median(spread: Spread | None) -> float | None:
    return None if spread is None else spread.median


def _row(entry: Entry) -> list[tuple[str, float | str]]:
    ms = None if entry.seconds is None else _scaled(entry.seconds, 1e3)
    ratio = entry.ratio
    peak = None if entry.peak_bytes is None else entry.peak_bytes / 2**20
    remark = f"WRONG: {entry.wrong}" if entry.wrong else entry.skipped
    # Where the time would stand: the remark is far to the right. No key: sorted to the end.
    time: tuple[str, float | str] = "wrong" if entry.wrong else "skipped", ""
    if ms is not None:
        time = _digits(ms.median)
    return [
        *(_text(entry.case.name), _text(entry.contender)),
        *(time, _spread(ms)),
        *(_number(_median(ratio), ".2f"), _spread(ratio)),
        *(_number(entry.value_error, ".1e"), _number(entry.gradient_error, ".1e")),
        *(_number(peak, ".1f"), _number(entry.share, ".1%"), _text(remark)),
    ]


def _scaled(spread: Spread, by: float) -> Spread:
    return Spread(*(by * x for x in (spread.median, spread.low, spread.high, spread.least)))


def _text(text: str) -> tuple[str, float | str]:
    return text, text


def _number(value: float | None, form: str) -> tuple[str, float | str]:
    return ("", "") if value is None else (format(value, form), value)


def _digits(value: float | None) -> tuple[str, float | str]:
    """Three digits, and no exponent."""
    if value is None:
        return "", ""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}", value


def _spread(spread: Spread | None) -> tuple[str, float | str]:
    if spread is None:
        return "", ""
    return f"{_digits(spread.low)[0]} - {_digits(spread.high)[0]}", spread.low


def about(found: Found) -> list[tuple[str, str]]:
    """What was run on what, as pairs of a name and a text."""

    def listed(pairs: Iterable[tuple[str, Any]]) -> str:
        return ", ".join(f"{name} {value}" for name, value in pairs)

    def _load(averages: list[float]) -> str:
        return " ".join(f"{value:.1f}" for value in averages) or "unknown"

    had = found.about
    return [
        ("command", had["command"]),
        ("commit", f"{had['commit']}, {had['date']}"),
        ("machine", listed(had["machine"].items())),
        ("versions", listed(had["versions"].items())),
        ("load", f"{_load(had['load_before'])} before, {_load(had['load_after'])} after"),
        ("took", f"{had['seconds']} s"),
        ("instruction set", had["isa"]),
    ]


def markdown(
    found: Found,
    comparison: list[Change],
    old: Path | None,
    figures: list[plots.Figure] | None = None,
) -> str:
    place = PLACES[found.about["device"]]
    parts = ["# fusedkl: who is how fast, how large and how right\n", f"{NOTE} {place}\n"]
    if found.about["suite"] == "quick":
        parts.append("Quick suite: the sizes show that everything works, and nothing else.\n")
    parts.append("\n".join(f"- {name}: {text}" for name, text in about(found)) + "\n")
    for figure in figures or []:
        parts.append(f"![{figure.title}](plots/{figure.svg.name})\n")
    for table in tables(found, comparison, old):
        cells = [[shown for shown, _ in row] for row in table.rows]
        text = tabulate(cells, table.columns, tablefmt="github", disable_numparse=True)
        parts.append(f"## {table.title}\n\n{text}\n")
    return "\n".join(parts)


def page(
    found: Found, comparison: list[Change], old: Path | None, figures: list[plots.Figure]
) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    images = [
        (figure.title, base64.b64encode(figure.svg.read_bytes()).decode()) for figure in figures
    ]
    return environment.get_template("page.html").render(
        about=about(found),
        note=f"{NOTE} {PLACES[found.about['device']]}",
        quick=found.about["suite"] == "quick",
        images=images,
        tables=tables(found, comparison, old),
        style=Markup((HERE / "page.css").read_text()),
        script=Markup((HERE / "sortable.js").read_text()),
    )
