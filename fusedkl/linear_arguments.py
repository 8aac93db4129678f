"""The arguments of the operators behind linear_divergence and linear_token_stats, by name."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import divergences, reference

DIFFERENTIABLE = 7
OF_HIDDEN = ("hidden", "ref_hidden")
OF_TOKENS = (*OF_HIDDEN, "ref_logits")


class Inputs(NamedTuple):
    """The operator's arguments."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    ref_hidden: Tensor | None
    ref_weight: Tensor | None
    ref_bias: Tensor | None
    ref_logits: Tensor | None
    token_ids: Tensor | None
    labels: Tensor | None
    topk_ids: Tensor | None
    fields: list[str]
    parameter: float | None
    inv_temperature: Tensor | None
    mask: Tensor | None
    scales: list[float]
    softcaps: list[float]
    fast: bool
    tile: list[int]
    backend: str

    @property
    def paired(self) -> bool:
        return self.ref_hidden is not None or self.ref_logits is not None

    def detached(self) -> Inputs:
        return self.changed({name: t.detach() for name, t in self.tensors()})

    def tensors(self) -> list[tuple[str, Tensor]]:
        """Names and values of all arguments that are tensors."""
        named = zip(self._fields, self, strict=True)
        return [(name, t) for name, t in named if isinstance(t, Tensor)]

    def changed(self, arguments: dict[str, Any]) -> Inputs:
        """These with some arguments replaced."""
        return self._replace(**arguments)

    def tokens(self, index: Tensor) -> Inputs:
        """Of some of the tokens only."""
        per_token = ("ref_hidden", "ref_logits", "token_ids", "labels", "topk_ids")
        some: dict[str, Any] = {"hidden": self.hidden[index], "mask": None}
        for name in per_token:
            given = getattr(self, name)
            some[name] = None if given is None else given[index]
        inverse = self.inv_temperature
        if inverse is not None and inverse.shape[0] != 1:
            some["inv_temperature"] = inverse[index]
        return self._replace(**some)

    def counted(self, index: Tensor) -> Inputs:
        """Likewise, but for ref_logits: whole, for a Side's `live` to point into."""
        some = self._replace(ref_logits=None).tokens(index)
        return some._replace(ref_logits=self.ref_logits)

    def differentiable(self) -> tuple[Tensor | None, ...]:
        """Those that have gradients."""
        return (
            self.hidden,
            self.weight,
            self.bias,
            self.ref_hidden,
            self.ref_weight,
            self.ref_bias,
            self.ref_logits,
        )

    def value_rows(self) -> int:
        per_row = 0 if self.token_ids is None else self.token_ids.shape[1]
        outcomes = 0 if self.topk_ids is None else self.topk_ids.shape[1]
        rows = outcomes + divergences.value_rows(self.fields, per_row)
        return rows + (self.labels is not None)

    def result_dtype(self) -> torch.dtype:
        if self.topk_ids is not None:  # differences of these are what counts
            return reference.inside(self.hidden.device)
        return self.sent_dtype()

    def sent_dtype(self) -> torch.dtype:
        """That of numbers about both sides, between ranks too."""
        others = (self.ref_hidden, self.ref_logits)
        other = next((t for t in others if t is not None), None)
        return reference.result_dtype(self.hidden, other)
