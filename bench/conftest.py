"""`pytest bench/ --benchmark-only`: the suite's cases under pytest-benchmark."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# The modules of this folder import each other by their plain names.
sys.path.insert(0, str(Path(__file__).resolve().parent))


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("suite", "what to measure")
    group.addoption("--suite", choices=["quick", "full"], default="quick", help="sizes: quick")
    group.addoption("--device", choices=["cpu", "cuda"], default="cpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test per case and contender."""
    if "contender" not in metafunc.fixturenames:
        return
    from suite.contenders import makers
    from suite.plans import plan

    device = metafunc.config.getoption("device")
    pairs = [
        (item.case, name)
        for item in plan(device, metafunc.config.getoption("suite") == "quick")
        for name in makers(item.case, device)
        if item.chooses(name)
    ]
    names = [f"{case.name}, {name}" for case, name in pairs]
    metafunc.parametrize(("case", "contender"), pairs, ids=names)
