"""Second derivatives, and the rest of what a citizen of autograd owes."""

from __future__ import annotations

from collections.abc import Callable

import cases
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fusedkl

F64 = torch.float64


def composed(policy: Tensor, reference: Tensor, kind: str, temperature: float = 1.0) -> Tensor:
    """The two-line composition in double."""
    log_p = (policy.double() / temperature).log_softmax(-1)
    log_q = (reference.double() / temperature).log_softmax(-1)
    forward = (log_q.exp() * (log_q - log_p)).sum(-1)
    reverse = (log_p.exp() * (log_p - log_q)).sum(-1)
    return {"forward_kl": forward, "reverse_kl": reverse, "jeffreys": forward + reverse}[kind]


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("kind", cases.KINDS)
def test_gradcheck_and_gradgradcheck(backend: str, kind: str, reduction: str) -> None:
    policy = torch.randn(3, 1, 5, dtype=F64, requires_grad=True)
    reference = torch.randn(3, 1, 5, dtype=F64, requires_grad=True)
    weight = torch.rand(3, 1, dtype=F64, requires_grad=True)
    temperature = torch.rand(3, 1, dtype=F64) + 0.5
    mask = torch.tensor([[True], [True], [False]])

    def function(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return fusedkl.divergence(
            x,
            y,
            kind,
            weight=w,
            mask=mask,
            temperature=temperature,
            reduction=reduction,
            backend=backend,
        )

    assert gradcheck(function, (policy, reference, weight))
    assert gradgradcheck(function, (policy, reference, weight))


@pytest.mark.parametrize("name", ["entropy", "logsumexp", "selective", "log_softmax"])
def test_gradcheck_of_one_distribution(backend: str, name: str) -> None:
    logits = torch.randn(3, 6, dtype=F64, requires_grad=True)
    ids = torch.tensor([[0, 5], [2, 2], [1, 0]])
    function: Callable[[Tensor], Tensor] = {
        "entropy": lambda z: fusedkl.entropy(z, temperature=0.7, backend=backend),
        "logsumexp": lambda z: fusedkl.logsumexp(z, temperature=0.7, backend=backend),
        "selective": lambda z: fusedkl.selective_log_softmax(
            z, ids, temperature=0.7, backend=backend
        ),
        "log_softmax": lambda z: fusedkl.log_softmax(z, 0, backend=backend),
    }[name]
    assert gradcheck(function, (logits,))
    assert gradgradcheck(function, (logits,))


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hessian_vector_products(backend: str, dtype: torch.dtype, kind: str) -> None:
    """In training dtypes, all four blocks of the Hessian, against the composition in double."""
    policy, reference = (t.to(dtype) for t in torch.randn(2, 3, 50))
    u, v = torch.randn(2, 3, 50).to(dtype)

    def products(function: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        x, y = policy.clone().requires_grad_(), reference.clone().requires_grad_()
        gx, gy = torch.autograd.grad(function(x, y).sum(), (x, y), create_graph=True)
        return torch.autograd.grad((gx * u).sum() + (gy * v).sum(), (x, y))

    found = products(lambda x, y: fusedkl.divergence(x, y, kind, backend=backend))
    expected = products(lambda x, y: composed(x, y, kind))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        assert float((a.double() - b.double()).norm() / b.double().norm()) < tolerance


def test_fisher_vector_product_of_equal_rows(backend: str) -> None:
    """At p = q the Hessian of either KL is diag(p) - p p^T, the Fisher matrix."""
    logits = torch.randn(1, 9, dtype=F64, requires_grad=True)
    p = logits.detach().softmax(-1)[0]
    fisher = torch.diag(p) - torch.outer(p, p)
    for kind in ("forward_kl", "reverse_kl"):
        value = fusedkl.divergence(logits, logits.detach(), kind, reduction="sum", backend=backend)
        (g,) = torch.autograd.grad(value, logits, create_graph=True)
        rows = [torch.autograd.grad(g[0, i], logits, retain_graph=True)[0][0] for i in range(9)]
        torch.testing.assert_close(torch.stack(rows), fisher, rtol=1e-9, atol=1e-12)


def test_a_reference_that_depends_on_the_policy(backend: str) -> None:
    """Each argument's derivative is its own: none may come through the other."""
    leaf = torch.randn(2, 8, dtype=F64, requires_grad=True)
    weights = torch.randn(2, 8, dtype=F64)

    def derivatives(function: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        policy = leaf * 2
        value = function(policy, policy.sin())
        (g,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)
        (h,) = torch.autograd.grad((g * weights).sum(), leaf)
        return g.detach(), h

    found = derivatives(lambda x, y: fusedkl.jeffreys(x, y, backend=backend))
    expected = derivatives(lambda x, y: composed(x, y, "jeffreys"))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_the_upstream_gradient_is_differentiable_at_zero(backend: str) -> None:
    """Forward-mode by two reverse modes differentiates at an upstream gradient of 0."""
    policy = torch.randn(3, 8, dtype=F64, requires_grad=True)
    reference = torch.randn(3, 8, dtype=F64)
    upstream = torch.zeros(3, dtype=F64, requires_grad=True)
    tangent = torch.randn(3, 8, dtype=F64)
    value = fusedkl.forward_kl(policy, reference, backend=backend)
    (g,) = torch.autograd.grad(value, policy, upstream, create_graph=True)
    (jvp,) = torch.autograd.grad(g, upstream, tangent)
    expected = ((policy.softmax(-1) - reference.softmax(-1)) * tangent).sum(-1)
    torch.testing.assert_close(jvp, expected.detach(), rtol=1e-9, atol=1e-12)


def test_double_backward_at_the_edges(backend: str) -> None:
    policy, reference = torch.randn(2, 4, 9, dtype=F64)
    policy[0, 3] = reference[0, 3] = -torch.inf
    policy[1, 3] = -torch.inf  # an infinite row: its policy gradient p - q is differentiable too
    policy[2, 3] = torch.nan  # masked
    policy[3, 3] = torch.nan  # silenced by a zero upstream gradient
    policy.requires_grad_()
    mask = torch.tensor([True, True, False, True])
    value = fusedkl.forward_kl(policy, reference, mask=mask, backend=backend)
    upstream = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=F64)
    (g,) = torch.autograd.grad(value, policy, upstream, create_graph=True)
    v = torch.randn(4, 9, dtype=F64)
    (h,) = torch.autograd.grad((g * v).sum(), policy)
    p = policy.detach().softmax(-1)
    expected = p * (v - (p * v).sum(-1, keepdim=True))
    torch.testing.assert_close(h[:2], expected[:2], rtol=1e-9, atol=1e-12)
    assert torch.equal(h[2:], torch.zeros(2, 9, dtype=F64)) and h[0, 3] == 0


def test_retained_graphs_and_accumulation(backend: str) -> None:
    policy = torch.randn(3, 20, requires_grad=True)
    loss = fusedkl.reverse_kl(policy, torch.randn(3, 20), reduction="sum", backend=backend)
    loss.backward(retain_graph=True)
    once = policy.grad.clone()
    loss.backward()
    assert torch.equal(policy.grad, 2 * once)


def test_checkpointing_changes_nothing(backend: str) -> None:
    hidden, weight = torch.randn(4, 5), torch.randn(5, 30)
    reference = torch.randn(4, 30)

    def loss(h: Tensor) -> Tensor:
        return fusedkl.forward_kl(h @ weight, reference, reduction="mean", backend=backend)

    found = []
    for run in (loss, lambda h: checkpoint(loss, h, use_reentrant=False)):
        leaf = hidden.clone().requires_grad_()
        value = run(leaf)
        value.backward()
        found.append((value.detach(), leaf.grad))
    assert torch.equal(found[0][0], found[1][0])
    if backend == "cuda_on_cpu":  # where a gradient made ahead is another kernel's
        torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-6, atol=1e-8)
    else:
        assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_autocast_changes_nothing(backend: str, dtype: torch.dtype) -> None:
    policy, reference = (t.to(dtype) for t in torch.randn(2, 4, 60))
    ids = torch.randint(0, 60, (4, 2))
    functions: list[Callable[[Tensor], Tensor]] = [
        lambda z: fusedkl.jeffreys(z, reference, reduction="mean", backend=backend),
        lambda z: fusedkl.forward_kl(
            z, reference, weight=torch.rand(4, generator=torch.Generator().manual_seed(1)),
            temperature=0.5, reduction="mean", backend=backend,
        ),
        lambda z: fusedkl.entropy(z, backend=backend),
        lambda z: fusedkl.selective_log_softmax(z, ids, backend=backend),
        lambda z: fusedkl.log_softmax(z, backend=backend),
    ]  # fmt: skip
    for function in functions:
        plain, cast = policy.clone().requires_grad_(), policy.clone().requires_grad_()
        expected = function(plain)
        expected.sum().backward()
        with torch.autocast("cpu", torch.bfloat16):
            found = function(cast)
            found.sum().backward()
        assert found.dtype == expected.dtype and torch.equal(found, expected)
        assert torch.equal(cast.grad, plain.grad)


def test_dispatch_modes(backend: str) -> None:
    """FLOP counters, memory trackers and selective checkpointing run operators below autograd."""
    policy, reference = torch.randn(2, 4, 60)
    expected, found = policy.clone().requires_grad_(), policy.clone().requires_grad_()
    fusedkl.forward_kl(expected, reference, reduction="mean", backend=backend).backward()
    with FlopCounterMode(display=False):
        fusedkl.forward_kl(found, reference, reduction="mean", backend=backend).backward()
    assert torch.equal(found.grad, expected.grad)


def test_inference_mode(backend: str) -> None:
    policy, reference = torch.randn(2, 4, 60)
    expected = fusedkl.jeffreys(policy, reference, reduction="mean", backend=backend)
    with torch.inference_mode():
        found = fusedkl.jeffreys(
            policy.clone(), reference, reduction="mean", inplace_grad=True, backend=backend
        )
    assert torch.equal(found, expected)


def test_graph_holds_the_logits_and_nothing_of_their_size(backend: str) -> None:
    policy = torch.randn(16, 999, requires_grad=True)
    reference = torch.randn(16, 999)
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        fusedkl.forward_kl(
            policy, reference, mask=torch.rand(16) < 0.5, reduction="mean", backend=backend
        )
    large = [t for t in saved if t.numel() >= policy.numel()]
    assert {t.data_ptr() for t in large} == {policy.data_ptr(), reference.data_ptr()}
    assert sum(t.numel() for t in saved if t.numel() < policy.numel()) <= 32 * 16


FUNCTORCH: dict[str, Callable[[Callable[..., Tensor], Tensor, Tensor], Tensor]] = {
    "grad": lambda f, x, y: torch.func.grad(f)(x, y),
    "vjp": lambda f, x, y: torch.func.vjp(f, x, y)[1](torch.tensor(2.0, dtype=F64))[1],
    "vmap": lambda f, x, y: torch.func.vmap(f)(x, y),
    "vmap over a last dim": lambda f, x, y: torch.func.vmap(f, (2, None))(
        x.movedim(0, 2).contiguous(), y[0]
    ),
    "gradients per sample": lambda f, x, y: torch.func.vmap(torch.func.grad(f, 1))(x, y),
    "jacrev": lambda f, x, y: torch.func.jacrev(f)(x, y),
    "jacrev of grad": lambda f, x, y: torch.func.jacrev(torch.func.grad(f))(x[0], y[0]),
    "batched gradients": lambda f, x, y: torch.autograd.functional.jacobian(
        lambda z: f(z, y), x, vectorize=True
    ),
}


# jacrev runs one backward per output; torch says that it loops.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("name", FUNCTORCH)
def test_function_transforms(backend: str, name: str) -> None:
    policy, reference = torch.randn(2, 3, 2, 6, dtype=F64)
    ids = torch.randint(0, 6, (2, 4))
    mask, temperature = torch.tensor([True, False]), torch.tensor([2.0, 1.0])

    def ours(x: Tensor, y: Tensor) -> Tensor:
        value = fusedkl.jeffreys(
            x, y, mask=mask.expand(x.shape[:-1]), reduction="mean", backend=backend
        )
        value = value + fusedkl.entropy(x, temperature=2.0, backend=backend).sum()
        chosen = fusedkl.selective_log_softmax(
            x, ids.expand(*x.shape[:-1], 4), temperature=temperature.expand(x.shape[:-1]),
            backend=backend,
        )  # fmt: skip
        return value + chosen.sum() + fusedkl.log_softmax(y, 0, backend=backend)[0].sum()

    def theirs(x: Tensor, y: Tensor) -> Tensor:
        counted = mask.expand(x.shape[:-1])
        value = (composed(x, y, "jeffreys") * counted).sum() / counted.sum()
        log_p = (x / 2).log_softmax(-1)
        value = value - (log_p.exp() * log_p).sum()
        log_p = (x / temperature[:, None]).log_softmax(-1)
        chosen = log_p.gather(-1, ids.expand(*x.shape[:-1], 4))
        return value + chosen.sum() + y.log_softmax(0)[0].sum()

    transform = FUNCTORCH[name]
    found, expected = transform(ours, policy, reference), transform(theirs, policy, reference)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_vmap_over_temperatures_and_token_ids(backend: str) -> None:
    policy, reference = torch.randn(2, 5, 6, dtype=F64)
    temperatures = torch.tensor([0.5, 1.0, 3.0])
    found = torch.func.vmap(
        lambda t: fusedkl.forward_kl(policy, reference, temperature=t, backend=backend)
    )(temperatures)
    expected = [composed(policy, reference, "forward_kl", t) for t in temperatures.tolist()]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-9, atol=1e-12)
    ids = torch.randint(0, 6, (5, 2, 3))
    found = torch.func.vmap(lambda i: fusedkl.selective_log_softmax(policy, i, backend=backend), 2)(
        ids
    )
    expected_ids = policy.log_softmax(-1).gather(-1, ids.reshape(5, 6)).view(5, 2, 3)
    torch.testing.assert_close(found, expected_ids.movedim(2, 0), rtol=1e-9, atol=1e-12)


# The first use of a dual tensor makes torch load its own scripted decompositions.
@pytest.mark.filterwarnings(
    "ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning"
)
def test_forward_mode_is_refused_not_wrong(backend: str) -> None:
    policy, reference = torch.randn(2, 3, 10)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(policy, torch.ones_like(policy))
        with pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward"):
            fusedkl.forward_kl(dual, reference, backend=backend)
