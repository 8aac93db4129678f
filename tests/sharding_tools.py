"""What the ranks of tests/test_sharding.py share: cuts of a vocabulary, comparisons, traffic."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import oracle
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fusedkl
from fusedkl import reference

Case = Callable[[dist.ProcessGroup], dict[str, Any] | None]
CASES: dict[str, Case] = {}
KINDS = ("forward_kl", "reverse_kl", "jeffreys")
SECOND_SWEEP: dict[str, dict[str, float]] = {
    "jsd": {"beta": 0.3},
    "skew_kl": {},
    "tvd": {},
    "hellinger": {},
    "renyi": {"alpha": 0.7},
}
EVERY_KIND: dict[str, dict[str, float]] = {**{kind: {} for kind in KINDS}, **SECOND_SWEEP}


# Relative L2 of the whole row's gradient, and relative error of values.
GRADIENT = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float64: 1e-8}
VALUE = {torch.float32: 3e-6, torch.bfloat16: 3e-6, torch.float64: 1e-9}
SMALLEST = {torch.bfloat16: 1e-10}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def cut(group: dist.ProcessGroup, total: int, way: int) -> slice:
    """This rank's part of `total` entries: growing parts; the first empty; the last empty."""
    ranks = group.size()
    rest = total // (ranks - 1)
    sizes = [
        [7 * (r + 1) for r in range(ranks - 1)],
        [0, *[11] * (ranks - 2)],
        [*[rest] * (ranks - 2), total - rest * (ranks - 2)],
    ][way % 3]
    begin = sum(sizes[: group.rank()])
    return slice(begin, begin + [*sizes, total - sum(sizes)][group.rank()])


def leaf(t: Tensor, part: slice) -> Tensor:
    return t[..., part].clone().requires_grad_()


def grad_error(leaf_: Tensor, expected: Tensor, part: slice) -> float:
    """Of a slice, relative to the whole row's gradient; where that is NaN, both must be."""
    assert leaf_.grad is not None and leaf_.grad.dtype == leaf_.dtype
    ours, theirs = leaf_.grad.double(), expected.double()[..., part]
    if theirs.isnan().any():
        assert torch.equal(ours.isnan(), theirs.isnan())
    error = (ours - theirs).nan_to_num(0, math.inf).norm(dim=-1)
    # a peaked row's entropy has gradients that no 16-bit number holds
    size = expected.double().nan_to_num(0).norm(dim=-1).clamp(min=SMALLEST.get(leaf_.dtype, 0))
    relative = torch.where(error == 0, 0.0, error / size)
    return float(relative.nan_to_num(math.inf).max()) if relative.numel() else 0.0


def whole_rows(
    x: Tensor, y: Tensor | None, kind: str, temperature: float = 1.0
) -> tuple[Tensor, list[Tensor]]:
    """Values of the whole rows in float64 and, of their sum, the gradients: by autograd."""
    leaves = [t.double().requires_grad_() for t in (x, y) if t is not None]
    fields = ("forward_kl", "reverse_kl") if kind == "jeffreys" else (kind,)
    inverse = torch.tensor([1 / temperature], dtype=torch.float64)
    other = leaves[1] if y is not None else None
    values, _ = reference.rows(leaves[0], other, None, fields, None, inverse, None, None, None)
    return values.sum(0).detach(), list(torch.autograd.grad(values.sum(), leaves))


def true_numbers(
    pair: tuple[Tensor, Tensor], kind: str, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    """Values of whole rows and gradients of their sum, in float64 by plain torch and autograd."""
    leaves = [t.double().requires_grad_() for t in pair]
    values = fusedkl.divergence(leaves[0], leaves[1], kind, backend="reference", **options)
    return values.detach(), list(torch.autograd.grad(values.sum(), leaves))


def errors(
    group: dist.ProcessGroup,
    pair: tuple[Tensor, Tensor],
    part: slice,
    truth: tuple[Tensor, list[Tensor]],
    kind: str,
    **options: Any,
) -> list[float]:
    """Of the values over the group, and of both gradients of its slice, relative."""
    mine = [leaf(t, part) for t in pair]
    value = fusedkl.divergence(mine[0], mine[1], kind, group=group, **options)
    value.sum().backward()
    found = [oracle.relative_error(value, truth[0])]
    return found + [grad_error(t, true, part) for t, true in zip(mine, truth[1], strict=True)]


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> None:
    error = oracle.relative_error(actual, expected.detach())
    assert error <= VALUE[dtype], f"{what}: value off by {error}"


def same_everywhere(t: Tensor, group: dist.ProcessGroup) -> None:
    """The same bits on every rank."""
    others = [torch.empty_like(t) for _ in range(group.size())]
    dist.all_gather(others, t.detach().contiguous(), group=group)
    assert all(torch.equal(o.nan_to_num(7.5), t.detach().nan_to_num(7.5)) for o in others)


COLLECTIVES = (
    "all_gather_into_tensor",
    "all_reduce",
    "all_to_all_single",
    "broadcast",
    "reduce_scatter_tensor",
)


class Traffic(TorchDispatchMode):
    """The collectives that are run, and the bytes this rank sends with them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "_c10d_functional" and func._opname in COLLECTIVES:
            self.calls.append((func._opname, args[0].numel() * args[0].element_size()))
        return func(*args, **(kwargs or {}))
