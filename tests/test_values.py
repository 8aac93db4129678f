"""Values of every function on every backend against 60-digit arithmetic, whatever the layout."""

from __future__ import annotations

import cases
import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fusedkl

# Below this a divergence is promised to be small, not to be right.
SMALLEST = 1e-12


def close(actual: Tensor, expected: Tensor, floor: float = SMALLEST) -> None:
    assert actual.shape == expected.shape
    error = oracle.relative_error(actual, expected, floor)
    assert error <= oracle.VALUE_TOLERANCE[actual.dtype], f"relative error {error:.1e}"


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("temperature", cases.TEMPERATURES)
@pytest.mark.parametrize("scenario", cases.SCENARIOS)
def test_divergence(
    backend: str, scenario: str, temperature: str, dtype: torch.dtype, kind: str
) -> None:
    policy, reference = cases.make(scenario, dtype)
    value = fusedkl.divergence(
        policy, reference, kind, temperature=cases.TEMPERATURES[temperature], backend=backend
    )
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert bool((value >= 0).all())
    close(value, cases.truth(scenario, dtype, temperature)[kind])


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("temperature", cases.TEMPERATURES)
@pytest.mark.parametrize("scenario", ["flat 8", "peaked 2", "offset 1", "masked 2", "policy hole"])
def test_one_distribution(
    backend: str, scenario: str, temperature: str, dtype: torch.dtype
) -> None:
    logits, _ = cases.make(scenario, dtype)
    true = cases.truth(scenario, dtype, temperature)
    options = {"temperature": cases.TEMPERATURES[temperature], "backend": backend}
    close(fusedkl.logsumexp(logits, **options), true["logsumexp"])
    close(fusedkl.entropy(logits, **options), true["entropy"])
    everything = torch.arange(cases.V).expand(cases.N, cases.V)
    chosen = fusedkl.selective_log_softmax(logits, everything, **options)
    # Absolute below 1, relative above: the scale of a policy ratio.
    error = oracle.relative_error(chosen, true["log_prob"], floor=1.0)
    assert error <= (1e-6 if chosen.dtype == torch.float32 else 1e-12)
    first = fusedkl.selective_log_softmax(logits, everything[:, 2], **options)
    torch.testing.assert_close(first, chosen[:, 2], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("out", [None, *cases.DTYPES], ids=str)
def test_log_softmax(backend: str, dtype: torch.dtype, out: torch.dtype | None) -> None:
    logits, _ = cases.make("policy hole", dtype)
    found = fusedkl.log_softmax(logits, dtype=out, backend=backend)
    assert found.dtype == (out or dtype)
    # One rounding to the result's dtype of a number that is right to float32 or better.
    spacing = torch.finfo(found.dtype).eps / 2
    error = oracle.relative_error(found, cases.truth("policy hole", dtype, "T=1")["log_prob"], 1.0)
    assert error <= spacing * (1.01 if spacing > 1e-6 else 8)


@pytest.mark.parametrize("dim", [0, 1, -1, -2])
def test_log_softmax_over_any_dim(backend: str, dim: int) -> None:
    logits = torch.randn(5, 4, 6, dtype=torch.float64)
    expected = torch.log_softmax(logits, dim)
    found = fusedkl.log_softmax(logits, dim, backend=backend)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_log_softmax_of_a_long_half_row(backend: str) -> None:
    # torch's float16 sum of 65536 ones overflows, so it answers -inf.
    found = fusedkl.log_softmax(torch.zeros(1, 70000, dtype=torch.float16), backend=backend)
    expected = torch.tensor(70000.0, dtype=torch.float64).log().neg()
    assert torch.equal(found[0], expected.to(torch.float16).expand(70000))


@pytest.mark.parametrize("reference_dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("policy_dtype", cases.DTYPES, ids=str)
def test_mixed_dtypes(
    backend: str, policy_dtype: torch.dtype, reference_dtype: torch.dtype
) -> None:
    policy = cases.make("flat 1", policy_dtype)[0]
    reference = cases.make("flat 1", reference_dtype)[1]
    true = oracle.fields(policy, reference)
    double = torch.float64 in (policy_dtype, reference_dtype)
    for kind in cases.KINDS:
        value = fusedkl.divergence(policy, reference, kind, backend=backend)
        assert value.dtype == (torch.float64 if double else torch.float32)
        close(value, true[kind])


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_equal_and_shifted_rows_are_exactly_zero(
    backend: str, kind: str, dtype: torch.dtype
) -> None:
    # Multiples of 1/8 below 32: every sum here is exact in every dtype.
    logits = (torch.randint(-64, 64, (4, 1031)) / 8).to(dtype)
    for shift in (0.0, 0.375, 8.0, -16.0):
        for temperature in (1.0, 0.3):
            value = fusedkl.divergence(
                logits + shift, logits, kind, temperature=temperature, backend=backend
            )
            assert torch.equal(value, torch.zeros_like(value))


def test_directions_swap_with_their_arguments(backend: str) -> None:
    policy, reference = cases.make("flat 1", torch.float32)
    forward = fusedkl.forward_kl(policy, reference, backend=backend)
    reverse = fusedkl.reverse_kl(reference, policy, backend=backend)
    torch.testing.assert_close(forward, reverse, rtol=1e-6, atol=0)
    both = fusedkl.jeffreys(policy, reference, backend=backend)
    torch.testing.assert_close(
        both, forward + fusedkl.reverse_kl(policy, reference, backend=backend), rtol=1e-6, atol=0
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_long_rows_agree_with_the_reference_backend(backend: str, dtype: torch.dtype) -> None:
    # Lengths around the sizes of segments, blocks and vectors; the oracle would take minutes.
    for width in (1, 2, 31, 1000, 4095, 4097, 20011, 131073):
        policy = (3 * torch.randn(2, width)).to(dtype)
        reference = (policy.double() + 0.3 * torch.randn(2, width)).to(dtype)
        for kind in cases.KINDS:
            found = fusedkl.divergence(policy, reference, kind, backend=backend)
            true = fusedkl.divergence(
                policy.double(), reference.double(), kind, backend="reference"
            )
            close(found, true)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """A strided view [..., V] over NaN-filled memory and its contiguous copy."""
    shape = draw(st.lists(st.integers(1, 3), min_size=0, max_size=4))
    width = draw(st.integers(1, 40))
    dtype = draw(st.sampled_from(cases.DTYPES))
    seed = draw(st.integers(0, 2**16))
    order = draw(st.permutations(range(len(shape))))
    gaps = [draw(st.integers(0, 2)) for _ in shape]
    expanded = [draw(st.booleans()) and draw(st.booleans()) for _ in shape]
    step = draw(st.sampled_from([1, 1, 1, 2]))
    strides, span = [0] * len(shape), (width - 1) * step + 1 + draw(st.integers(0, 5))
    for d in order:
        strides[d] = 0 if expanded[d] else span
        span = span if expanded[d] else span * shape[d] + gaps[d]
    offset = draw(st.integers(0, 9))
    memory = torch.full((span + offset,), torch.nan, dtype=dtype)
    view = memory.as_strided([*shape, width], [*strides, step], offset)
    generator = torch.Generator().manual_seed(seed)
    numbers = 4 * torch.randn([*shape, width], generator=generator)
    numbers = numbers[tuple(slice(0, 1) if e else slice(None) for e in expanded)]
    view[tuple(slice(0, 1) if e else slice(None) for e in expanded)] = numbers.to(dtype)
    return view, view.clone(memory_format=torch.contiguous_format)


@pytest.mark.slow
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_layout_does_not_matter(backend: str, data: st.DataObject) -> None:
    """Any strides, gaps, expanded dims, alignment and order of dims: the same bits."""
    view, dense = data.draw(layouts())
    other = torch.randn(dense.shape, generator=torch.Generator().manual_seed(1))
    for policy, reference, policy_dense, reference_dense in (
        (view, other, dense, other),
        (other, view, other, dense),
    ):
        for kind in cases.KINDS:
            found = fusedkl.divergence(policy, reference, kind, backend=backend)
            expected = fusedkl.divergence(policy_dense, reference_dense, kind, backend=backend)
            assert not found.isnan().any()
            assert torch.equal(found, expected)
    ids = torch.randint(0, view.shape[-1], (*view.shape[:-1], 2))
    for function in (
        fusedkl.entropy,
        fusedkl.logsumexp,
        lambda z, backend: fusedkl.selective_log_softmax(z, ids, backend=backend),
        fusedkl.log_softmax,
    ):
        assert torch.equal(function(view, backend=backend), function(dense, backend=backend))


def test_more_dims_than_kernels_take(backend: str) -> None:
    policy = torch.randn(1, 2, 1, 2, 1, 1, 2, 1, 1, 5)
    reference = torch.randn(5).expand(policy.shape)
    found = fusedkl.forward_kl(policy, reference, backend=backend)
    expected = fusedkl.forward_kl(
        policy.reshape(-1, 5), reference.reshape(-1, 5).clone(), backend=backend
    )
    # not bits: the copy's rows are aligned otherwise, which may move a token to another lane
    torch.testing.assert_close(found, expected.view(policy.shape[:-1]), rtol=2e-6, atol=0)


def test_a_row_does_not_depend_on_its_batch(backend: str) -> None:
    policy, reference = torch.randn(2, 9, 3001)
    for kind in cases.KINDS:
        whole = fusedkl.divergence(policy, reference, kind, backend=backend)
        alone = [
            fusedkl.divergence(policy[i], reference[i], kind, backend=backend) for i in range(9)
        ]
        assert torch.equal(whole, torch.stack(alone))


@pytest.mark.parametrize("scenario", ["flat 1e-3", "flat 1", "peaked 2", "masked 2"])
def test_reference_backend_where_there_is_no_float64(
    monkeypatch: pytest.MonkeyPatch, scenario: str
) -> None:
    """Metal has none: the same formulas in float32, on the CPU here."""
    for module in (fusedkl.reference, fusedkl.reference_backend):
        monkeypatch.setattr(module, "inside", lambda device: torch.float32)
    policy, reference = cases.make(scenario, torch.float32)
    leaf = policy.clone().requires_grad_()
    for kind in cases.KINDS:
        value = fusedkl.divergence(leaf, reference, kind, temperature=0.7, backend="reference")
        close(value, cases.truth(scenario, torch.float32, "T=0.7")[kind], floor=1e-9)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        expected = cases.truth(scenario, torch.float32, "T=0.7")[f"d_{kind}"]
        assert oracle.relative_l2(gradient, expected) < 1e-4


def test_the_same_bits_for_any_number_of_threads(backend: str) -> None:
    """Few long rows (threads share a row) and many short ones; values and gradients."""
    for shape in ((1, 300_001), (3, 70_001), (64, 1001)):
        policy, reference = torch.randn(2, *shape)
        found = []
        for threads in (1, 2, 4, 1):
            torch.set_num_threads(threads)
            leaf = policy.clone().requires_grad_()
            values = fusedkl.jeffreys(leaf, reference, temperature=0.9, backend=backend)
            values = torch.stack([values, fusedkl.entropy(leaf, backend=backend)])
            (gradient,) = torch.autograd.grad(values.sum(), leaf)
            found.append((values.detach(), gradient))
        for values, gradient in found[1:]:
            assert torch.equal(values, found[0][0]) and torch.equal(gradient, found[0][1])


def test_modules_are_the_functions(backend: str) -> None:
    policy, reference = torch.randn(2, 4, 6, 11)
    mask = torch.rand(4, 6) < 0.5
    labels = torch.randint(-1, 3, (4, 6))
    for module, function in (
        (fusedkl.ForwardKLLoss, fusedkl.forward_kl),
        (fusedkl.ReverseKLLoss, fusedkl.reverse_kl),
        (fusedkl.JeffreysLoss, fusedkl.jeffreys),
    ):
        plain = module(backend=backend)
        assert torch.equal(plain(policy, reference), function(policy, reference, backend=backend))
        options = {"temperature": 2.0, "reduction": "mean", "backend": backend}
        loss = module(**options, ignore_index=-1)
        assert torch.equal(
            loss(policy, reference, mask=mask, labels=labels),
            function(policy, reference, mask=mask, labels=labels, ignore_index=-1, **options),
        )
        assert repr(loss) == f"{module.__name__}(temperature=2.0, reduction='mean')"


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_rows_of_which_the_first_tokens_tell_little(kind: str) -> None:
    """A few large weights make the mean: the centre found at the beginning must be moved."""
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(200, 1024, generator=generator)
    y = x + 0.1 * torch.randn(200, 1024, generator=generator)
    found = fusedkl.divergence(x, y, kind).double()
    expected = fusedkl.divergence(x.double(), y.double(), kind)
    assert ((found - expected).abs() / expected).max() < 1e-5
