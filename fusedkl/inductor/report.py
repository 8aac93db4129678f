"""What the pass did to the graphs of this process."""

from __future__ import annotations

import threading
from dataclasses import dataclass

__all__ = ["Miss", "Report", "Rewrite", "record", "report"]


@dataclass(frozen=True)
class Rewrite:
    """A sum that runs fused: which numbers it is made of, and the line that it stands in."""

    kinds: str
    where: str


@dataclass(frozen=True)
class Miss:
    """Something that looked like a divergence and was left alone, the reason, and its line."""

    reason: str
    where: str


@dataclass(frozen=True)
class Report:
    """The rewrites and near misses of all graphs compiled since the last `report(clear=True)`."""

    graphs: int
    rewritten: tuple[Rewrite, ...]
    missed: tuple[Miss, ...]

    def __str__(self) -> str:
        lines = [f"{self.graphs} graphs read, {len(self.rewritten)} sums rewritten"]
        lines += [f"  {r.kinds} at {r.where}" for r in self.rewritten]
        lines += [f"  left alone: {m.reason} at {m.where}" for m in self.missed]
        return "\n".join(lines)


_LOCK = threading.Lock()
_graphs = 0
_rewritten: list[Rewrite] = []
_missed: list[Miss] = []


def record(rewritten: list[tuple[str, str]], missed: list[tuple[str, str]]) -> None:
    """Add what one graph had."""
    global _graphs
    with _LOCK:
        _graphs += 1
        _rewritten.extend(Rewrite(*found) for found in rewritten)
        _missed.extend(Miss(*found) for found in missed)


def report(*, clear: bool = False) -> Report:
    """What `enable()` made torch.compile rewrite, and near misses with the reason.

    Graphs that come out of torch's cache on disk are as they were stored, rewritten where they
    were, but not read again, so they are not in here. clear=True starts afresh afterwards.
    """
    global _graphs
    with _LOCK:
        made = Report(_graphs, tuple(_rewritten), tuple(_missed))
        if clear:
            _graphs = 0
            _rewritten.clear()
            _missed.clear()
    return made
