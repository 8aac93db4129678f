"""Who is measured: mean per-token KL(reference || policy) of two [rows, vocabulary] tensors.

Each contender is a function of the two tensors that returns a scalar. The peers compute in fp32,
as their users write them: bf16 log-softmax gives KLs that are noise, so it is no contender.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import formulas
import oracle_f64
import timing
import torch
import torch.nn.functional as F
from cases import Problem
from timing import Step
from torch import Tensor

import fusedkl

# Of policy and reference; in the suite, of a batch.
Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Contender:
    """A named loss; `value_tolerance` and `gradient_tolerance` are what counts as right."""

    name: str
    loss: Loss
    value_tolerance: float = 1e-2
    gradient_tolerance: float = 2e-2
    inplace: bool = False


def two_lines(policy: Tensor, reference: Tensor) -> Tensor:
    """The two lines of PyTorch that everyone writes."""
    log_p = F.log_softmax(policy.float(), dim=-1)
    log_q = F.log_softmax(reference.float(), dim=-1)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def two_lines_by_row(policy: Tensor, reference: Tensor) -> Tensor:
    """The same with per-token values in between, which the compiler schedules differently."""
    return formulas.forward_kl(policy, reference).mean()


def row_loop(policy: Tensor, reference: Tensor) -> Tensor:
    """A Python loop over tokens, as TRL does to keep its temporaries small."""
    pairs = zip(policy, reference, strict=True)
    return torch.stack([formulas.forward_kl(x, y) for x, y in pairs]).mean()


def _ours(policy: Tensor, reference: Tensor) -> Tensor:
    return fusedkl.divergence(policy, reference, "forward_kl", reduction="mean")


def _ours_inplace(policy: Tensor, reference: Tensor) -> Tensor:
    return fusedkl.divergence(policy, reference, "forward_kl", reduction="mean", inplace_grad=True)


def _ours_both(policy: Tensor, reference: Tensor) -> Tensor:
    return fusedkl.divergence(policy, reference, "jeffreys", reduction="mean")


def _tight(name: str, loss: Loss, dtype: str, inplace: bool = False) -> Contender:
    return Contender(name, loss, 1e-5, {"bf16": 4e-3, "fp32": 1e-5}[dtype], inplace)


def ours(dtype: str) -> Contender:
    return _tight("fusedkl", _ours, dtype)


def ours_inplace(dtype: str) -> Contender:
    return _tight("fusedkl inplace_grad", _ours_inplace, dtype, inplace=True)


# Its value is the sum of two directions: to be checked against Problem.expected_both().
BOTH = Contender("fusedkl jeffreys", _ours_both, 1e-5)
EAGER = Contender("eager, upcast", two_lines)
ROW_LOOP = Contender("row loop", row_loop)


# The two ways of writing it, and which the compiler made the faster code of in this process.
_FORMS = {"batchmean": two_lines, "by row": two_lines_by_row}
_FASTER: dict[tuple[str, bool], str] = {}


def compiled(problem: Problem, backward: bool, clock: timing.Clock = timing.CPU) -> Contender:
    """torch.compile at its best: static shapes, and the faster of the two ways of writing it.

    Which that is, is found out at the first vocabulary of a dtype: compiling takes longer than
    timing.
    """
    torch._dynamo.reset()
    key = problem.dtype, backward
    peers = {
        form: Contender(f"torch.compile ({form})", torch.compile(loss, dynamic=False))
        for form, loss in _FORMS.items()
        if form == _FASTER.get(key, form)
    }
    candidates = {form: steps(peer, problem, backward) for form, peer in peers.items()}
    _FASTER[key] = timing.fastest(candidates, clock)
    return peers[_FASTER[key]]


def steps(contender: Contender, problem: Problem, backward: bool) -> Step:
    """What is timed: the loss under no_grad, or the loss and the gradient to the policy."""
    if not backward:
        return Step(lambda: forward(contender, problem))
    if not contender.inplace:
        leaf = problem.policy.detach().requires_grad_()
        return Step(lambda: gradient(contender, leaf, problem.reference))
    # The gradient overwrites the policy, so every call gets a restored copy.
    work = problem.policy.clone().requires_grad_()

    def restore() -> None:
        with torch.no_grad():
            work.copy_(problem.policy)

    return Step(
        lambda: gradient(contender, work, problem.reference), before=restore, repeatable=False
    )


@torch.no_grad()
def forward(contender: Contender, problem: Problem) -> Tensor:
    return contender.loss(problem.policy, problem.reference)


def gradient(contender: Contender, policy: Tensor, reference: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(contender.loss(policy, reference), policy)
    return grad


def check(contender: Contender, problem: Problem, expected: Tensor, backward: bool) -> str:
    """Why the contender's numbers are wrong, or "" if they are right.

    `expected` is problem.expected_rows(). The gradient is compared on the first and the last of the
    distinct rows and on the very last row: the whole tensor would take longer than the timing.
    """
    with torch.set_grad_enabled(backward):
        policy = problem.policy.clone().requires_grad_() if backward else problem.policy
        loss = contender.loss(policy, problem.reference)
    value, want = float(loss.detach()), problem.expected_mean(expected)
    # The mean of `rows` fp32 numbers may itself be off by a rounding.
    if not abs(value - want) <= (contender.value_tolerance + 1e-6) * want:
        return f"{contender.name}: value {value:.9g}, expected {want:.9g}"
    if not backward:
        return ""
    (grad,) = torch.autograd.grad(loss, policy)
    for index in {0, problem.distinct - 1, problem.rows - 1}:
        truth = oracle_f64.row(problem.policy[index], problem.reference[index]).forward_gradient
        error = oracle_f64.relative_l2(grad[index], truth / problem.rows)
        if not error <= contender.gradient_tolerance:
            return f"{contender.name}: gradient of row {index} off by {error:.2g} relative L2"
    return ""
