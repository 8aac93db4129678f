"""The truth of a case in float64, and how far a contender is from it; nothing else is timed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from contenders import Contender
from formulas import as_is
from oracle_f64 import relative_l2
from torch import Tensor

from .batch import DISTINCT, Batch, Case
from .operations import OPERATIONS


@dataclass(frozen=True)
class Truth:
    """The mean over counted tokens, and each distinct row's gradient to its own policy row."""

    value: float
    gradients: Tensor  # float64 [DISTINCT, V or H]
    counted: Tensor  # bool [N]

    def gradient(self, row: int) -> Tensor:
        """That of the mean, to row `row` of the policy."""
        share = float(self.counted[row]) / float(self.counted.sum())
        return self.gradients[row % len(self.gradients)] * share


@dataclass(frozen=True)
class Errors:
    """Relative error of the value, largest relative L2 error of the gradient of a row.

    A gradient is allowed what rounding the true one to its type costs, besides its tolerance:
    float16 loses digits of the gradient of a mean over many tokens, whoever computes it.
    """

    value: float
    gradient: float | None
    wrong: str


def truth(case: Case, batch: Batch) -> Truth:
    few = batch.part(slice(min(DISTINCT, case.tokens))).double()
    policy = few.policy.requires_grad_()
    rows = OPERATIONS[case.operation].rows(few._replace(policy=policy), as_is)
    (gradients,) = torch.autograd.grad(rows.sum(), policy)
    again = torch.arange(case.tokens, device=rows.device) % len(rows)
    counted = batch.counted.to(rows.device)
    value = float(rows.detach()[again][counted].mean())
    return Truth(value, gradients, counted)


def leaf(tensor: Tensor, copied: bool) -> Tensor:
    """A leaf of the same strides; a copy for who writes over it."""
    if not copied:
        return tensor.detach().requires_grad_()
    copy = torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )
    return copy.copy_(tensor).requires_grad_()


def leaves(contender: Contender, case: Case, batch: Batch) -> dict[str, Tensor]:
    """What the operation differentiates."""
    names = OPERATIONS[case.operation].leaves if case.backward else ()
    return {name: leaf(getattr(batch, name), contender.inplace) for name in names}


def call(contender: Contender, case: Case, batch: Batch, fresh: dict[str, Tensor]) -> object:
    """What is timed: the loss alone, or its gradients to `fresh`."""
    if not case.backward:
        with torch.no_grad():
            return contender.loss(batch)
    loss = contender.loss(batch._replace(**fresh))
    return torch.autograd.grad(loss, tuple(fresh.values()))


def judge(contender: Contender, case: Case, batch: Batch, true: Truth) -> Errors:
    """Value, and the gradient of the first, the last and a masked row."""
    if not case.backward:
        with torch.no_grad():
            return _verdict(contender, float(contender.loss(batch)), None, 0.0, true)
    fresh = leaves(contender, case, batch)
    loss = contender.loss(batch._replace(**fresh))
    (found, *_) = torch.autograd.grad(loss, tuple(fresh.values()))
    error = rounding = 0.0
    for row in _probed(true.counted):
        expected = true.gradient(row)
        if not bool(true.counted[row]):
            error = error if not bool(found[row].any()) else float("inf")
        else:
            error = max(error, relative_l2(found[row], expected))
            rounding = max(rounding, relative_l2(expected.to(found.dtype), expected))
    return _verdict(contender, float(loss.detach()), error, rounding, true)


def _probed(counted: Tensor) -> set[int]:
    among, masked = counted.nonzero().flatten(), (~counted).nonzero().flatten()
    return {int(among[0]), int(among[-1]), *(int(i) for i in masked[:1])}


def _verdict(
    contender: Contender, value: float, gradient: float | None, rounding: float, true: Truth
) -> Errors:
    # Relative to what the value is made of; NaN and infinity must not pass.
    error = abs(value - true.value) / max(abs(true.value), 1e-300)
    wrong = []
    if not error <= contender.value_tolerance + 1e-6:
        wrong.append(f"value {value:.6g}, expected {true.value:.6g}")
    if gradient is not None and not gradient <= contender.gradient_tolerance + rounding:
        wrong.append(f"gradient off by {gradient:.2g} relative L2")
    return Errors(error, gradient, "; ".join(wrong))
