"""The divergences as modules, for code that builds its loss once."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from . import validation
from .functional import divergence


class _DivergenceLoss(nn.Module):
    kind: ClassVar[str]

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        ignore_index: int = -100,
        reduction: str = "none",
        inplace_grad: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        validation.number_temperature(temperature)
        validation.reduction(reduction)
        validation.flag("inplace_grad", inplace_grad)
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.inplace_grad = inplace_grad
        self.backend = backend

    def forward(
        self,
        policy_logits: Tensor,
        reference_logits: Tensor,
        *,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        # Without labels ignore_index means nothing, and the function says so.
        options: dict[str, Any] = {}
        if labels is not None:
            options = {"labels": labels, "ignore_index": self.ignore_index}
        return divergence(
            policy_logits,
            reference_logits,
            self.kind,
            temperature=self.temperature,
            mask=mask,
            weight=weight,
            reduction=self.reduction,
            inplace_grad=self.inplace_grad,
            backend=self.backend,
            **options,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, reduction={self.reduction!r}"


class ForwardKLLoss(_DivergenceLoss):
    """`fusedkl.forward_kl` as a module: KL(q || p) of every row of logits, with its defaults.

    ``ForwardKLLoss(temperature=2.0, reduction="mean")(policy_logits, reference_logits)``. Options
    of the call: mask, weight, labels. See `fusedkl.divergence` for shapes, dtypes and errors.
    """

    kind = "forward_kl"


class ReverseKLLoss(_DivergenceLoss):
    """`fusedkl.reverse_kl` as a module: KL(p || q) of every row of logits, with its defaults.

    ``ReverseKLLoss(temperature=2.0, reduction="mean")(policy_logits, reference_logits)``. Options
    of the call: mask, weight, labels. See `fusedkl.divergence` for shapes, dtypes and errors.
    """

    kind = "reverse_kl"


class JeffreysLoss(_DivergenceLoss):
    """`fusedkl.jeffreys` as a module: KL(q || p) + KL(p || q) of every row, with its defaults.

    ``JeffreysLoss(temperature=2.0, reduction="mean")(policy_logits, reference_logits)``. Options
    of the call: mask, weight, labels. See `fusedkl.divergence` for shapes, dtypes and errors.
    """

    kind = "jeffreys"
