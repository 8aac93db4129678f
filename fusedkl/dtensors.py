"""DTensor logits: the rank's own part, and the group that holds the rest of each row.

Mesh dims over which the vocabulary is sharded become a `group=`; those over which tokens are
sharded, or that replicate, need no communication: each rank does its own rows. docs/sharding.md
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import autograd, reductions

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement

# What is one per token, by its name.
_PER_TOKEN = ("temperature", "mask", "weight", "labels", "index", "token_ids")


def given(*values: Any) -> bool:
    """Whether there is a DTensor among them; does not import what defines it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(v, module.DTensor) for v in values)


class Layout:
    """How the rows of a DTensor [..., V] lie on its mesh."""

    def __init__(self, name: str, logits: DTensor) -> None:
        from torch.distributed.tensor import Replicate, Shard

        self.mesh, self.shape = logits.device_mesh, logits.shape
        last = len(self.shape) - 1
        self.placements: list[Placement] = []  # of what is one per token
        self.vocabulary: list[int] = []  # mesh dims
        self.tokens: list[int] = []
        for dim, placement in enumerate(logits.placements):
            if type(placement) is Shard and placement.dim % len(self.shape) == last:
                self.vocabulary.append(dim)
                self.placements.append(Replicate())
            elif type(placement) in (Shard, Replicate):
                if type(placement) is Shard:
                    self.tokens.append(dim)
                self.placements.append(placement)
            else:
                raise ValueError(
                    f"{name} must be a DTensor of placements Shard and Replicate; got "
                    f"{type(placement).__name__}"
                )
        if len(self.vocabulary) > 1:
            raise ValueError(
                f"{name} must have its vocabulary sharded over at most one mesh dim; got "
                f"{logits.placements}"
            )

    @property
    def group(self) -> Any:
        return self.mesh.get_group(self.vocabulary[0]) if self.vocabulary else None

    def everywhere(self) -> list[Placement]:
        from torch.distributed.tensor import Replicate

        return [Replicate()] * self.mesh.ndim

    def per_token(self, name: str, value: Any) -> Any:
        """This rank's part of a tensor with one number per token; a plain tensor is the whole."""
        from torch.distributed.tensor import DTensor

        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        if not isinstance(value, DTensor):
            if value.shape[: len(self.shape) - 1] != self.shape[:-1]:
                raise ValueError(
                    f"{name} must have shape logits.shape[:-1] = {list(self.shape[:-1])}; "
                    f"got {list(value.shape)}"
                )
            value = DTensor.from_local(value, self.mesh, self.everywhere(), run_check=False)
        return value.redistribute(self.mesh, self.placements).to_local()

    def wrapped(self, local: Tensor, tail: tuple[int, ...] = ()) -> Tensor:
        """Per-token numbers of this rank as a DTensor."""
        from torch.distributed.tensor import DTensor

        shape = torch.Size((*self.shape[:-1], *tail))
        stride = torch.empty(shape, device="meta").stride()
        out: Tensor = DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=shape, stride=stride
        )
        return out

    def scalar(self, local: Tensor, summed: bool) -> DTensor:
        """A scalar of this rank: the same on all, or to be summed over ranks of other tokens."""
        from torch.distributed.tensor import DTensor, Partial, Replicate

        placements: list[Placement] = [
            Partial("sum") if summed and dim in self.tokens else Replicate()
            for dim in range(self.mesh.ndim)
        ]
        out: DTensor = DTensor.from_local(local, self.mesh, placements, run_check=False)
        return out


def _rows(logits: dict[str, Tensor | None], options: dict[str, Any]) -> tuple[Layout, list[Any]]:
    """The layout, this rank's rows; per-token options become this rank's, and get the group."""
    from torch.distributed.tensor import DTensor

    (name, first), *_ = logits.items()
    if not isinstance(first, DTensor):
        raise TypeError(f"{name} must be a DTensor as the reference is; got {type(first).__name__}")
    layout = Layout(name, first)
    for other, t in logits.items():
        if t is None:
            continue
        if not isinstance(t, DTensor):
            raise TypeError(f"{other} must be a DTensor as {name} is; got {type(t).__name__}")
        if t.device_mesh != first.device_mesh or t.placements != first.placements:
            raise ValueError(
                f"{other} must lie as {name} does, {first.placements} on {first.device_mesh}; got "
                f"{t.placements} on {t.device_mesh}"
            )
    if options.get("group") is not None:
        raise ValueError("group has no effect on DTensors, whose mesh names the group")
    for key in _PER_TOKEN:
        if options.get(key) is not None:
            options[key] = layout.per_token(key, options[key])
    options["group"] = layout.group
    local = [t.to_local() if isinstance(t, DTensor) else None for t in logits.values()]
    return layout, local


def per_token(
    function: Callable[..., Tensor], logits: dict[str, Tensor | None], **options: Any
) -> Tensor:
    """A function of rows that gives one number per token, or K."""
    layout, local = _rows(logits, options)
    value = function(*local, **options)
    return layout.wrapped(value, tuple(value.shape[len(layout.shape) - 1 :]))


def divergence(
    function: Callable[..., Tensor],
    policy: Tensor,
    reference: Tensor,
    kind: str,
    reduction: str,
    **options: Any,
) -> Tensor:
    """`fusedkl.divergence` of DTensors."""
    logits = {"policy_logits": policy, "reference_logits": reference}
    layout, local = _rows(dict(logits), options)
    if reduction == "none":
        return layout.wrapped(function(*local, kind, reduction="none", **options))
    if not layout.tokens:
        return layout.scalar(function(*local, kind, reduction=reduction, **options), False)
    total = layout.scalar(function(*local, kind, reduction="sum", **options), True)
    if reduction == "sum":
        return total
    if reduction == "batchmean":
        return total / max(layout.shape[0], 1)
    return total / _count(layout, local[0], options)


def _count(layout: Layout, policy: Tensor, options: dict[str, Any]) -> Any:
    """What "mean" divides by: known, or one scalar summed over the ranks."""
    mask, labels, weight = (options.get(name) for name in ("mask", "labels", "weight"))
    if mask is None and labels is None and weight is None:
        return max(layout.shape[:-1].numel(), 1)
    counted = reductions.counted_tokens(policy, mask, labels, options["ignore_index"])
    ones = policy.new_ones(policy.shape[:-1].numel(), dtype=torch.float32)
    if weight is not None:
        ones = ones * weight.reshape(-1)
    if counted is not None:
        ones = torch.where(counted, ones, 0)
    mine = autograd.ordered_sum(ones, None, backend="reference")
    norm = layout.scalar(mine, True).redistribute(layout.mesh, layout.everywhere())
    return torch.where(norm == 0, 1, norm)
