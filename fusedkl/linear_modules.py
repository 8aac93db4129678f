"""linear_divergence as a module, for code that builds its loss once."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import divergences, linear_inputs, topk, validation
from .linear import linear_divergence


class LinearDivergenceLoss(nn.Module):
    """`fusedkl.linear_divergence` as a module: holds the options, takes the tensors.

    ``LinearDivergenceLoss("reverse_kl", reduction="mean")(hidden, weight, ref_hidden, ref_weight)``
    with the defaults of the function; it has no parameters of its own. Options of the call:
    ref_logits, ref_topk, bias, ref_bias, mask, token_weight, labels. See
    `fusedkl.linear_divergence` for shapes, dtypes and errors.
    """

    def __init__(
        self,
        kind: str = "forward_kl",
        *,
        temperature: float = 1.0,
        softcap: float | None = None,
        ref_softcap: float | None = None,
        logit_scale: float = 1.0,
        ref_logit_scale: float = 1.0,
        ignore_index: int = -100,
        reduction: str = "none",
        tail: str | None = None,
        precision: str | None = None,
        tile: tuple[int, int] | None = None,
        beta: float | None = None,
        alpha: float | None = None,
        ce_weight: float | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        divergences.resolve(kind, beta, alpha)
        validation.number_temperature(temperature)
        validation.reduction(reduction)
        if tail is not None:
            validation.one_of("tail", tail, topk.TAILS)
        if ce_weight is not None:
            validation.share("ce_weight", ce_weight)
        linear_inputs.options(
            precision, tile, (logit_scale, ref_logit_scale), (softcap, ref_softcap)
        )
        self.kind, self.ignore_index = kind, ignore_index
        self.options: dict[str, Any] = {
            "temperature": temperature,
            "softcap": softcap,
            "ref_softcap": ref_softcap,
            "logit_scale": logit_scale,
            "ref_logit_scale": ref_logit_scale,
            "reduction": reduction,
            "tail": tail,
            "precision": precision,
            "tile": tile,
            "beta": beta,
            "alpha": alpha,
            "ce_weight": ce_weight,
            "backend": backend,
        }

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        ref_hidden: Tensor | None = None,
        ref_weight: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        **tensors: Any,
    ) -> Tensor:
        # Without labels ignore_index means nothing, and the function says so.
        labelled: dict[str, Any] = {}
        if labels is not None:
            labelled = {"labels": labels, "ignore_index": self.ignore_index}
        options = self.options | labelled | tensors
        return linear_divergence(hidden, weight, ref_hidden, ref_weight, self.kind, **options)

    def extra_repr(self) -> str:
        return f"{self.kind!r}, reduction={self.options['reduction']!r}"
