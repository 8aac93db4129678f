"""Fixtures of every test: backends, seeds, one thread, and memory that shows when unwritten."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from fusedkl import _library
from fusedkl.backends import BACKENDS

# Triton is either interpreted or compiled in a process: `make test` runs the suite of values once
# more with TRITON_INTERPRET=1, for this backend alone.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    import triton_interpreter

    triton_interpreter.mend()


def pytest_configure(config: pytest.Config) -> None:
    """The interpreter's maximum of a tile that holds nothing but NaN."""
    if INTERPRETED:
        config.addinivalue_line("filterwarnings", "ignore:All-NaN slice:RuntimeWarning")


@pytest.fixture(params=[name for name in BACKENDS if (name == "triton") == INTERPRETED])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that can run on CPU tensors."""
    name: str = request.param
    reason = BACKENDS[name].why_not(torch.device("cpu"))
    if reason is not None:
        # A library that is there but does not load must not pass for one that was never built.
        assert _library.path() is None or name != "cpu", reason
        pytest.skip(reason)
    return name


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN: an output element that a kernel forgot is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
