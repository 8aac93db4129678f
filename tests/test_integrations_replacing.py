"""How functions of other packages are replaced: found, checked, counted, put back, or refused."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

from fusedkl.integrations.replacing import Adapter, Part


def ours(x: int, scale: int = 2) -> str:
    return f"ours {x} {scale}"


def other(x: int, scale: int = 2) -> str:
    return f"other {x} {scale}"


class OurFunction:
    pass


SOURCE = """
__version__ = "1.16.3"
def score(x, scale=2):
    return f"theirs {x} {scale}"
class Trainer:
    @staticmethod
    def loss(x, scale=2):
        return score(x, scale)
class Function:
    def forward(ctx, x, scale=2):
        pass
"""
PARTS = (
    Part("loop.utils", "score", "x, scale=2", ours),
    Part("loop.utils", "Trainer.loss", "x, scale=2", ours),
    Part("loop.utils", "Function", "x, scale=2", OurFunction),
)


def adapter(*parts: Part, versions: tuple[str, ...] = ("1.15", "1.16")) -> Adapter:
    return Adapter("loop", dict.fromkeys(versions, parts or PARTS), source="loop.utils")


@pytest.fixture
def loop() -> Iterator[Any]:
    """A package `loop` with its functions in `loop.utils`, and a module that imported one."""
    modules = {name: types.ModuleType(name) for name in ("loop", "loop.utils", "user", "later")}
    exec(SOURCE, vars(modules["loop.utils"]))
    modules["loop"].__path__ = []  # type: ignore[attr-defined]
    modules["loop"].utils = modules["loop.utils"]  # type: ignore[attr-defined]
    modules["user"].renamed = modules["loop.utils"].score  # type: ignore[attr-defined]
    sys.modules.update(modules)
    try:
        yield types.SimpleNamespace(**{n.replace(".", "_"): m for n, m in modules.items()})
    finally:
        for name in modules:
            del sys.modules[name]


def test_replaced_and_put_back(loop: Any) -> None:
    before = dict(vars(loop.loop_utils))
    static = vars(loop.loop_utils.Trainer)["loss"]
    with adapter().patch() as handle:
        assert loop.loop_utils.score(1) == loop.user.renamed(1) == "ours 1 2"
        assert loop.loop_utils.Trainer.loss(3) == loop.loop_utils.Trainer().loss(3) == "ours 3 2"
        assert handle.active
        assert "loop.utils.Trainer.loss = " in repr(handle) and "user.renamed rebound" in repr(
            handle
        )
        loop.later.score = loop.loop_utils.score  # what `from loop.utils import score` does
    assert not handle.active and "nothing is replaced" in repr(handle)
    assert loop.user.renamed is before["score"] is loop.later.score
    assert vars(loop.loop_utils) == before and vars(loop.loop_utils.Trainer)["loss"] is static


def test_one_module_only(loop: Any) -> None:
    part = Part("loop.utils", "score", "x, scale=2", ours, here_only=True)
    with adapter(part).patch():
        assert (loop.loop_utils.score(1), loop.user.renamed(1)) == ("ours 1 2", "theirs 1 2")
        loop.later.score = loop.loop_utils.score
    assert loop.loop_utils.score(1) == "theirs 1 2"


def test_who_imported_ours_keeps_it(loop: Any) -> None:
    loop.user.mine = ours
    with adapter().patch():
        pass
    assert loop.user.mine is ours is PARTS[0].ours


def test_counted(loop: Any) -> None:
    one = adapter()
    assert not one.unpatch()
    first, second = one.patch(), one.patch()
    assert one.unpatch() and loop.loop_utils.score(1) == "ours 1 2"
    with second:
        pass
    assert loop.loop_utils.score(1) == "theirs 1 2" and not one.unpatch() and not first.active


def test_a_handle_is_entered_again(loop: Any) -> None:
    one = adapter()
    handle = one.patch()
    with handle:
        with handle:
            assert handle.active
        assert handle.active and loop.loop_utils.score(1) == "ours 1 2"
    assert not handle.active and loop.loop_utils.score(1) == "theirs 1 2"
    with handle:
        assert handle.active and loop.loop_utils.score(1) == "ours 1 2"
    assert not handle.active and loop.loop_utils.score(1) == "theirs 1 2" and not one.unpatch()


def test_what_another_party_replaced_stays(loop: Any) -> None:
    one = adapter()
    one.patch()
    loop.loop_utils.score = other
    with pytest.warns(RuntimeWarning, match=r"loop\.utils\.score was replaced by .*\.other while"):
        one.unpatch()
    assert loop.loop_utils.score is other
    assert loop.loop_utils.Trainer.loss(1) == "other 1 2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("def score(x, scale=3): pass", r"score takes \(x, scale=3\), not \(x, scale=2\)"),
        ("def score(x, *, scale=2, **more): pass", r"score takes \(x, \*, scale=2, \*\*more\), "),
        ("del score", r"loop\.utils\.score does not exist"),
        ("del Trainer.loss", r"loop\.utils\.Trainer\.loss does not exist"),
        ("Function.forward = lambda ctx, x: 0", r"Function takes \(x\), not \(x, scale=2\)"),
    ],
)
def test_another_signature_is_refused(loop: Any, change: str, message: str) -> None:
    exec(change, vars(loop.loop_utils))
    before = dict(vars(loop.loop_utils))
    with pytest.raises(RuntimeError, match=message):
        adapter().patch()
    assert vars(loop.loop_utils) == before and loop.user.renamed(1) == "theirs 1 2"


@pytest.mark.parametrize("version", ["1.17.0", "2.0", "1.1"])
def test_another_version_is_refused(loop: Any, version: str) -> None:
    loop.loop_utils.__version__ = version
    known = rf"knows loop 1\.15, 1\.16; got {version}\. What differs from 1\.16: "
    with pytest.raises(RuntimeError, match=known + "no signature, but what lies behind"):
        adapter().patch()
    loop.loop_utils.score = lambda x: x
    with pytest.raises(RuntimeError, match=known + r"loop\.utils\.score takes \(x\), not"):
        adapter().patch()


def test_missing_modules(loop: Any) -> None:
    gone = Part("loop.absent", "score", "x", ours)
    with pytest.raises(RuntimeError, match=r"loop\.absent cannot be imported"):
        adapter(gone).patch()
    aside = Part("loop.absent", "score", "x", ours, optional=True)
    with adapter(*PARTS, aside).patch() as handle:
        assert "loop.absent.score left out" in repr(handle)
    with pytest.raises(
        ImportError, match="replaces functions of nowhere, which cannot be imported"
    ):
        Adapter("nowhere", {"1.0": ()}).patch()
