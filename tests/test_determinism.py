"""The same bits: run after run, for any number of threads, in any batch, at any address."""

from __future__ import annotations

import cases
import pytest
import torch
from torch import Tensor

import fusedkl
from fusedkl.backends import BACKENDS

# One segment and two; none a multiple of a vector, a block or a segment.
LONG = pytest.param(70_001, marks=pytest.mark.slow)
# float64 rows are never cut, and their kernel is the slow one.
FAST = [torch.float32, torch.bfloat16, torch.float16]
WHY_NOT = BACKENDS["cpu"].why_not(torch.device("cpu"))
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.fixture
def backend() -> str:
    """The kernels; the reference backend, many times slower, has a test of its own."""
    if WHY_NOT is not None:
        pytest.skip(WHY_NOT)
    return "cpu"


def bits(tensor: Tensor) -> Tensor:
    """Where numbers compare equal, bits may not (0 and -0), and NaN equals nothing."""
    return tensor.detach().contiguous().view(INTEGERS[tensor.element_size()])


def everything(policy: Tensor, reference: Tensor, backend: str) -> dict[str, Tensor]:
    """Every result of every function for rows [N, V], first dim N, by name.

    Gradients go to the very tensors given, so that their strides and addresses count.
    """
    found: dict[str, Tensor] = {}
    policy, reference = policy.detach(), reference.detach()
    n, width = policy.shape
    ids = torch.arange(n)[:, None] * 0 + torch.tensor([0, width // 2, width - 1])
    mass = torch.tensor([1.0, -0.5, 2.0])

    def record(name: str, value: Tensor, upstream: Tensor | float, *inputs: Tensor) -> None:
        found[name] = value.detach()
        gradients = torch.autograd.grad((value * upstream).sum(), inputs)
        for i, gradient in enumerate(gradients):
            found[f"d {name} {i}"] = gradient

    x, y = policy.requires_grad_(), reference.requires_grad_()
    for kind in cases.KINDS:
        for temperature in (1.0, 0.7):
            value = fusedkl.divergence(x, y, kind, temperature=temperature, backend=backend)
            record(f"{kind} T={temperature}", value, 0.3, x, y)
        # The policy's gradient alone is made by the forward sweep of a scalar loss.
        alone = fusedkl.divergence(x, y.detach(), kind, reduction="sum", backend=backend)
        found[f"d sum {kind}"] = torch.autograd.grad(alone, x)[0]
    for name, function in (("entropy", fusedkl.entropy), ("logsumexp", fusedkl.logsumexp)):
        record(name, function(x, temperature=0.7, backend=backend), 0.3, x)
    chosen = fusedkl.selective_log_softmax(x, ids, backend=backend)
    record("logprob", chosen, mass, x)
    record("log_softmax", fusedkl.log_softmax(x, backend=backend), 0.3, x)
    # In float64: what roundings to float32 would hide.
    found["state"] = torch.ops.fusedkl.row_stats(
        x.detach(), y.detach(), None, [*cases.KINDS[:2], "entropy"], *(None,) * 5, backend
    )[1]
    policy.requires_grad_(False)
    reference.requires_grad_(False)
    return found


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(bits(found[name]), bits(value)), name


def pair(n: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of unlike difficulty, by turns: near, far, offset, peaked, half masked."""
    policy = 3 * torch.randn(n, width, dtype=torch.float64)
    reference = policy.clone()
    for i in range(n):
        noise = torch.randn(width, dtype=torch.float64)
        reference[i] += noise * (1e-3, 6.0, 0.1, 2.0, 0.5)[i % 5]
        if i % 5 == 2:
            policy[i] += 1e4
        if i % 5 == 3:
            reference[i, width // 2] += 60
        if i % 5 == 4 and width > 2:
            holes = torch.rand(width) < 0.5
            holes[0] = False
            policy[i, holes] = reference[i, holes] = -torch.inf
    return policy.to(dtype), reference.to(dtype)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_run_after_run(backend: str, dtype: torch.dtype) -> None:
    policy, reference = pair(5, 2049, dtype)
    expected = everything(policy, reference, backend)
    torch.set_num_threads(2)
    for _ in range(4):
        # fresh copies: another address each time, and the order of threads is left to chance
        assert_same_bits(everything(policy.clone(), reference.clone(), backend), expected)


@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize(
    "rows", [slice(1), slice(4, 5), pytest.param(slice(2, 5), marks=pytest.mark.slow)], ids=str
)
def test_threads_share_a_long_row(backend: str, rows: slice, dtype: torch.dtype) -> None:
    policy, reference = pair(5, 300_000, dtype)
    # an easy one; the last are far and half masked
    policy, reference = policy[rows].clone(), reference[rows].clone()
    expected = everything(policy, reference, backend)
    for threads in (2, 4):
        torch.set_num_threads(threads)
        assert_same_bits(everything(policy, reference, backend), expected)


def test_threads_share_a_long_row_of_two_dtypes(backend: str) -> None:
    policy, reference = pair(2, 140_001, torch.float32)
    expected = everything(policy, reference.bfloat16(), backend)
    for threads in (2, 4):
        torch.set_num_threads(threads)
        assert_same_bits(everything(policy, reference.bfloat16(), backend), expected)


def test_threads_of_the_reference_backend() -> None:
    """Its float64 values; its gradients are autograd's, whose sums follow the threads."""
    policy, reference = (row[-1:].clone() for row in pair(2, 300_000, torch.float64))
    found = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        value = fusedkl.jeffreys(policy, reference, backend="reference")
        found.append({"value": value})
    for other in found[1:]:
        assert_same_bits(other, found[0])


@pytest.mark.parametrize("width", [11, 2049, 70_001])
def test_threads_with_a_mask_and_reductions(backend: str, width: int) -> None:
    """Masked rows leave threads unequal shares; scalar losses are sums in one fixed order."""
    policy, reference = pair(40, width, torch.float32)
    options = {
        "mask": torch.rand(40) < 0.6,
        "weight": torch.rand(40),
        "temperature": torch.rand(40) + 0.5,
        "backend": backend,
    }
    for reduction in ("none", "sum", "mean", "batchmean"):
        for inplace in (False, True):
            found = []
            for threads in (1, 2, 4):
                torch.set_num_threads(threads)
                leaf = policy.clone().requires_grad_()
                loss = fusedkl.jeffreys(
                    leaf, reference, reduction=reduction, inplace_grad=inplace, **options
                )
                loss.sum().backward()
                assert leaf.grad is not None and bool((leaf.grad != 0).any())
                found.append({"loss": loss, "gradient": leaf.grad})
            for other in found[1:]:
                assert_same_bits(other, found[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("width", [1, 2049, LONG])
def test_rows_do_not_see_each_other(backend: str, width: int, dtype: torch.dtype) -> None:
    """Alone, in a batch, in a reversed batch, and beside rows of NaN: the same bits."""
    policy, reference = pair(5, width, dtype)
    torch.set_num_threads(2)
    whole = everything(policy, reference, backend)
    backwards = everything(policy.flip(0), reference.flip(0), backend)
    assert_same_bits({name: value.flip(0) for name, value in backwards.items()}, whole)
    spoilt = [policy.clone(), reference.clone()]
    spoilt[0][1::2], spoilt[1][1::2] = torch.nan, torch.nan
    beside = everything(*spoilt, backend)
    assert_same_bits({k: v[::2] for k, v in beside.items()}, {k: v[::2] for k, v in whole.items()})
    for i in range(5):
        alone = everything(policy[i : i + 1].clone(), reference[i : i + 1].clone(), backend)
        assert_same_bits(alone, {name: value[i : i + 1] for name, value in whole.items()})


def moved(rows: Tensor, offset: int, gap: int) -> Tensor:
    """The same rows in other memory, `offset` elements in, `gap` apart, NaN between them."""
    n, width = rows.shape
    memory = rows.new_full((offset + n * (width + gap),), torch.nan)
    view = memory[offset:].view(n, width + gap)[:, :width]
    view.copy_(rows)
    return view


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 33, 2049, LONG])
def test_addresses_and_row_strides(backend: str, width: int, dtype: torch.dtype) -> None:
    policy, reference = pair(3, width, dtype)
    expected = everything(policy, reference, backend)
    for (a, b), (c, d) in (((1, 0), (0, 3)), ((3, 1), (7, 5)), ((5, 64), (15, 1))):
        views = moved(policy, a, b), moved(reference, c, d)
        assert_same_bits(everything(*views, backend), expected)


@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("width", [33, LONG])
def test_expanded_rows(backend: str, width: int, dtype: torch.dtype) -> None:
    policy, reference = pair(4, width, dtype)
    for i in range(4):
        row = reference[i : i + 1].clone()
        found = everything(policy, row.expand(4, width), backend)
        assert_same_bits(found, everything(policy, row.repeat(4, 1), backend))
        found = everything(row.expand(4, width), policy, backend)
        assert_same_bits(found, everything(row.repeat(4, 1), policy, backend))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_slices_of_sequences(backend: str, dtype: torch.dtype) -> None:
    """logits[:, :-1] and logits[:, 1:], as next-token losses take them, with odd V."""
    logits, other = (t.view(3, 5, 515) for t in pair(15, 515, dtype))
    for kind in cases.KINDS:
        found = []
        for copy in (False, True):
            leaf, frozen = logits.clone().requires_grad_(), other.clone().requires_grad_()
            x, y = leaf[:, :-1], frozen[:, 1:]
            if copy:
                x, y = x.contiguous(), y.contiguous()
            value = fusedkl.divergence(x, y, kind, backend=backend)
            value.sum().backward()
            assert leaf.grad is not None and frozen.grad is not None
            found.append({"value": value, "x": leaf.grad, "y": frozen.grad})
        assert_same_bits(*found)
