"""Rows so far apart that 32 bits cannot hold the distance, over memory that is never touched."""

from __future__ import annotations

import mmap
import sys

import pytest
import torch
from torch import Tensor

import fusedkl
from fusedkl.backends import BACKENDS

WHY_NOT = BACKENDS["cpu"].why_not(torch.device("cpu"))
pytestmark = [
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs MAP_NORESERVE"),
]
V = 70_001
KINDS = ["forward_kl", "reverse_kl", "jeffreys"]
# One element beyond a signed, one odd number beyond an unsigned 32-bit index. The second wraps to
# a small distance: a kernel that truncates it reads numbers, wrong ones, instead of crashing.
STRIDES = [2**31 + 1, 2**32 + 5]
LIMIT = 100_000_000


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """Off here: filling memory would be what makes it resident."""


def resident() -> int:
    """Bytes of memory that this process has touched and still holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


def far_apart(rows: Tensor, stride: int) -> Tensor:
    """The same rows [N, V], `stride` elements from one to the next, NaN beside each of them."""
    n, width = rows.shape
    size = ((n - 1) * stride + width + 16) * rows.element_size()
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named since Python 3.13
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    view = torch.frombuffer(pages, dtype=rows.dtype).as_strided((n, width), (stride, 1), 3)
    for i in range(n):
        view[i].as_strided((width + 6,), (1,), view[i].storage_offset() - 3).fill_(torch.nan)
    return view.copy_(rows)


def pair(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    policy = 2 * torch.randn(2, V)
    return policy.to(dtype), (policy + 0.5 * torch.randn(2, V)).to(dtype)


def differentiate(function: object, *inputs: Tensor) -> list[Tensor]:
    """Value and gradients; the gradients go to the very tensors given."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    value = function(*leaves)  # type: ignore[operator]
    return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("threads", [1, 2])
def test_row_strides_beyond_32_bits(threads: int, stride: int, dtype: torch.dtype) -> None:
    torch.set_num_threads(threads)
    near = pair(dtype)
    ids = torch.tensor([[0, V - 1], [V // 2, 7]])
    functions = {
        **{k: lambda x, y, k=k: fusedkl.divergence(x, y, k, backend="cpu") for k in KINDS},
        "sum": lambda x, y: fusedkl.jeffreys(x, y.detach(), reduction="sum", backend="cpu"),
    }
    single = {
        "entropy": lambda x: fusedkl.entropy(x, backend="cpu"),
        "logsumexp": lambda x: fusedkl.logsumexp(x, temperature=0.7, backend="cpu"),
        "logprob": lambda x: fusedkl.selective_log_softmax(x, ids, backend="cpu"),
        "log_softmax": lambda x: fusedkl.log_softmax(x, backend="cpu"),
    }

    def everything(x: Tensor, y: Tensor) -> dict[str, list[Tensor]]:
        found = {}
        for name, function in functions.items():
            leaf = x.detach().requires_grad_()
            if name == "sum":  # its gradient is made by the forward sweep
                value = function(leaf, y)
                found[name] = [value.detach(), *torch.autograd.grad(value, leaf)]
            else:
                found[name] = differentiate(function, x, y)
        for name, one in single.items():
            found[name] = differentiate(one, x)
        return found

    expected = everything(*near)
    before = resident()
    far = far_apart(near[0], stride), far_apart(near[1], stride)
    found = everything(*far)
    assert resident() - before < LIMIT
    for name, tensors in expected.items():
        for a, b in zip(found[name], tensors, strict=True):
            assert bool(a.isfinite().all()) and torch.equal(a, b), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("stride", STRIDES)
def test_a_gradient_in_place_lands_in_its_row(stride: int, dtype: torch.dtype) -> None:
    near = pair(dtype)
    expected = differentiate(lambda x: fusedkl.forward_kl(x, near[1], backend="cpu"), near[0])
    before = resident()
    x, y = far_apart(near[0], stride), far_apart(near[1], stride)
    leaf = x.detach().requires_grad_()
    value = fusedkl.forward_kl(leaf, y, inplace_grad=True, backend="cpu")
    value.sum().backward()
    assert resident() - before < LIMIT
    assert torch.equal(value, expected[0]) and torch.equal(x, expected[1])
    for i in range(2):  # nothing beside the rows was written
        around = x[i].as_strided((V + 6,), (1,), x[i].storage_offset() - 3)
        assert bool(around[:3].isnan().all()) and bool(around[-3:].isnan().all())


def test_leading_dims_beyond_32_bits() -> None:
    """[2, 2, V] whose outer stride is the huge one; an expanded dim between them."""
    policy, reference = pair(torch.bfloat16)
    x = far_apart(policy, STRIDES[1])[:, None].expand(2, 3, V)
    y = far_apart(reference, STRIDES[0])[:, None].expand(2, 3, V)
    found = fusedkl.reverse_kl(x, y, backend="cpu")
    expected = fusedkl.reverse_kl(policy, reference, backend="cpu")
    assert torch.equal(found, expected[:, None].expand(2, 3))


def test_far_rows_on_each_backend(backend: str) -> None:
    """Short rows, for kernels that are interpreted or run thread by thread: the offsets are those
    of any length. Aligned rows and others, which have sweeps of their own."""
    width = 1043
    policy = 2 * torch.randn(2, width)
    near = policy.bfloat16(), (policy + 0.5 * torch.randn(2, width)).bfloat16()
    ids, given = torch.tensor([[0, width - 1], [width // 2, 7]]), torch.full((2, 2), -2.0)
    reads = {
        "forward_kl": lambda x, y: fusedkl.forward_kl(x, y, backend=backend),
        "jsd": lambda x, y: fusedkl.divergence(x, y, "jsd", backend=backend),
        "mean": lambda x, y: fusedkl.forward_kl(x, y.detach(), reduction="mean", backend=backend),
        "logprob": lambda x, y: fusedkl.selective_log_softmax(x, ids, backend=backend),
        "log_softmax": lambda x, y: fusedkl.log_softmax(x, backend=backend),
        "topk": lambda x, y: fusedkl.topk_divergence(x, ids, given, backend=backend),
        # in the end: its gradient goes where the policy is
        "in place": lambda x, y: fusedkl.forward_kl(x, y, inplace_grad=True, backend=backend),
    }

    def everything(x: Tensor, y: Tensor) -> dict[str, list[Tensor]]:
        found = {}
        for name, function in reads.items():
            leaf = x.detach().requires_grad_()
            value = function(leaf, y)
            found[name] = [value.detach(), *torch.autograd.grad(value.sum(), leaf)]
        return {**found, "policy": [x]}

    expected = everything(near[0].clone(), near[1])
    before = resident()
    for stride in (2**32 + 8, 2**32 + 5):
        x, y = far_apart(near[0], stride), far_apart(near[1], stride)
        for name, tensors in everything(x, y).items():
            for a, b in zip(tensors, expected[name], strict=True):
                assert bool(a.isfinite().all()), name
                torch.testing.assert_close(a, b, msg=name)
        for i in range(2):  # nothing beside the rows was written
            around = x[i].as_strided((width + 6,), (1,), x[i].storage_offset() - 3)
            assert bool(around[:3].isnan().all()) and bool(around[-3:].isnan().all())
    assert resident() - before < LIMIT


@pytest.mark.full
def test_a_dense_gradient_of_more_than_32_bits() -> None:
    """2^31 elements and more, for real: 4.3 GB."""
    rows = 2**31 // V + 2
    policy, reference = pair(torch.bfloat16)
    assert rows * V > 2**31
    x = policy[:1].expand(rows, V)
    upstream = torch.ones(rows)
    upstream[-1] = -3.0
    expected = differentiate(lambda z: -3 * fusedkl.forward_kl(z, reference[:1]), policy[:1])
    leaf = x.detach().requires_grad_()
    value = fusedkl.forward_kl(leaf, reference[:1].expand(rows, V), backend="cpu")
    assert torch.equal(value, value[:1].expand(rows))
    (gradient,) = torch.autograd.grad(value, leaf, upstream)
    assert gradient.shape == (rows, V) and gradient.is_contiguous()
    assert torch.equal(gradient[-1:], expected[1])
    assert torch.equal(gradient[-2], gradient[0]) and bool((gradient[-2] != 0).any())
    middle = rows // 2
    assert torch.equal(gradient[middle], gradient[0])
