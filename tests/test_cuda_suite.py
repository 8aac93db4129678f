"""The shared suite of values, gradients and edge cases, on the CUDA kernels run by the shim."""

from __future__ import annotations

from collections.abc import Iterator

import cuda_on_cpu
import oracle
import pytest
import test_edges
import test_gradients
import test_token_stats
import test_values
import torch

import fusedkl

# Of the CPU and the reference alone: threads, a backend without float64, arguments that no backend
# sees. And promises of the CPU: the same bits at any alignment, and with or without the other
# gradient; here the alignment decides which lane adds a token, and a lone gradient has a shorter
# loop.
LEFT_OUT = {
    "test_reference_backend_where_there_is_no_float64",
    "test_the_same_bits_for_any_number_of_threads",
    "test_bad_arguments",
    "test_bad_types",
    "test_slices_get_the_gradient_of_their_copies",
    "test_layout_does_not_matter",
    "test_values_survive_a_strided_and_unaligned_slice",
    "test_only_what_is_asked_for",
}
# Under names of their own: several modules have a test_divergence.
for _module in (test_edges, test_gradients, test_token_stats, test_values):
    for _name, _test in list(vars(_module).items()):
        if _name.startswith("test_") and _name not in LEFT_OUT:
            globals()[f"{_module.__name__}_{_name.removeprefix('test_')}"] = _test


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
