"""Finds the hot loop of a kernel in its machine code and counts what one trip through it issues.

The loop has cold blocks (the anchor moves) that a trip ordinarily jumps over, so its address range
says nothing: the trip counted is the shortest path from the loop's head back to it.
"""

from __future__ import annotations

import functools
import heapq
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"^\s*(\.L_x_\w+):")


@dataclass(frozen=True)
class Loop:
    """One trip."""

    ops: tuple[str, ...]

    def count(self, base: str) -> int:
        return sum(op.split(".")[0] == base for op in self.ops)

    @property
    def wide_loads(self) -> int:
        return sum(op.startswith("LDG") and ".128" in op for op in self.ops)

    @property
    def narrow_loads(self) -> int:
        return sum(op.startswith("LDG") and ".128" not in op for op in self.ops)

    @property
    def pairs(self) -> int:
        """Of 16-bit logits: a vector of each row is eight."""
        return 4 * self.wide_loads

    @property
    def special(self) -> int:
        return self.count("MUFU")

    @property
    def per_pair(self) -> float:
        return len(self.ops) / self.pairs

    def __str__(self) -> str:
        return f"{self.pairs} pairs, {self.per_pair:.2f} instructions each"


def _disassembler() -> str:
    found = shutil.which("nvdisasm")
    if found is None:
        triton = pytest.importorskip("triton", reason="nvdisasm comes with the package triton")
        inside = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        found = str(inside)
    return found


@functools.cache
def _sections(cubin: Path) -> dict[str, str]:
    text = subprocess.run(
        [_disassembler(), "-c", cubin], capture_output=True, text=True, check=True
    ).stdout
    parts = re.split(r"(?m)^\.text\.(\S+):", text)
    return {
        name: body.split(".section")[0] for name, body in zip(parts[1::2], parts[2::2], strict=True)
    }


class _Code:
    def __init__(self, body: str) -> None:
        self.ops: list[tuple[str, str, str]] = []
        self.labels: dict[str, int] = {}
        for line in body.splitlines():
            if label := _LABEL.match(line):
                self.labels[label[1]] = len(self.ops)
            elif found := _INSTRUCTION.search(line):
                self.ops.append((found[2], found[3], found[1] or ""))

    def target(self, i: int) -> int | None:
        name = re.search(r"\.L_x_\w+", self.ops[i][1])
        return self.labels.get(name[0]) if name else None

    def next(self, i: int) -> list[int]:
        op, arguments, predicate = self.ops[i]
        base = op.split(".")[0]
        after = [i + 1] if i + 1 < len(self.ops) else []
        if base == "BRA":
            to = self.target(i)
            conditional = predicate or re.search(r"\bU?P\d|DIV", arguments + op)
            return ([to] if to is not None else []) + (after if conditional else [])
        return [] if base in ("EXIT", "RET") and not predicate else after

    def trip(self, head: int) -> list[int]:
        """Shortest path from `head` to itself, over later instructions and no (cold) shuffle."""
        best, before, queue, last = {head: 0}, {}, [(0, head)], -1
        while queue:
            length, at = heapq.heappop(queue)
            if length > best[at]:
                continue
            for to in self.next(at):
                if to == head:
                    last = at
                    queue = []
                    break
                if self.ops[to][0].startswith("SHFL"):
                    continue
                if to > head and length + 1 < best.get(to, 1 << 30):
                    best[to], before[to] = length + 1, at
                    heapq.heappush(queue, (length + 1, to))
        path = []
        while last >= 0:
            path.append(last)
            last = before.get(last, -1)
        return path[::-1]


@functools.cache
def hot_loop(cubin: Path, kernel: str, special: int = 16) -> Loop:
    """Of the one kernel whose mangled name contains `kernel` and takes aligned rows."""
    (body,) = (
        body
        for name, body in _sections(cubin).items()
        if kernel in name and not name.split("Args")[0].endswith("Lb1EEEvNS0_11Forward")
    )
    code = _Code(body)
    heads = {
        to
        for i, (op, _, _) in enumerate(code.ops)
        if op.startswith("BRA") and (to := code.target(i)) is not None and to < i
    }
    loops = [Loop(tuple(code.ops[i][0] for i in code.trip(head))) for head in sorted(heads)]
    hot = [loop for loop in loops if loop.special >= special and loop.wide_loads]
    assert hot, f"no hot loop in {kernel}"
    # Of nested loops the trip through the tiles alone: no shuffle, most pairs, least besides.
    return max(hot, key=lambda loop: (loop.count("SHFL") == 0, loop.pairs, -len(loop.ops)))
