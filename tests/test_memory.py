"""What the compiled kernels allocate: O(tokens), and the gradient that autograd asks for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fusedkl
from fusedkl.backends import BACKENDS

pytestmark = pytest.mark.skipif(
    BACKENDS["cpu"].why_not(None) is not None, reason=str(BACKENDS["cpu"].why_not(None))
)
# Gradients below 4 MiB, also in float64: larger ones are in memory that the profiler does not see.
B, T, V = 4, 9, 16_000
# A few numbers of eight bytes for each of the 32 tokens.
SMALL = 16_384
# kind, options: one sweep, two directions, and each kind of second sweep.
KINDS = {
    "forward_kl": {},
    "reverse_kl": {},
    "jeffreys": {},
    "jsd": {"beta": 0.3},
    "skew_kl": {},
    "renyi": {"alpha": 0.5},
    "tvd": {},
}


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """Off here: filling memory is what torch would be seen doing."""


def peak(function: Callable[[], object]) -> int:
    """Bytes above the start that torch's CPU allocator held at once while it ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as run:
        function()
    assert run.profiler is not None
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Shifted slices, as language models make them: a gap after every sequence."""
    policy, reference = torch.randn(B, T, V).to(dtype), torch.randn(B, T, V).to(dtype)
    options = {
        "mask": torch.rand(B, T - 1) < 0.5,
        "weight": torch.rand(B, T - 1),
        "temperature": torch.rand(B, T - 1) + 0.5,
    }
    return policy[:, :-1], reference[:, 1:], options


def test_the_measure_sees_a_copy() -> None:
    policy, _, _ = inputs(torch.float32)
    assert peak(lambda: policy.contiguous().sum()) >= policy.numel() * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_forward_allocates_nothing_of_the_logits_size(kind: str, dtype: torch.dtype) -> None:
    policy, reference, options = inputs(dtype)
    options |= KINDS[kind]

    def run() -> Tensor:
        return fusedkl.divergence(
            policy, reference, kind, reduction="mean", backend="cpu", **options
        )

    assert peak(run) < SMALL
    one = reference[0, 0].expand(policy.shape)
    own = KINDS[kind]
    assert peak(lambda: fusedkl.divergence(policy, one, kind, backend="cpu", **own)) < SMALL


def test_one_distribution_allocates_nothing_of_the_logits_size() -> None:
    policy, _, _ = inputs(torch.bfloat16)
    index = torch.randint(0, V, (B, T - 1, 4))
    assert peak(lambda: fusedkl.entropy(policy, backend="cpu")) < SMALL
    assert peak(lambda: fusedkl.logsumexp(policy, temperature=2.0, backend="cpu")) < SMALL
    assert peak(lambda: fusedkl.selective_log_softmax(policy, index, backend="cpu")) < SMALL
    result = policy.numel() * 2
    assert peak(lambda: fusedkl.log_softmax(policy, backend="cpu")) < result + SMALL


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_backward_allocates_the_gradients(kind: str, dtype: torch.dtype) -> None:
    policy, reference, options = inputs(dtype)
    options |= KINDS[kind]
    policy, reference = policy.detach().requires_grad_(), reference.detach()
    gradient = policy.numel() * policy.element_size()

    def run(*leaves: Tensor) -> object:
        loss = fusedkl.divergence(
            policy, reference, kind, reduction="mean", backend="cpu", **options
        )
        return torch.autograd.grad(loss, leaves)

    assert gradient <= peak(lambda: run(policy)) < gradient + SMALL
    reference.requires_grad_()
    assert 2 * gradient <= peak(lambda: run(policy, reference)) < 2 * gradient + SMALL


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_inplace_grad_allocates_nothing_of_the_logits_size(kind: str, dtype: torch.dtype) -> None:
    policy, reference, options = inputs(dtype)
    options |= KINDS[kind]
    logits = policy.clone().requires_grad_() * 1

    def run() -> object:
        loss = fusedkl.divergence(
            logits,
            reference,
            kind,
            reduction="mean",
            inplace_grad=True,
            backend="cpu",
            **options,
        )
        return torch.autograd.grad(loss, logits)

    assert peak(run) < SMALL


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_token_stats_allocate_the_gradients(dtype: torch.dtype) -> None:
    policy, reference, _ = inputs(dtype)
    ids = torch.randint(0, V, (B, T - 1))
    policy, reference = policy.detach().requires_grad_(), reference.detach().requires_grad_()
    with torch.no_grad():
        assert peak(lambda: fusedkl.token_stats(policy, reference, ids, backend="cpu")) < SMALL
    gradient = policy.numel() * policy.element_size()

    def run() -> object:
        stats = fusedkl.token_stats(policy, reference, ids, backend="cpu")
        total = sum(value.sum() for value in (*stats, stats.k2, stats.k3))
        return torch.autograd.grad(total, (policy, reference))

    assert 2 * gradient <= peak(run) < 2 * gradient + 2 * SMALL


def test_a_leaf_shares_its_memory_with_its_inplace_gradient() -> None:
    policy, reference, _ = inputs(torch.float32)
    leaf = policy.clone().requires_grad_()

    def run() -> None:
        fusedkl.forward_kl(
            leaf, reference, reduction="sum", inplace_grad=True, backend="cpu"
        ).backward()

    assert peak(run) < SMALL
    assert leaf.grad is not None and leaf.grad.data_ptr() == leaf.data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_sparse_teacher_allocates_numbers_per_token_and_the_gradient(dtype: torch.dtype) -> None:
    policy, reference, options = inputs(dtype)
    policy.requires_grad_()
    log_q, ids = reference.float().log_softmax(-1).topk(16, -1)
    outcomes = 8 * log_q.shape[0] * log_q.shape[1] * 17  # one float64 for each

    def loss() -> Tensor:
        return fusedkl.topk_divergence(
            policy, ids, log_q, mask=options["mask"], temperature=options["temperature"],
            reduction="mean",
        )  # fmt: skip

    assert peak(loss) <= 16 * outcomes + SMALL
    value = loss()
    gradient = policy.numel() * policy.element_size()
    assert peak(value.backward) <= 2 * gradient + 16 * outcomes  # and the slice's into the whole
    plain = policy.detach().contiguous().requires_grad_()
    value = fusedkl.topk_divergence(plain, ids, log_q, reduction="mean")
    assert peak(value.backward) <= gradient + 16 * outcomes
