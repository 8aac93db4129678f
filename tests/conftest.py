"""Fixtures of every test: backends, seeds, one thread, and memory that shows when unwritten."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fusedkl import _library
from fusedkl.backends import BACKENDS


@pytest.fixture(params=list(BACKENDS))
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
