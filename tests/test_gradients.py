"""First derivatives of every function on every backend against 60-digit arithmetic."""

from __future__ import annotations

import cases
import oracle
import pytest
import torch
from torch import Tensor

import fusedkl

FINITE = [name for name in cases.SCENARIOS if name not in ("policy hole", "reference hole")]
# Where float16 can hold the elements: below 6e-8 it has none, whatever computes them.
LARGE = ["flat 1", "flat 8", "masked 2", "offset 1"]


def gradients(
    policy: Tensor, reference: Tensor, upstream: Tensor | float = 1.0, **options: object
) -> tuple[Tensor, Tensor]:
    policy, reference = policy.clone().requires_grad_(), reference.clone().requires_grad_()
    value = fusedkl.divergence(policy, reference, **options)
    value.backward(torch.as_tensor(upstream, dtype=value.dtype).expand(value.shape))
    assert policy.grad is not None and reference.grad is not None
    for leaf in (policy, reference):
        assert leaf.grad.dtype == leaf.dtype and leaf.grad.shape == leaf.shape
    return policy.grad, reference.grad


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("dtype", cases.GRADIENT_DTYPES, ids=str)
@pytest.mark.parametrize("temperature", cases.TEMPERATURES)
@pytest.mark.parametrize("scenario", FINITE)
def test_divergence(
    backend: str, scenario: str, temperature: str, dtype: torch.dtype, kind: str
) -> None:
    options = {"temperature": cases.TEMPERATURES[temperature], "backend": backend}
    found = gradients(*cases.make(scenario, dtype), kind=kind, **options)
    true = cases.truth(scenario, dtype, temperature)
    # Below 1e-12 a divergence has no promise: bfloat16 turns small noise into few such differences.
    rows = (true[kind] >= 1e-12) | (true[kind] == 0)
    for gradient, name in zip(found, (f"d_{kind}", f"d_{kind}_reference"), strict=True):
        error = oracle.relative_l2(gradient[rows], true[name][rows])
        assert error <= oracle.GRADIENT_TOLERANCE[dtype], f"{name}: relative L2 {error:.1e}"


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("scenario", LARGE)
def test_half_under_a_loss_scale(backend: str, scenario: str, kind: str) -> None:
    # As a GradScaler does: multiplied before the rounding to the store.
    scale = 2.0**12
    found = gradients(
        *cases.make(scenario, torch.float16), upstream=scale, kind=kind, backend=backend
    )
    true = cases.truth(scenario, torch.float16, "T=1")
    for gradient, name in zip(found, (f"d_{kind}", f"d_{kind}_reference"), strict=True):
        error = oracle.relative_l2(gradient, scale * true[name])
        assert error <= oracle.GRADIENT_TOLERANCE[torch.float16], f"{name}: {error:.1e}"


def test_16_bit_rows_far_from_each_other(backend: str) -> None:
    """At 1e4 a float holds a difference to 5e-4; these were 4e-3 off."""
    spread = torch.tensor([[0.1], [0.5], [2.0], [4.0]])
    for dtype in (torch.bfloat16, torch.float16):
        policy = (spread * torch.randn(4, 64) + 1e4).to(dtype)
        reference = (spread * torch.randn(4, 64)).to(dtype)
        for kind in cases.KINDS:
            options = {"upstream": 2.0**12, "kind": kind}
            found = gradients(policy, reference, backend=backend, **options)
            true = gradients(policy.double(), reference.double(), backend="reference", **options)
            for a, b in zip(found, true, strict=True):
                error = oracle.relative_l2(a, b)
                assert error <= oracle.GRADIENT_TOLERANCE[dtype], f"{kind} {dtype}: {error:.1e}"


@pytest.mark.parametrize("gaps", [(50.0, 17.0), (40.0, 25.0), (45.0, 33.0), (25.0, 17.0)])
def test_one_token_has_nearly_all_of_both_masses(backend: str, gaps: tuple[float, float]) -> None:
    """Its p - q is a small part of the divergence, whose rounding was in it: 0.2 off at 1e-12."""
    # docs/numerics.md, "Gradients that cancel"
    limit, least = (1e-5, 1e-12) if backend in ("cpu", "reference") else (5e-5, 1e-10)
    for rows, width in ((64, 7), (2, 3001)):
        policy = 0.3 * torch.randn(rows, width)
        reference = policy + 0.2 * torch.randn(rows, width)
        policy[:, 3] += gaps[0]
        reference[:, 3] += gaps[1]
        exact = policy.double(), reference.double()
        promised = fusedkl.forward_kl(*exact, backend="reference") >= least
        found = gradients(policy, reference, kind="forward_kl", backend=backend)
        true = gradients(*exact, backend="reference")
        for a, b in zip(found, true, strict=True):
            assert oracle.relative_l2(a[promised], b[promised]) <= limit


def test_half_keeps_elements_that_only_the_scale_makes_representable(backend: str) -> None:
    policy, reference = cases.make("flat 1", torch.float16)
    scale = 2.0**16 / 2.0**6  # every element then is between 2^-24 and 65504
    found = gradients(policy, reference, upstream=scale * 2.0**-12, backend=backend)[0]
    true = cases.truth("flat 1", torch.float16, "T=1")["d_forward_kl"] * scale * 2.0**-12
    representable = true.abs() > 2.0**-14
    assert bool((found[representable] != 0).all())
    error = oracle.relative_error(found[representable], true[representable])
    assert error <= 2.0**-10


@pytest.mark.parametrize("kind", cases.KINDS)
def test_upstream_scales_each_row(backend: str, kind: str) -> None:
    policy, reference = cases.make("flat 1", torch.float32)
    upstream = torch.tensor([3.0, -0.25, 1e-3])
    found = gradients(policy, reference, upstream, kind=kind, backend=backend)
    plain = gradients(policy, reference, kind=kind, backend=backend)
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, upstream[:, None] * b, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_only_what_is_asked_for(backend: str, dtype: torch.dtype, kind: str) -> None:
    policy, reference = cases.make("flat 1", dtype)
    both = gradients(policy, reference, kind=kind, backend=backend)
    # The policy's gradient alone is the hot path; in 16 bits its exponentials are right to 1e-4 of
    # the value, so that a result may round to the neighbour.
    unit = torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 0.0
    one, other = policy.clone().requires_grad_(), reference.clone()
    fusedkl.divergence(one, other, kind, backend=backend).sum().backward()
    assert other.grad is None
    torch.testing.assert_close(one.grad, both[0], rtol=unit, atol=2.0**-24 if unit else 0.0)
    one, other = policy.clone(), reference.clone().requires_grad_()
    fusedkl.divergence(one, other, kind, backend=backend).sum().backward()
    assert one.grad is None and torch.equal(other.grad, both[1])


@pytest.mark.parametrize("kind", cases.KINDS)
def test_equal_rows_have_exactly_zero_gradient(backend: str, kind: str) -> None:
    logits = 5 * torch.randn(4, 1031)
    for gradient in gradients(logits, logits, kind=kind, backend=backend):
        assert torch.equal(gradient, torch.zeros_like(logits))


@pytest.mark.parametrize("kind", cases.KINDS)
def test_gradient_of_a_row_sums_to_zero(backend: str, kind: str) -> None:
    policy, reference = cases.make("flat 8", torch.float32)
    for gradient in gradients(policy, reference, kind=kind, backend=backend):
        total = gradient.double().sum(-1).abs() / gradient.double().abs().sum(-1)
        assert float(total.max()) < 1e-5


@pytest.mark.parametrize("temperature", cases.TEMPERATURES)
@pytest.mark.parametrize("dtype", cases.GRADIENT_DTYPES, ids=str)
@pytest.mark.parametrize("scenario", ["flat 8", "peaked 2", "offset 1", "masked 2"])
def test_one_distribution(
    backend: str, scenario: str, dtype: torch.dtype, temperature: str
) -> None:
    logits, _ = cases.make(scenario, dtype)
    true = cases.truth(scenario, dtype, temperature)
    options = {"temperature": cases.TEMPERATURES[temperature], "backend": backend}
    for name, function in (("entropy", fusedkl.entropy), ("logsumexp", fusedkl.logsumexp)):
        leaf = logits.clone().requires_grad_()
        function(leaf, **options).sum().backward()
        # bfloat16 ties whole rows at an offset of 1e4: entropies at their maximum, gradients of 0.
        error = oracle.relative_l2(leaf.grad, true[f"d_{name}"], floor=1e-10)
        assert error <= oracle.GRADIENT_TOLERANCE[dtype], f"{name}: relative L2 {error:.1e}"

    # Repeated and never chosen tokens; (1[a] - p) / T summed over the chosen.
    ids = torch.tensor([[5, 5, 0], [1, 2, 3], [66, 5, 66]])
    upstream = torch.tensor([[1.0, 0.5, 2.0], [1.0, 1.0, 1.0], [-1.0, 0.0, 3.0]])
    leaf = logits.clone().requires_grad_()
    chosen = fusedkl.selective_log_softmax(leaf, ids, **options)
    chosen.backward(upstream.to(chosen.dtype))
    t = torch.as_tensor(options["temperature"], dtype=torch.float64).expand(3)[:, None]
    onehot = torch.zeros(3, cases.V, dtype=torch.float64).scatter_add(1, ids, upstream.double())
    expected = onehot / t - upstream.double().sum(1, keepdim=True) * true["d_logsumexp"]
    error = oracle.relative_l2(leaf.grad, expected)
    assert error <= oracle.GRADIENT_TOLERANCE[dtype], f"logprob: relative L2 {error:.1e}"


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_log_softmax(backend: str, dtype: torch.dtype) -> None:
    logits = (2 * torch.randn(5, 4, 33)).to(dtype)
    upstream = torch.randn(5, 4, 33)
    for dim in (-1, 1):
        leaf = logits.clone().requires_grad_()
        out = fusedkl.log_softmax(leaf, dim, torch.float64, backend=backend)
        out.backward(upstream.double())
        leaf64 = logits.double().clone().requires_grad_()
        torch.log_softmax(leaf64, dim).backward(upstream.double())
        assert leaf.grad.dtype == dtype
        error = oracle.relative_l2(leaf.grad.movedim(dim, -1), leaf64.grad.movedim(dim, -1))
        assert error <= oracle.GRADIENT_TOLERANCE[dtype]


def test_expanded_inputs_collect_their_gradient(backend: str) -> None:
    """An expanded row is read through stride 0; its gradient is the sum over what read it."""
    dtype = cases.DTYPES[-1] if torch.float64 in cases.DTYPES else torch.float32
    policy, row = torch.randn(6, 41, dtype=dtype), torch.randn(41, dtype=dtype)
    leaf = row.clone().requires_grad_()
    fusedkl.forward_kl(policy, leaf.expand(6, 41), backend=backend).sum().backward()
    expected = gradients(policy, row.expand(6, 41), backend=backend)[1].sum(0)
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-12, atol=1e-15)
    leaf = row.clone().requires_grad_()
    fusedkl.forward_kl(leaf.expand(6, 41), policy, backend=backend).sum().backward()
    expected = gradients(row.expand(6, 41), policy, backend=backend)[0].sum(0)
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-12, atol=1e-15)


def test_slices_get_the_gradient_of_their_copies(backend: str) -> None:
    logits = torch.randn(3, 5, 29)
    reference = torch.randn(3, 4, 29)
    leaf = logits.clone().requires_grad_()
    fusedkl.reverse_kl(leaf[:, :-1], reference, backend=backend).sum().backward()
    copied = gradients(logits[:, :-1].contiguous(), reference, kind="reverse_kl", backend=backend)
    assert torch.equal(leaf.grad[:, :-1], copied[0])
    assert torch.equal(leaf.grad[:, -1], torch.zeros(3, 29))


@pytest.mark.slow
@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_long_rows_agree_with_the_reference_backend(
    backend: str, dtype: torch.dtype, kind: str
) -> None:
    for width in (2, 31, 4097, 70001):
        policy = (3 * torch.randn(2, width)).to(dtype)
        reference = (policy.double() + 0.3 * torch.randn(2, width)).to(dtype)
        scale = 2.0**10
        found = gradients(policy, reference, scale, kind=kind, backend=backend)
        true = gradients(policy.double(), reference.double(), scale, kind=kind, backend="reference")
        for a, b in zip(found, true, strict=True):
            assert oracle.relative_l2(a, b) <= oracle.GRADIENT_TOLERANCE[dtype]


@pytest.mark.parametrize("factor", [1.0, 3.0, 0.7, 0.125, 0.0])
@pytest.mark.parametrize("dtype", cases.GRADIENT_DTYPES, ids=str)
def test_a_scaled_scalar_loss_rounds_once(backend: str, dtype: torch.dtype, factor: float) -> None:
    """The gradient may be made before the factor is known; it must not be rounded twice for it."""
    torch.manual_seed(0)
    # the shim takes milliseconds for a row, however short
    count = 500 if backend == "cuda_on_cpu" else 20000
    policy, reference = (torch.randn(count, 2, dtype=torch.float64) for _ in range(2))
    policy, reference = policy.to(dtype), reference.to(dtype)
    policy.requires_grad_()
    loss = factor * fusedkl.forward_kl(policy, reference, reduction="sum", backend=backend)
    loss.backward()
    p, q = (torch.softmax(t.detach().double(), -1) for t in (policy, reference))
    assert policy.grad is not None
    error = oracle.relative_l2(policy.grad, factor * (p - q)) if factor else policy.grad.abs().max()
    assert error <= oracle.GRADIENT_TOLERANCE[dtype]
