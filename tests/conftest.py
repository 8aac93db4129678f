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

# Triton is either interpreted or compiled in a process: tests/test_triton_interpreted.py runs the
# suite of values once more with TRITON_INTERPRET=1, for this backend alone.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Minutes each under the interpreter, which takes tens of milliseconds for a tile.
LONG = ("long_rows", "long_half_row", "any_number_of_threads", "rounds_once", "layout_does_not")
LONG += ("bad_row_stays_alone", "several_segments")
# Of many combinations each: a smaller sample.
LARGE = ("test_family.py", "test_controls.py", "test_topk.py", "test_distillation.py")
LARGE += ("test_reductions.py",)
# Begun last, such a test would keep one of two processes waiting for the other.
MINUTES = ("test_triton_interpreted.py", "test_sharding.py", "test_cuda_cluster.py")
MINUTES += ("test_cpu_sanitizers.py", "test_wheel.py", "test_avx512_emulated.py")
# Compiled, the plain operations of the reference backend are in `make test-full` only.
COMPILED = ("test_inductor[", "test_compiled_and_as_a_module[", "test_fullgraph_and_dynamic")
COMPILED += ("test_temperature_may_change_without_a_graph_break",)
# Ten seconds each: in the larger sample alone.
MORE = ("strided_and_expanded_masks", "several_blocks_and_slices")
# Of float64 logits, which this backend does not take.
DOUBLE = ("torch.float64", "any_combination[triton]", "token_of_another_slice", "double_backward")
DOUBLE += ("test_inequalities", "triton-float64", "gradcheck", "differentiates_twice")
DOUBLE += ("product_of_equal_rows", "depends_on_the_policy", "differentiable_at_zero")
DOUBLE += ("function_transforms", "vmap_over_temperatures")
if INTERPRETED and importlib.util.find_spec("triton"):
    import triton_interpreter

    triton_interpreter.mend()


def pytest_configure(config: pytest.Config) -> None:
    """The interpreter's maximum of a tile that holds nothing but NaN."""
    if INTERPRETED:
        config.addinivalue_line("filterwarnings", "ignore:All-NaN slice:RuntimeWarning")


def _interpreted(item: pytest.Item, everything: bool) -> bool:
    """Whether the interpreter runs this test: the same sample of the combinations each time."""
    name = item.nodeid
    if "test_triton.py" in name:
        return True
    each = 60 if any(part in name for part in LARGE) else 30
    share = zlib.crc32(name.encode()) % (each // 6 if everything else each) == 0
    share |= everything and "test_opcheck" in name  # one of each operator
    left = any(part in name for part in (*LONG, *DOUBLE, *(() if everything else MORE)))
    return "[triton" in name and not left and (share or "[triton]" in name)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The order; under the interpreter, only tests of the backend, more of them if `-m ""`."""
    items.sort(key=lambda item: not any(name in item.nodeid for name in MINUTES))
    for item in items:
        if "[reference" in item.nodeid and any(name in item.nodeid for name in COMPILED):
            item.add_marker("full")
    if INTERPRETED:
        everything = not config.option.markexpr
        left = [item for item in items if not _interpreted(item, everything)]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]


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


@pytest.fixture
def compiler() -> Iterator[None]:
    """torch.compile as in a new process, and as users have it: see poisoned_memory."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """torch.empty gives NaN: an output element that a kernel forgot is seen.

    Not beside `compiler`, as deterministic mode changes what the compiler does.
    """
    if "compiler" in request.fixturenames:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
