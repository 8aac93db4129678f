"""Vocabularies sharded over a process group: local rows, one gather of their states. docs/sharding.md

Each rank holds a slice of every row. Forward: the slice's state, as if it were the whole row; one
all_gather of a few numbers a row; the chain rule over slices, by every rank alike. Backward: the
slice's gradient, given the state of the whole row; no communication. The result is the same on
every rank, and its gradient is taken once, as in Megatron: do not sum losses over the group.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import reference, shard_agreement, shard_states

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Shards(NamedTuple):
    """This rank's slice of a vocabulary, in plain numbers."""

    group_name: str
    ranks: int
    begin: int  # the vocabulary entry its first logit stands for
    size: int

    def holds(self, valid_vocab: int | None) -> int:
        """How many of the slice's logits exist; valid_vocab counts from the slice's first."""
        return self.size if valid_vocab is None else valid_vocab

    def local_vocabulary(self, valid_vocab: int | None) -> int | None:
        """valid_vocab of the whole vocabulary as that of this slice."""
        if valid_vocab is None:
            return None
        return min(max(valid_vocab - self.begin, 0), self.size)

    def local_ids(self, ids: Tensor) -> Tensor:
        """Ids of the whole vocabulary as those of this slice; -1 outside of it."""
        here = (ids >= self.begin) & (ids < self.begin + self.size)
        return torch.where(here, ids - self.begin, -1)


def shards(group: ProcessGroup | None, logits: Tensor, **call: Any) -> Shards | None:
    """This rank's place in the group, after all ranks were found to make the same call.

    None without a group. `call`: what must be the same on every rank.
    """
    if group is None:
        return None
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "group must be a torch.distributed.ProcessGroup that this process is a member of; "
            f"got {type(group).__name__}"
        )
    name, here = group.group_name, logits.shape[-1]
    # of a tensor only that it is one: its contents stay on the device
    said = {k: "a tensor" if isinstance(v, Tensor) else str(v) for k, v in call.items()}
    sizes = shard_agreement.sizes(name, here, math.prod(logits.shape[:-1]), said)
    return Shards(name, len(sizes), sum(sizes[: group.rank()]), here)


def gather(payload: Tensor, shards: Shards) -> Tensor:
    """[P, ...] of all ranks' payloads, in their order."""
    ranks, group_name = shards.ranks, shards.group_name
    # The functional collectives, which torch.compile traces.
    import torch.distributed._functional_collectives  # noqa: F401

    collectives = torch.ops._c10d_functional
    if torch.compiler.is_compiling():
        out = collectives.all_gather_into_tensor(payload, ranks, group_name)
        gathered: Tensor = collectives.wait_tensor(out)
    else:
        try:
            out = collectives.all_gather_into_tensor(payload, ranks, group_name)
            gathered = collectives.wait_tensor(out)
        except RuntimeError as error:
            raise shard_agreement.why(group_name, error) from error
    return gathered.view(ranks, *payload.shape)


def row_stats(
    policy: Tensor,
    reference_: Tensor | None,
    token_ids: Tensor | None,
    fields: tuple[str, ...],
    parameter: float | None,
    inv_temperature: Tensor | None,
    mask: Tensor | None,
    valid_vocab: int | None,
    softcap: float | None,
    shards: Shards,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Operator `row_stats` on rows of which this rank has a slice."""
    # whose accuracy the gradients need beyond that of the values
    asked = policy.requires_grad, reference_ is not None and reference_.requires_grad
    means = (asked[0] and "reverse_kl" in fields) or (asked[1] and "forward_kl" in fields)
    state = torch.ops.fusedkl.slice_state(
        policy, reference_, fields, inv_temperature, mask, valid_vocab, softcap, means, backend
    )
    dtype = reference.result_dtype(policy, reference_)
    return merged(state, [], fields, inv_temperature, mask, shards, dtype, backend)


def merged(
    state: Tensor,
    tokens: list[Tensor],
    fields: tuple[str, ...],
    inv_temperature: Tensor | None,
    mask: Tensor | None,
    shards: Shards,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Values [R, N] and state [N, S] of whole rows from the slices' states and token logits."""
    payload = shard_states.pack(state, tokens, fields, inv_temperature, dtype)
    gathered = gather(payload, shards)
    values, state = torch.ops.fusedkl.merge_shards(
        gathered, list(fields), inv_temperature, mask, backend
    )
    return values.to(dtype), state


def refuse(shards: Shards | None, what: str) -> None:
    """A RuntimeError where a group has no such thing."""
    if shards is not None:
        raise RuntimeError(f"{what} is not supported with group=, whose ranks each hold a slice")


def token_logits(logits: Tensor, ids: Tensor) -> Tensor:
    """[N, K]: logits [..., V] at ids [N, K]; 0 at ids of -1."""
    at = ids.view(*logits.shape[:-1], ids.shape[-1])
    if logits.shape[-1] == 0:
        return torch.zeros_like(at, dtype=logits.dtype).view(ids.shape)
    found = logits.gather(-1, at.clamp(min=0))
    return torch.where(at >= 0, found, 0).reshape(ids.shape)
