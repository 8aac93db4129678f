"""The long tests of the shared suite, on the CUDA kernels run by the shim."""

from __future__ import annotations

import pytest
import test_cuda_suite

pytestmark = pytest.mark.full

globals().update(test_cuda_suite.of_the_suite(wide=True))
backend = test_cuda_suite.backend
