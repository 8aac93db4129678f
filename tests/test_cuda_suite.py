"""The shared suite of values, gradients and edge cases, on the CUDA kernels run by the shim."""

from __future__ import annotations

from collections.abc import Iterator

import cuda_on_cpu
import pytest
from test_edges import *  # noqa: F403
from test_gradients import *  # noqa: F403
from test_values import *  # noqa: F403

del test_reference_backend_where_there_is_no_float64  # noqa: F821
del test_the_same_bits_for_any_number_of_threads  # noqa: F821


@pytest.fixture
def backend() -> Iterator[str]:
    """Overrides the fixture of every other test: one backend, the shim's."""
    with cuda_on_cpu.registered() as name:
        yield name
