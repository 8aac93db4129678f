"""The divergences as modules, for code that builds its loss once."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from . import divergences, validation
from .functional import divergence


class _DivergenceLoss(nn.Module):
    kind: ClassVar[str]

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        ignore_index: int = -100,
        reduction: str = "none",
        valid_vocab: int | None = None,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        inplace_grad: bool = False,
        backend: str | None = None,
        **parameter: Any,
    ) -> None:
        super().__init__()
        validation.number_temperature(validation.real("temperature", temperature))
        validation.reduction(reduction)
        validation.flag("inplace_grad", inplace_grad)
        validation.controls(softcap, logit_scale)
        accepted = divergences.get(self.kind).parameter
        for name in parameter:
            if name != accepted:
                raise TypeError(f"{type(self).__name__} has no option {name!r}")
        divergences.resolve(self.kind, **parameter)
        self.parameter = parameter
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.options: dict[str, Any] = {
            "valid_vocab": valid_vocab,
            "softcap": softcap,
            "logit_scale": logit_scale,
            "inplace_grad": inplace_grad,
            "backend": backend,
        }

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
        labelled: dict[str, Any] = {}
        if labels is not None:
            labelled = {"labels": labels, "ignore_index": self.ignore_index}
        return divergence(
            policy_logits,
            reference_logits,
            self.kind,
            temperature=self.temperature,
            mask=mask,
            weight=weight,
            reduction=self.reduction,
            **self.parameter,
            **self.options,
            **labelled,
        )

    def extra_repr(self) -> str:
        given = "".join(f"{name}={value}, " for name, value in self.parameter.items())
        return f"{given}temperature={self.temperature}, reduction={self.reduction!r}"


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


class JSDLoss(_DivergenceLoss):
    """`fusedkl.jsd` as a module: generalized Jensen-Shannon divergence of every row.

    ``JSDLoss(beta=0.5, reduction="mean")(policy_logits, reference_logits)``. Options of the
    call: mask, weight, labels. See `fusedkl.divergence` for shapes, dtypes and errors.
    """

    kind = "jsd"


class SkewKLLoss(_DivergenceLoss):
    """`fusedkl.skew_kl` as a module: KL(q || alpha q + (1 - alpha) p) of every row.

    ``SkewKLLoss(alpha=0.1, reduction="mean")(policy_logits, reference_logits)``. Options of the
    call: mask, weight, labels. See `fusedkl.divergence` for shapes, dtypes and errors.
    """

    kind = "skew_kl"


class RenyiLoss(_DivergenceLoss):
    """`fusedkl.renyi` as a module: D_alpha(q || p) of every row, with its defaults.

    ``RenyiLoss(alpha=2.0, reduction="mean")(policy_logits, reference_logits)``. Options of the
    call: mask, weight, labels. See `fusedkl.divergence` for shapes, dtypes and errors.
    """

    kind = "renyi"


class TVDLoss(_DivergenceLoss):
    """`fusedkl.tvd` as a module: total variation distance of every row, with its defaults.

    ``TVDLoss(reduction="mean")(policy_logits, reference_logits)``. Options of the
    call: mask, weight, labels. See `fusedkl.divergence` for shapes, dtypes and errors.
    """

    kind = "tvd"


class HellingerLoss(_DivergenceLoss):
    """`fusedkl.hellinger` as a module: squared Hellinger distance of every row, with its defaults.

    ``HellingerLoss(reduction="mean")(policy_logits, reference_logits)``. Options of the
    call: mask, weight, labels. See `fusedkl.divergence` for shapes, dtypes and errors.
    """

    kind = "hellinger"
