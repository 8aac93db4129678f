"""The figures of README.md and docs/numerics.md, each drawn from one committed JSON file.

    python bench/figures.py

draws docs/img/speed.png from bench/results/cpu-avx2.json, and docs/img/error.png from
bench/results/error-by-kl.json. Nothing is measured here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws to a file; no display is needed

import matplotlib.pyplot as plt
from headline import Headline

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "img"
_OURS, _THEIRS, _OTHERS = "#0050a0", "#a8b0b8", "#e69f00"
_STYLE = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "figure.facecolor": "white",  # read on dark pages too
}


@contextmanager
def _figure(
    path: Path, source: Path, columns: int, width: float, height: float
) -> Iterator[tuple[Any, Any]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(1, columns, figsize=(width, height), dpi=150)
        yield figure, axes
        # Which numbers these are, for the test that they are still the committed ones.
        figure.savefig(path, metadata={"Software": None, "Source": f"{source.name} {digest}"})
        plt.close(figure)


def speed(measured: Headline, path: Path) -> None:
    """Bars: time of forward and of forward + backward, peak memory, of three ways to one loss."""
    panels = (
        ("Forward, times fusedkl's", measured.forward, "{:.3g}x"),
        ("Forward + backward, times fusedkl's", measured.backward, "{:.3g}x"),
        ("Peak extra memory, in gradients", measured.memory, "{:.2g}"),
    )
    names = ("eager PyTorch", "torch.compile", "fusedkl")
    with _figure(path, measured.path, len(panels), 10.5, 2.5) as (figure, axes):
        for i, (axis, (title, values, text)) in enumerate(zip(axes, panels, strict=True)):
            axis.barh(names, values, color=(_THEIRS, _OTHERS, _OURS), height=0.66)
            axis.invert_yaxis()
            axis.set_title(title)
            axis.set_xticks([])
            axis.spines["bottom"].set_visible(False)
            axis.tick_params(axis="y", length=0, labelleft=i == 0)
            axis.set_xlim(0, max(values) * 1.2)
            for place, value in enumerate(values):
                axis.annotate(
                    text.format(value),
                    (value, place),
                    xytext=(4, 0),
                    textcoords="offset points",
                    va="center",
                    fontweight="bold" if place == len(values) - 1 else "normal",
                )
        figure.text(0.01, 0.02, measured.caption, fontsize=7.5, color="#6b747d")
        figure.tight_layout(rect=(0, 0.07, 1, 1))


def error(source: Path, path: Path) -> None:
    """Lines: the worst relative error of each contender against the KL, float32 and bfloat16."""
    content = json.loads(source.read_text())
    looks = {"fusedkl": (_OURS, "o"), "F.kl_div": (_THEIRS, "s")}
    with _figure(path, source, 2, 10.5, 3.6) as (figure, axes):
        for axis, dtype in zip(axes, ("float32", "bfloat16"), strict=True):
            for contender, (colour, marker) in looks.items():
                curve = [
                    (c["kl"], max(c["worst"], 1e-9))
                    for c in content["curves"]
                    if (c["contender"], c["dtype"]) == (contender, dtype)
                ]
                axis.loglog(*zip(*curve, strict=True), color=colour, marker=marker, label=contender)
            axis.axhline(1, color="#b00020", linewidth=0.8, linestyle=":")
            axis.axhline(1e-5, color="#0a7a3d", linewidth=0.8, linestyle=":")
            axis.set_title(f"{dtype} logits")
            axis.set_xlabel("KL of the row, nats")
        axes[0].set_ylabel("worst relative error")
        for text, height in (("all of it wrong", 1), ("fusedkl's promise", 1e-5)):
            axes[0].annotate(
                text,
                (1, height),
                xycoords=("axes fraction", "data"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="right",
                fontsize=8,
            )
        axes[1].legend(frameon=False)
        figure.tight_layout()


def main() -> None:
    results = ROOT / "bench" / "results"
    speed(Headline.of(results / "cpu-avx2.json"), IMAGES / "speed.png")
    error(results / "error-by-kl.json", IMAGES / "error.png")


if __name__ == "__main__":
    main()
