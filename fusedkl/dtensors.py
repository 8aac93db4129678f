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

from . import autograd, reductions, validation

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement

# What is one per token, or K, by its name.
_PER_TOKEN = (
    "temperature", "mask", "weight", "labels", "index", "token_ids", "topk_ids", "topk_logprobs",
)  # fmt: skip


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
        """This rank's part of a tensor with numbers per token; a plain tensor is the whole."""
        from torch.distributed.tensor import DTensor

        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        if value.shape[: len(self.shape) - 1] != self.shape[:-1]:
            raise ValueError(
                f"{name} must have the leading dims of the logits, {list(self.shape[:-1])}; "
                f"got {list(value.shape)}"
            )
        if not isinstance(value, DTensor):
            value = DTensor.from_local(value, self.mesh, self.everywhere(), run_check=False)
        elif value.device_mesh != self.mesh:
            raise ValueError(
                f"{name} must be on the mesh of the logits, {self.mesh}; got {value.device_mesh}"
            )
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

    (name, first), *others = logits.items()
    if not isinstance(first, DTensor):
        other = next(other for other, t in others if isinstance(t, DTensor))
        raise TypeError(f"{name} must be a DTensor as {other} is; got {type(first).__name__}")
    layout = Layout(name, first)
    for other, t in others:
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
    function: Callable[..., Any], logits: dict[str, Tensor | None], **options: Any
) -> Any:
    """A function of rows that gives one number per token, or K; or a NamedTuple of such."""
    layout, local = _rows(logits, options)
    found = function(*local, **options)
    if isinstance(found, Tensor):
        return _one_each(layout, found)
    return type(found)(*(None if t is None else _one_each(layout, t) for t in found))


def _one_each(layout: Layout, local: Tensor) -> Tensor:
    return layout.wrapped(local, tuple(local.shape[len(layout.shape) - 1 :]))


def reduced(
    function: Callable[..., Any],
    logits: dict[str, Tensor | None],
    reduction: str,
    **options: Any,
) -> Any:
    """A function of rows with a `reduction`; it gives that, or that and numbers per token."""
    validation.reduction(reduction)
    layout, local = _rows(logits, options)
    here = "sum" if layout.tokens and reduction != "none" else reduction
    found = function(*local, reduction=here, **options)
    if isinstance(found, Tensor):
        return _over_ranks(layout, found, reduction, local[0], options)
    value, *tokens = found
    value = _over_ranks(layout, value, reduction, local[0], options)
    return type(found)(value, *(_one_each(layout, t) for t in tokens))


def _over_ranks(
    layout: Layout, value: Tensor, reduction: str, policy: Tensor, options: dict[str, Any]
) -> Tensor:
    """This rank's value, reduced as asked, or summed where ranks have tokens of their own."""
    if reduction == "none":
        return layout.wrapped(value)
    total = layout.scalar(value, True)
    if not layout.tokens or reduction == "sum":
        return total
    if reduction == "batchmean":
        return total / max(layout.shape[0], 1)
    return total / _count(layout, policy, options, value.dtype)


def _count(layout: Layout, policy: Tensor, options: dict[str, Any], dtype: torch.dtype) -> Any:
    """What "mean" divides by: known, or two numbers summed over the ranks: `reductions`."""
    mask, labels, weight = (options.get(name) for name in ("mask", "labels", "weight"))
    if mask is None and labels is None and weight is None:
        return max(layout.shape[:-1].numel(), 1)
    counted = reductions.counted_tokens(policy, mask, labels, options.get("ignore_index", -100))
    ones = policy.new_ones(policy.shape[:-1].numel(), dtype=dtype)
    if weight is not None:
        ones = weight.reshape(-1).to(dtype)
    if counted is not None:
        ones = torch.where(counted, ones, 0)
    mine = autograd.ordered_sum(ones, None, backend="reference")
    sums = torch.stack([mine, (ones != 0).sum().to(dtype)])
    sums = layout.scalar(sums, True).redistribute(layout.mesh, layout.everywhere())
    return torch.where(sums[1] == 0, 1, sums[0])
