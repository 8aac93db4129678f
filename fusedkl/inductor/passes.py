"""The pass as torch._inductor takes it. Imports the compiler, so nothing imports this early."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any, TypeGuard

from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph

from .. import __version__
from .calls import where
from .control import enabled
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
    try:
        writes = Writes(graph)
        reading = Reader(graph, writes).reading
        emitter = Emitter(graph, reading, writes)
    except Exception as error:  # nothing is changed yet, and the graph is right as it is
        reason = f"fusedkl could not read a graph: {type(error).__name__}: {error}"
        warnings.warn(f"{reason}. It stays as it is; please report this.", RuntimeWarning, 2)
        return record([], [(reason, "the whole graph")])
    emitter.run()
    missed = [(reason, where(node)) for node, reason in reading.missed.items()]
    record(emitter.rewritten, missed)


class _Pass(CustomGraphPass):
    """Runs what the configuration held, `before`, and then ours, unless every enable() has ended.

    Another party may hold it in a list, where it cannot be taken out.
    """

    def __init__(self, before: Any) -> None:
        several = isinstance(before, (list, tuple))
        self.before = before
        self.first = () if before is None else tuple(before) if several else (before,)

    def __call__(self, graph: Graph) -> None:
        for other in self.first:
            other(graph)
        if enabled():
            rewrite(graph)

    def uuid(self) -> Any:
        of_first = tuple(getattr(other, "uuid", lambda: None)() for other in self.first)
        if None in of_first:
            return None  # nothing may be cached, then
        ours = (__version__, get_hash_for_files(_sources())) if enabled() else None
        return (ours, of_first)


def combined(before: Any) -> CustomGraphPass:
    """The pass, after another one or several if there are any."""
    return _Pass(before)


def is_ours(found: Any) -> TypeGuard[_Pass]:
    """Whether a pass is what `combined` made."""
    return isinstance(found, _Pass)
