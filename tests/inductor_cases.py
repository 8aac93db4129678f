"""The product of ways in which a KL between rows of logits is written, as functions; the pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kl_div_cases import needs_kernel
from torch import Tensor

from fusedkl.inductor.passes import rewrite

# Of every file that compiles.
MARKS = [
    needs_kernel,
    pytest.mark.usefixtures("compiler"),
    # torch's own tracing warns of its own deprecations.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

FORMS = ("log_softmax", "softmax().log()", "x - logsumexp")
CASTS = ("none", ".float()", "dtype=")
TEMPERATURES = ("none", "before", "before, T**2 after")
TERMS = ("kl_div log_target", "kl_div", "sum q (log q - log p)", "sum p (log p - log q)")
REDUCTIONS = ("none, sum(-1)", "sum", "mean", "batchmean", "masked mean")
DTYPES = (torch.float32, torch.bfloat16)
T = 2.5
N, V = 5, 129


@dataclass(frozen=True)
class Written:
    """One way of writing it; `loss` is the code."""

    policy: str
    reference: str
    cast: str
    temperature: str
    terms: str
    reduction: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return "|".join(str(value) for value in vars(self).values())

    def loss(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        log_p = self._log_softmax(x, self.policy)
        log_q = self._log_softmax(y, self.reference)
        if self.terms == "kl_div log_target":
            terms = F.kl_div(log_p, log_q, reduction="none", log_target=True)
            whole = {"log_target": True, "target": log_q}
        elif self.terms == "kl_div":
            q = log_q.exp() if self.reference != "softmax().log()" else self._softmax(y)
            terms = F.kl_div(log_p, q, reduction="none")
            whole = {"target": q}
        elif self.terms == "sum q (log q - log p)":
            terms, whole = log_q.exp() * (log_q - log_p), {}
        else:
            terms, whole = torch.exp(log_p) * (log_p - log_q), {}
        loss = self._reduce(terms, log_p, whole, mask)
        return loss * T**2 if self.temperature == "before, T**2 after" else loss

    def _reduce(self, terms: Tensor, log_p: Tensor, whole: dict[str, Any], mask: Tensor) -> Tensor:
        if self.reduction == "none, sum(-1)":
            return terms.sum(-1)
        if self.reduction == "masked mean":
            return (terms.sum(dim=-1) * mask).sum() / mask.sum()
        if whole:
            return F.kl_div(log_p, reduction=self.reduction, **whole)
        if self.reduction == "sum":
            return terms.sum()
        if self.reduction == "mean":
            return terms.mean()
        return terms.sum() / terms.size(0)

    def _logits(self, x: Tensor) -> Tensor:
        x = x.float() if self.cast == ".float()" and x.dtype != torch.float64 else x
        return x if self.temperature == "none" else x / T

    def _softmax(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(torch.float32, x.dtype) if self.cast == "dtype=" else None
        return F.softmax(self._logits(x), dim=-1, dtype=dtype)

    def _log_softmax(self, x: Tensor, form: str) -> Tensor:
        dtype = torch.promote_types(torch.float32, x.dtype) if self.cast == "dtype=" else None
        if form == "softmax().log()":
            return self._softmax(x).log()
        if form == "x - logsumexp":
            z = self._logits(x)
            z = z if dtype is None else z.to(dtype)
            return z - torch.logsumexp(z, dim=-1, keepdim=True)
        return F.log_softmax(self._logits(x), dim=-1, dtype=dtype)


def product() -> Iterator[Written]:
    """All of them."""
    for parts in itertools.product(FORMS, FORMS, CASTS, TEMPERATURES, TERMS, REDUCTIONS, DTYPES):
        yield Written(*parts)


def gradients(
    function: Callable[..., Tensor], *inputs: Tensor
) -> tuple[Tensor, list[Tensor | None]]:
    """The value, and the gradients to the floating-point inputs that require one."""
    leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
    value = function(*leaves)
    value.sum().backward()
    return value.detach(), [t.grad for t in leaves]


def compiled(
    function: Callable[..., Tensor], seen: Callable[[torch.fx.Graph], object] = id, **options: Any
) -> Callable[..., Tensor]:
    """torch.compile by a compiler that is nothing but the pass; `seen` gets the graphs it makes."""

    def rewriting(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        rewrite(graph.graph)
        graph.graph.lint()
        graph.recompile()
        seen(graph.graph)
        return graph

    result: Callable[..., Tensor] = torch.compile(
        function, fullgraph=True, backend=rewriting, **options
    )
    return result


def inputs(dtype: torch.dtype = torch.float32, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    x, y = torch.randn(2, *(shape or (N, V))).to(dtype)
    mask = torch.arange(x.shape[:-1].numel()).reshape(x.shape[:-1]) % 3 != 1
    return x.clone().requires_grad_(), y.clone(), mask
