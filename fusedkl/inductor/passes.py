"""The pass as torch._inductor takes it. Imports the compiler, so nothing imports this early."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph

from .. import __version__
from .calls import where
from .emit import Emitter
from .reader import Reader
from .report import record
from .writes import Writes


@functools.cache
def _sources() -> tuple[str, ...]:
    """Part of the key of torch's caches on disk: a changed pass does not find what another made.

    All of the package's: a graph from the cache calls operators by the shapes that they had.
    """
    return tuple(sorted(str(file) for file in Path(__file__).parents[1].rglob("*.py")))


def rewrite(graph: Graph) -> None:
    """Rewrite one graph of torch calls, and put it on record."""
    writes = Writes(graph)
    reader = Reader(graph, writes)
    emitter = Emitter(graph, reader.reading, writes)
    emitter.run()
    missed = [(reason, where(node)) for node, reason in reader.reading.missed.items()]
    record(emitter.rewritten, missed)


class _Pass(CustomGraphPass):
    def __init__(self, first: tuple[Any, ...]) -> None:
        self.first = first

    def __call__(self, graph: Graph) -> None:
        for other in self.first:
            other(graph)
        rewrite(graph)

    def uuid(self) -> Any:
        of_first = tuple(getattr(other, "uuid", lambda: None)() for other in self.first)
        if None in of_first:
            return None  # nothing may be cached, then
        return (__version__, get_hash_for_files(_sources()), of_first)


def combined(first: Any) -> CustomGraphPass:
    """The pass, after another one or several if there are any."""
    if first is None:
        return _Pass(())
    return _Pass(tuple(first) if isinstance(first, (list, tuple)) else (first,))


def is_ours(found: Any) -> bool:
    """Whether a pass is what `combined` made."""
    return isinstance(found, _Pass)
