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

for _needed in ("tabulate", "tqdm", "matplotlib", "jinja2"):
    pytest.importorskip(_needed, reason="the bench extra is not installed")


def _load() -> dict[str, ModuleType]:
    scripts = ("run", "conftest", "test_suite")
    names = [path.stem for path in _FOLDER.glob("*.py") if path.stem not in scripts]
    names += ["suite", *(f"suite.{path.stem}" for path in _FOLDER.glob("suite/[!_]*.py"))]
    hidden = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    path = list(sys.path)
    sys.path.insert(0, str(_FOLDER))
    try:
        return {name: importlib.import_module(name) for name in names}
    finally:
        sys.path[:] = path  # some of them put their folder there themselves
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(hidden)


_MODULES = _load()
accuracy = _MODULES["accuracy"]
capture = _MODULES["capture"]
cases = _MODULES["cases"]
contenders = _MODULES["contenders"]
cpu_loops = _MODULES["cpu_loops"]
cuda_library = _MODULES["cuda_library"]
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
suite_batch = _MODULES["suite.batch"]
suite_compare = _MODULES["suite.compare"]
suite_contenders = _MODULES["suite.contenders"]
suite_driver = _MODULES["suite.driver"]
suite_entry = _MODULES["suite.entry"]
suite_fake_memory = _MODULES["suite.fake_memory"]
suite_judge = _MODULES["suite.judge"]
suite_measure = _MODULES["suite.measure"]
suite_models = _MODULES["suite.models"]
suite_outputs = _MODULES["suite.outputs"]
suite_plans = _MODULES["suite.plans"]
static_cases = _MODULES["static_cases"]
timing = _MODULES["timing"]
trl_runs = _MODULES["trl_runs"]
