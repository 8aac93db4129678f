"""The numbers of README.md, out of one JSON file of results.

    python bench/headline.py bench/results/NAME.json

writes the first sentence and the table of results between the marks in README.md, so that no
number there is typed by hand; `python bench/figures.py` draws the figure beside them.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

README = Path(__file__).resolve().parent.parent / "README.md"
# The vocabulary that all of these numbers are of, as its results are named: Llama 3's.
VOCABULARY = "128256"
SETS = {"avx2": "AVX2", "avx512": "AVX-512", "avx512_bf16": "AVX-512"}
Ratios = tuple[float, float, float]


@dataclass(frozen=True)
class Headline:
    """bfloat16, one thread: eager, torch.compile, fusedkl; times over fusedkl's."""

    content: dict[str, Any]
    path: Path

    @classmethod
    def of(cls, path: Path) -> Headline:
        return cls(json.loads(path.read_text()), path)

    def value(self, goal: str, case: str = "") -> float:
        """The measured value of the one result for the vocabulary whose case begins so."""
        found = [
            float(r["value"])
            for r in self.content["results"]
            if r["goal"] == goal and VOCABULARY in r["case"] and r["case"].startswith(case)
        ]
        if len(found) != 1:
            raise ValueError(f"{self.path} has {len(found)} results for {goal} {case}; 1 is needed")
        return found[0]

    @property
    def forward(self) -> Ratios:
        return self.value("forward_eager/bf16"), self.value("forward_compile/bf16"), 1.0

    @property
    def backward(self) -> Ratios:
        return (
            self.value("backward_eager/bf16"),
            self.value("backward_compile_plain/bf16"),
            1.0,
        )

    @property
    def memory(self) -> Ratios:
        names = ("eager bf16 fwd + bwd", "compile bf16 fwd + bwd")
        eager, compiled = (self.value("memory_peer", name) for name in names)
        return eager, compiled, self.value("memory_backward", "fusedkl bf16")

    @property
    def caption(self) -> str:
        machine, versions = self.content["machine"], self.content["versions"]
        return (
            f"bfloat16, V = {VOCABULARY}, one thread of an {machine['processor']}"
            f" ({self.content['isa']}), torch {versions['torch']}, {self.content['date'][:10]}. "
            f"Memory: 256 tokens. From bench/results/{self.path.name}."
        )

    def sentence(self) -> str:
        """What the first screen says."""
        (eager, compiled, _), (more, less, _) = self.forward, self.backward
        held = self.memory
        return (
            f"**On one CPU core ({SETS[self.content['isa']]}), with bfloat16 logits and a "
            f"vocabulary of {VOCABULARY}, the loss takes "
            f"{compiled:.1f} times less time than under `torch.compile` and {eager:.0f} times less "
            f"than in eager PyTorch; with its gradient {less:.1f} and {more:.0f} times less "
            f"(huge pages for neither side), in the memory of {held[2]:.0f} gradient, where they "
            f"take that of {held[1]:.0f} and {held[0]:.0f}.**\n"
        )

    def table(self) -> str:
        """Every time above in both types, and what was measured on."""
        rows = [
            [label, *(self._cell(f"{goal}_{peer}/{dtype}") for dtype, peer in columns)]
            for label, goal, columns in (
                ("forward", "forward", _columns("compile")),
                (
                    "forward + backward, huge pages for neither",
                    "backward",
                    _columns("compile_plain"),
                ),
                ("the same, `inplace_grad=True`", "inplace", _columns("compile_plain")),
                ("forward + backward, huge pages for both", "backward", _columns("compile_huge")),
                ("huge pages for both, memory not kept", "backward", _columns("compile_returned")),
            )
        ]
        titles = ("fusedkl is faster by", "bf16: compile", "eager", "fp32: compile", "eager")
        versions = ", ".join(f"{k} {v}" for k, v in self.content["versions"].items())
        return (
            tabulate(rows, titles, tablefmt="github", disable_numparse=True)
            + f"\n\n{_wrapped(self.caption)} Written by\n`{self.content['command']}`\n"
            f"at commit {self.content['commit'][:7]}; {versions}.\n"
        )

    def _cell(self, goal: str) -> str:
        known = {r["goal"] for r in self.content["results"]}
        return f"{self.value(goal):.3g}x" if goal in known else ""


def _columns(compiled: str) -> list[tuple[str, str]]:
    other = "eager" if compiled in ("compile", "compile_plain") else "none"
    return [(dtype, peer) for dtype in ("bf16", "fp32") for peer in (compiled, other)]


def _wrapped(text: str) -> str:
    return text.replace("Memory: 256 tokens. ", "")


def filled(page: str, measured: Headline) -> str:
    """`page` with what is measured between its marks."""
    for name, text in (("headline", measured.sentence()), ("results", measured.table())):
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->\n"
        if page.count(begin) != 1 or page.count(end) != 1:
            raise ValueError(
                f"README.md must have the marks {begin.strip()} and {end.strip()} once"
            )
        before, rest = page.split(begin)
        page = before + begin + text + end + rest.split(end)[1]
    return page


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    README.write_text(filled(README.read_text(), Headline.of(Path(arguments[0]))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
