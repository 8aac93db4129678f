"""What the tests of patch() share: logits, losses, and runs of both, plain and patched."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import kl_div as kl_div_bound
from torch.nn.functional import log_softmax as log_softmax_bound

import fusedkl
import fusedkl.deferred_kl as deferred_kl

N, V = 6, 3001
assert N * V >= deferred_kl.SMALLEST


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """Off where this is imported: results are compared with torch's, and memory is measured."""


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    yield
    assert "softmax" not in vars(torch.Tensor)


def logits(dtype: torch.dtype = torch.float32, *shape: int) -> tuple[Tensor, Tensor]:
    x, y = torch.randn(2, *(shape or (N, V))).to(dtype)
    return x.clone().requires_grad_(), y.clone()


def padded(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of a vocabulary whose last tokens neither row has."""
    a, b = (torch.cat((t.detach(), t.new_full((*t.shape[:-1], 7), -torch.inf)), -1) for t in (x, y))
    return a.requires_grad_(), b


class Calls:
    """How often the fused kernels ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fused = 0
        for name in ("_total", "_sources"):
            monkeypatch.setattr(deferred_kl, name, self.counted(getattr(deferred_kl, name), name))

    def counted(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.fused += name == "_sources"
            return function(*args)

        return call


def both(
    loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor
) -> list[tuple[Tensor, list[Tensor | None]]]:
    """(value, gradients) plain and patched."""
    results = []
    for patched in (False, True):
        leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in (x, y)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if patched:
                with fusedkl.patch():
                    value = loss(*leaves)
                    value.sum().backward()
            else:
                value = loss(*leaves)
                value.sum().backward()
        results.append((value.detach(), [t.grad for t in leaves]))
    return results


def agree(results: list[tuple[Tensor, list[Tensor | None]]], tolerance: float) -> None:
    (plain, plain_grads), (patched, patched_grads) = results
    assert patched.dtype == plain.dtype and patched.shape == plain.shape
    torch.testing.assert_close(patched, plain, rtol=tolerance, atol=0)
    for a, b in zip(plain_grads, patched_grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a.dtype == b.dtype
            assert (a - b).norm() <= tolerance * a.norm()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "batchmean": lambda x, y: F.kl_div(
        F.log_softmax(x, -1), F.softmax(y, -1), reduction="batchmean"
    ),
    "temperature": lambda x, y: (
        F.kl_div(F.log_softmax(x / 3, -1), F.softmax(y / 3, -1), reduction="batchmean") * 3**2
    ),
    "mean": lambda x, y: F.kl_div(F.log_softmax(x, -1), F.log_softmax(y, -1), log_target=True),
    "sum": lambda x, y: F.kl_div(x.log_softmax(-1), y.softmax(1), reduction="sum"),
    "reverse": lambda x, y: F.kl_div(
        torch.log_softmax(y, -1), x.log_softmax(dim=-1), log_target=True, reduction="sum"
    ),
    "rows": lambda x, y: F.kl_div(F.log_softmax(x, -1), torch.softmax(y, -1), reduction="none").sum(
        -1
    ),
    "rows kept": lambda x, y: F.kl_div(
        F.log_softmax(x, -1), F.softmax(y, -1), reduction="none"
    ).sum(dim=1, keepdim=True),
    "torch.sum": lambda x, y: torch.sum(
        F.kl_div(F.log_softmax(x, -1), F.softmax(y, -1), reduction="none")
    ),
    "modules": lambda x, y: torch.nn.KLDivLoss(reduction="batchmean", log_target=True)(
        torch.nn.LogSoftmax(-1)(x), torch.nn.LogSoftmax(dim=1)(y)
    ),
    "bound earlier": lambda x, y: kl_div_bound(
        log_softmax_bound(x, -1), F.softmax(y, -1), reduction="batchmean"
    ),
    "dtype": lambda x, y: F.kl_div(
        F.log_softmax(x, -1, dtype=torch.float32),
        F.softmax(y, dim=-1, dtype=torch.float32),
        reduction="batchmean",
    ),
}
