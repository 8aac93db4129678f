"""The modules of bench/, loaded under names that the rest of the tests may use as well.

bench/ and demo/ are folders of scripts, and tests/ has helpers: several of them are called `cases`
or `report`. The modules below see each other, and leave sys.modules as it was.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

_FOLDER = Path(__file__).resolve().parent.parent / "bench"

for _needed in ("tabulate", "tqdm"):
    pytest.importorskip(_needed, reason="the bench extra is not installed")


def _load() -> dict[str, ModuleType]:
    names = [path.stem for path in _FOLDER.glob("*.py") if path.stem != "run"]
    hidden = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(_FOLDER))
    try:
        return {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(_FOLDER))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(hidden)


_MODULES = _load()
capture = _MODULES["capture"]
cases = _MODULES["cases"]
contenders = _MODULES["contenders"]
families = _MODULES["families"]
figures = _MODULES["figures"]
goals = _MODULES["goals"]
growth = _MODULES["growth"]
headline = _MODULES["headline"]
jobs_io = _MODULES["jobs_io"]
limits = _MODULES["limits"]
memory = _MODULES["memory"]
nvcc = _MODULES["nvcc"]
oracle_f64 = _MODULES["oracle_f64"]
report = _MODULES["report"]
sass = _MODULES["sass"]
speed = _MODULES["speed"]
static = _MODULES["static"]
static_cases = _MODULES["static_cases"]
timing = _MODULES["timing"]
