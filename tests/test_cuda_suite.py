"""The shared suite of values, gradients and edge cases, on the CUDA kernels run by the shim."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import cuda_on_cpu
import oracle
import pytest
import test_autograd
import test_compile
import test_controls
import test_distillation
import test_edges
import test_family
import test_gradients
import test_offsets64
import test_reductions
import test_review_findings
import test_second_order
import test_token_stats
import test_topk
import test_values
import torch

import fusedkl
from fusedkl._library import OPERATORS

pytestmark = pytest.mark.slow
MODULES = (
    test_autograd,
    test_controls,
    test_distillation,
    test_edges,
    test_family,
    test_gradients,
    test_offsets64,
    test_reductions,
    test_review_findings,
    test_second_order,
    test_token_stats,
    test_topk,
    test_values,
)
# Of the CPU and the reference alone: threads, a backend without float64. And a promise of the CPU:
# the same bits with or without the other gradient; here a lone gradient has a shorter loop.
LEFT_OUT = {
    "test_reference_backend_where_there_is_no_float64",
    "test_the_same_bits_for_any_number_of_threads",
    "test_only_what_is_asked_for",
}
# Long ones, in `make test-full`: test_cuda_suite_wide.py.
WIDE = {
    "test_a_bad_row_stays_alone",
    "test_double_backward",
    "test_gradcheck_and_gradgradcheck",
    "test_inequalities",
    "test_it_compiles_whole",
    "test_it_differentiates_twice",
    "test_long_rows_agree_with_the_reference_backend",
    "test_operators_pass_opcheck_and_compile",
    "test_the_bucket_is_never_negative_and_a_lower_bound",
}


def of_the_suite(wide: bool) -> dict[str, object]:
    """Under names of their own: several modules have a test_divergence."""
    return {
        f"{module.__name__}_{name.removeprefix('test_')}": test
        for module in MODULES
        for name, test in vars(module).items()
        if name.startswith("test_")
        and name not in LEFT_OUT
        and (name in WIDE) == wide
        and "backend" in inspect.signature(test).parameters
    }


globals().update(of_the_suite(wide=False))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("name", [*OPERATORS, *test_compile.SLICES])
def test_opcheck(backend: str, name: str) -> None:
    test_compile.test_opcheck(backend, name)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("name", ["everything"])
def test_fullgraph_and_dynamic_without_recompiling(backend: str, name: str) -> None:
    test_compile.test_fullgraph_and_dynamic_without_recompiling(backend, name)


def test_any_alignment_is_as_accurate(backend: str) -> None:
    """Both rows at every offset from a vector's boundary, in one dtype and in two."""
    memory, other = 3 * torch.randn(2, 3, 2100)
    for x_type, y_type in ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16)):
        for i in range(9):
            x, y = memory.to(x_type)[:, i : i + 2050], other.to(y_type)[:, 8 - i : 2058 - i]
            leaf, leaf_y = x.clone().requires_grad_(), y.clone().requires_grad_()
            view = leaf.detach().new_empty(3, 2100)[:, i : i + 2050].copy_(x).requires_grad_()
            for kind in ("forward_kl", "reverse_kl"):
                value = fusedkl.divergence(view, leaf_y, kind, backend=backend)
                true = fusedkl.divergence(x.double(), y.double(), kind, backend="reference")
                assert oracle.relative_error(value, true) <= 1e-5
                found = torch.autograd.grad(value.sum(), (view, leaf_y))
                a, b = x.double().requires_grad_(), y.double().requires_grad_()
                total = fusedkl.divergence(a, b, kind, backend="reference").sum()
                for gradient, wanted in zip(found, torch.autograd.grad(total, (a, b)), strict=True):
                    error = oracle.relative_l2(gradient, wanted)
                    assert error <= oracle.GRADIENT_TOLERANCE[gradient.dtype]


@pytest.fixture
def backend() -> Iterator[str]:
    """Overrides the fixture of every other test: one backend, the shim's."""
    with cuda_on_cpu.registered() as name:
        yield name
