"""The figure of the demo: curves on top of each other, bars for time and memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws to a file; no display is needed

import matplotlib.pyplot as plt
from report import TITLES, Gap, Result, busy, footnote, mebibytes, milliseconds, times_less

# Told apart in greyscale and by the colour-blind; the widest is drawn first, so that curves that
# coincide still show all three.
COLOURS = {"eager": "#a8b0b8", "compile": "#e69f00", "fusedkl": "#0050a0"}
WIDTHS = {"eager": 9.0, "compile": 4.5, "fusedkl": 1.5}
_INK, _FAINT, _ALARM = "#20262c", "#6b747d", "#b00020"

_STYLE = {
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": "#c4cad0",
    "axes.labelcolor": _INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "figure.facecolor": "white",
}


def draw(settings: dict[str, Any], results: Sequence[Result], gap: Gap, path: Path) -> None:
    """Write the figure to `path` as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(_STYLE):
        figure = plt.figure(figsize=(12.5, 8.2), dpi=150)
        grid = figure.add_gridspec(
            2, 6, height_ratios=(1.25, 1), left=0.065, right=0.98, top=0.815, bottom=0.165,
            hspace=0.5, wspace=1.1,
        )  # fmt: skip
        _headline(figure, settings, results, gap)
        loss = figure.add_subplot(grid[0, :3])
        _curves(loss, results, "loss", "Training loss: cross-entropy + beta KL")
        kl = figure.add_subplot(grid[0, 3:])
        _curves(kl, results, "kl", "KL(reference || policy)")
        kl.legend(frameon=False, loc="upper left", handlelength=3, labelspacing=0.7)

        _bars(
            figure.add_subplot(grid[1, :2]), results, "loss_seconds",
            "Time of the KL loss and its backward", milliseconds,
        )  # fmt: skip
        _bars(
            figure.add_subplot(grid[1, 2:4]), results, "step_seconds",
            "Time of a whole training step", milliseconds,
        )  # fmt: skip
        _bars(
            figure.add_subplot(grid[1, 4:]), results, "peak_bytes",
            "Peak extra memory of the KL loss", mebibytes,
        )  # fmt: skip
        _caption(figure, settings, results)
        figure.savefig(path)
        plt.close(figure)


def _headline(figure: Any, settings: dict[str, Any], results: Sequence[Result], gap: Gap) -> None:
    verdict = "same curves" if gap.agrees else "THE CURVES DIFFER"
    first, last = results[0], results[-1]
    time = times_less(first.loss_seconds, last.loss_seconds)
    memory = times_less(first.peak_bytes, last.peak_bytes)
    parts = [f"{time} time" if time else "", f"{memory} memory" if memory else ""]
    gains = " and ".join(part for part in parts if part)
    figure.text(
        0.065, 0.945, f"{settings['model']} fine-tuned under a KL penalty: {verdict}",
        fontsize=16, fontweight="bold",
    )  # fmt: skip
    figure.text(
        0.065, 0.905,
        f"{TITLES[last.contender]}'s KL loss takes {gains} than {TITLES[first.contender]}'s.  "
        f"Largest gap between any two curves: {gap.nats:.0e} nats.",
        fontsize=11, color=_INK if gap.agrees else _ALARM,
    )  # fmt: skip
    figure.text(0.065, 0.877, busy(results), fontsize=9.5, color=_ALARM)


def _curves(axes: Any, results: Sequence[Result], name: str, title: str) -> None:
    for result in results:
        axes.plot(
            getattr(result, name),
            color=COLOURS[result.contender],
            linewidth=WIDTHS[result.contender],
            clip_on=False,  # KL starts at 0, on the axis
            solid_capstyle="round",
            solid_joinstyle="round",
            label=TITLES[result.contender],
        )
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token")
    axes.grid(axis="y", color="#eceff2")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.margins(x=0.02)
    if name == "kl":
        axes.set_ylim(bottom=0)


def _bars(
    axes: Any, results: Sequence[Result], name: str, title: str, show: Callable[[float], str]
) -> None:
    first = getattr(results[0], name)
    values = [getattr(result, name) for result in results]
    heights = [value if value is not None and math.isfinite(value) else 0.0 for value in values]
    axes.bar(
        [TITLES[result.contender] for result in results],
        heights,
        width=0.62,
        color=[COLOURS[result.contender] for result in results],
    )
    for place, (value, height) in enumerate(zip(values, heights, strict=True)):
        ratio = times_less(first, value) if place else ""
        axes.annotate(
            show(value) + (f"\n{ratio}" if ratio else ""),
            (place, height),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontweight="bold" if place == len(values) - 1 else "normal",
        )
    # From zero, with room for the labels on the tallest bar.
    axes.set_ylim(0, max(*heights, 1e-9) * 1.3)
    axes.set_title(title)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="x", length=0, colors=_INK, labelsize=9)


def _caption(figure: Any, settings: dict[str, Any], results: Sequence[Result]) -> None:
    warm_up = ", ".join(f"{TITLES[r.contender]} {milliseconds(r.warm_up_seconds)}" for r in results)
    lines = footnote(settings, results)
    lines.insert(3, f"Warm-up, in no step: {warm_up}.")
    for left, part in ((0.065, lines[:3]), (0.53, lines[3:])):
        figure.text(
            left, 0.098, "\n".join(part), fontsize=7.5, color=_FAINT, linespacing=1.6, va="top"
        )  # fmt: skip
