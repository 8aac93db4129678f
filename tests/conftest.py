"""Fixtures of every test: backends, seeds, one thread, and memory that shows when unwritten."""

from __future__ import annotations

import importlib.util
import os
import zlib
from collections.abc import Iterator

import pytest
import torch

from fusedkl import _library
from fusedkl.backends import BACKENDS

# Triton is either interpreted or compiled in a process: `make test` runs the suite of values once
# more with TRITON_INTERPRET=1, for this backend alone.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Minutes each under the interpreter, which takes tens of milliseconds for a tile.
LONG = ("long_rows", "long_half_row", "any_number_of_threads", "rounds_once", "layout_does_not")
if INTERPRETED and importlib.util.find_spec("triton"):
    import triton_interpreter

    triton_interpreter.mend()


def pytest_configure(config: pytest.Config) -> None:
    """The interpreter's maximum of a tile that holds nothing but NaN."""
    if INTERPRETED:
        config.addinivalue_line("filterwarnings", "ignore:All-NaN slice:RuntimeWarning")


def _in_default_tier(item: pytest.Item) -> bool:
    name = item.nodeid
    # every fourth of the hundreds of combinations, the same ones each time
    thinned = "test_divergence[" in name or "test_one_distribution[" in name
    return not any(part in name for part in LONG) and (
        not thinned or zlib.crc32(name.encode()) % 4 == 0
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under the interpreter, only tests of the backend; all of them if `-m ""` says so."""
    if INTERPRETED:
        kept = [
            item for item in items if "[triton" in item.nodeid or "test_triton.py" in item.nodeid
        ]
        if config.option.markexpr:
            kept = [item for item in kept if _in_default_tier(item)]
        items[:] = kept


# The backend of a device has a suite of its own: tests/test_cuda_suite.py.
ON_CPU = [name for name in BACKENDS if name != "cuda" and (name == "triton") == INTERPRETED]


@pytest.fixture(params=ON_CPU)
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
