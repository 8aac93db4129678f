"""The pictures of a run, each as SVG and PNG."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .entry import Entry

if TYPE_CHECKING:
    from .driver import Found

STYLE = {
    **{"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "figure.figsize": (6.4, 4.6)},
    **{"axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "fusedkl"},
}
MIB = 2**20


@dataclass(frozen=True)
class Figure:
    title: str
    svg: Path


def draw(found: Found, folder: Path) -> list[Figure]:
    """All figures for which there is something to show."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, tuple[str, Callable[[Found, Any], bool]]] = {
        "time": ("Time against the vocabulary", _time),
        "memory": ("Memory against the vocabulary", _memory),
        "error": ("Error against the size of the divergence", _error),
        "tokens": ("Cost per token against the number of tokens", _tokens),
        "limit": ("Share of the memory limit", _limit),
    }
    made = []
    with plt.rc_context(STYLE):
        for name, (title, picture) in pictures.items():
            figure, axes = plt.subplots(layout="constrained")
            if picture(found, axes):
                axes.set_title(title)
                # Below: no place inside is free in every run.
                figure.legend(loc="outside lower center", ncols=3, fontsize=7.5, frameon=False)
                for kind in ("svg", "png"):
                    metadata = {"Date": None} if kind == "svg" else None
                    figure.savefig(folder / f"{name}.{kind}", dpi=150, metadata=metadata)
                made.append(Figure(title, folder / f"{name}.svg"))
            plt.close(figure)
    return made


def _lines(
    axes: Any, entries: list[Entry], x: Callable[[Entry], float], y: Callable[[Entry], float | None]
) -> bool:
    """One line per contender, ours thick; whether any number was there."""
    series: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for entry in entries:
        value = y(entry)
        if value is not None:
            series[entry.contender].append((x(entry), value))
    for name, points in series.items():
        ours = name.startswith("fusedkl")
        style = {"linewidth": 2.4, "zorder": 3} if ours else {"linewidth": 1.2, "linestyle": "--"}
        axes.plot(
            *zip(*sorted(points), strict=True), marker="o", markersize=3.5, label=name, **style
        )
    return bool(series)


def _models(found: Found) -> list[Entry]:
    return [e for e in found.entries if e.case.topic == "models" and e.case.backward]


def _microseconds_per_token(entry: Entry) -> float | None:
    return None if entry.seconds is None else entry.seconds.median / entry.case.tokens * 1e6


def _time(found: Found, axes: Any) -> bool:
    drawn = _lines(
        axes,
        _models(found),
        lambda e: e.case.vocabulary,
        _microseconds_per_token,
    )
    axes.set(xlabel="vocabulary", ylabel="microseconds per token, forward + backward")
    axes.set_yscale("log")
    return drawn


def _memory(found: Found, axes: Any) -> bool:
    drawn = _lines(
        axes,
        _models(found),
        lambda e: e.case.vocabulary,
        lambda e: None if e.peak_bytes is None else e.peak_bytes / e.case.tokens / MIB,
    )
    axes.set(xlabel="vocabulary", ylabel="MiB per token above the inputs, forward + backward")
    axes.set_ylim(bottom=0)
    return drawn


def _limit(found: Found, axes: Any) -> bool:
    shown = [e for e in found.entries if e.share is not None and e.case.topic == "models"]
    cases = list(dict.fromkeys(_label(e) for e in shown))
    names = list(dict.fromkeys(e.contender for e in shown))
    axes.figure.set_figheight(max(4.6, 1.4 + 0.09 * len(cases) * len(names)))
    for place, name in enumerate(names):
        at = [cases.index(_label(e)) for e in shown if e.contender == name]
        height = 0.8 / len(names)
        shares = [100 * (e.share or 0) for e in shown if e.contender == name]
        axes.barh([i + place * height for i in at], shares, height, label=name)
    axes.set_yticks([i + 0.4 for i in range(len(cases))], cases)
    axes.invert_yaxis()
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set(xlabel="% of what the measured rate of reading allows, each byte moved once")
    axes.grid(axis="y", visible=False)
    return bool(shown)


def _label(entry: Entry) -> str:
    return entry.case.model + ("" if entry.case.backward else ", forward")


def _error(found: Found, axes: Any) -> bool:
    for name in dict.fromkeys(point.contender for point in found.points):
        shown = sorted((p.kl, p.error) for p in found.points if p.contender == name)
        style = "-" if name.startswith("fusedkl") else "--"
        axes.loglog(*zip(*shown, strict=True), style, marker="o", markersize=3.5, label=name)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xlabel="KL of a row, nats", ylabel="worst relative error (1: all digits lost)")
    return bool(found.points)


def _tokens(found: Found, axes: Any) -> bool:
    """The cases of the topic, and those of other topics that differ in the tokens alone."""
    topic = [e for e in found.entries if e.case.topic == "tokens"]
    if not topic:
        return False
    first = topic[0].case
    alike = [
        e
        for e in found.entries
        if (e.case.model, e.case.operation, e.case.dtype, e.case.backward, e.case.layout)
        == (first.model, first.operation, first.dtype, first.backward, first.layout)
        and not e.case.masked
        and e.contender in {t.contender for t in topic}
    ]
    drawn = _lines(
        axes,
        alike,
        lambda e: e.case.tokens,
        _microseconds_per_token,
    )
    axes.set(xlabel="tokens", ylabel=f"microseconds per token, {first.model}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    return drawn
