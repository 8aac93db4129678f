"""The operations of the suite: each as trainers write it, per row, and as fusedkl has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import formulas
import torch
from family import step_rows
from formulas import Cast
from torch import Tensor

import fusedkl

from .batch import Batch

Rows = Callable[[Batch, Cast], Tensor]
Ours = Callable[[Batch, "Tensor | None", "str | None"], Tensor]


@dataclass(frozen=True)
class Operation:
    """`rows` gives one value per token; `ours` (batch, mask, backend) their mean over the mask."""

    title: str
    rows: Rows
    ours: Ours
    # What of the batch gets a gradient.
    leaves: tuple[str, ...] = ("policy",)
    # What is right: relative error of ours in value; of its gradient it is the dtype's rounding.
    tolerance: float = 1e-5
    # What the gradient of a peer may be off by, relative L2.
    peer_gradient: float = 2e-2
    # Whether fusedkl.inductor has a pattern for it, and `inplace_grad` a meaning.
    is_kl: bool = False


def masked_mean(rows: Tensor, counted: Tensor | None) -> Tensor:
    """The mean over counted tokens, as trainers write it."""
    return rows.mean() if counted is None else (rows * counted).sum() / counted.sum()


def _forward(b: Batch, cast: Cast) -> Tensor:
    return formulas.forward_kl(b.policy, b.reference, cast)


def _reverse(b: Batch, cast: Cast) -> Tensor:
    return formulas.reverse_kl(b.policy, b.reference, cast)


def _jsd(b: Batch, cast: Cast) -> Tensor:
    return formulas.jsd(b.policy, b.reference, cast)


def _statistics(b: Batch, cast: Cast) -> Tensor:
    found = formulas.statistics(b.policy, b.reference, b.ids, cast)
    return step_rows(*found, b.advantage)


def _topk(b: Batch, cast: Cast) -> Tensor:
    return formulas.topk(b.policy, b.topk_ids, b.topk_logprobs, cast)


def _linear(b: Batch, cast: Cast) -> Tensor:
    assert b.weight is not None
    with torch.no_grad():
        reference = product(b.reference, b.weight)
    return formulas.forward_kl(product(b.policy, b.weight), reference, cast)


def product(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits; of hidden states in float64 the weight is widened by parts."""
    if hidden.dtype == weight.dtype:
        return hidden @ weight.t()
    parts = weight.split(8192)
    return torch.cat([hidden @ part.to(hidden.dtype).t() for part in parts], -1)


def _divergence(kind: str) -> Ours:
    def ours(b: Batch, mask: Tensor | None, backend: str | None) -> Tensor:
        return fusedkl.divergence(
            b.policy, b.reference, kind, mask=mask, reduction="mean", backend=backend
        )

    return ours


def in_place(kind: str) -> Ours:
    """The same, its gradient written over the policy's logits."""

    def ours(b: Batch, mask: Tensor | None, backend: str | None) -> Tensor:
        return fusedkl.divergence(
            b.policy,
            b.reference,
            kind,
            mask=mask,
            reduction="mean",
            inplace_grad=True,
            backend=backend,
        )

    return ours


def _our_statistics(b: Batch, mask: Tensor | None, backend: str | None) -> Tensor:
    fields = ("logprob", "entropy", "reverse_kl", "log_ratio")
    s = fusedkl.token_stats(b.policy, b.reference, b.ids, fields=fields, mask=mask, backend=backend)
    assert s.logprob is not None and s.entropy is not None and s.reverse_kl is not None
    return masked_mean(step_rows(s.logprob, s.entropy, s.reverse_kl, s.k3, b.advantage), mask)


def _our_topk(b: Batch, mask: Tensor | None, backend: str | None) -> Tensor:
    return fusedkl.topk_divergence(
        b.policy, b.topk_ids, b.topk_logprobs, mask=mask, reduction="mean", backend=backend
    )


def _our_linear(b: Batch, mask: Tensor | None, backend: str | None) -> Tensor:
    assert b.weight is not None
    return fusedkl.linear_divergence(
        b.policy,
        b.weight,
        b.reference,
        b.weight.detach(),
        mask=mask,
        reduction="mean",
        backend=backend,
    )


OPERATIONS = {
    "forward_kl": Operation("KL(q || p)", _forward, _divergence("forward_kl"), is_kl=True),
    "reverse_kl": Operation("KL(p || q)", _reverse, _divergence("reverse_kl"), is_kl=True),
    "jsd": Operation("Jensen-Shannon", _jsd, _divergence("jsd")),
    # a sum of terms of either sign, of which the largest are about 10
    "token_stats": Operation("GRPO statistics", _statistics, _our_statistics, tolerance=1e-4),
    "topk": Operation("top-k teacher", _topk, _our_topk),
    # Peers round logits and their gradients to 16 bits between the product and the divergence.
    "linear": Operation(
        "lm_head and KL(q || p)", _linear, _our_linear, ("policy", "weight"), 1e-3, 0.1
    ),
}
