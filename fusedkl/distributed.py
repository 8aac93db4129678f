"""Vocabularies sharded over a process group: local rows, one gather of states; docs/sharding.md.

Each rank holds a slice of every row. Forward: the slice's state, as if it were the whole row; one
all_gather of a few numbers a row; the chain rule over slices, by every rank alike. Backward: the
slice's gradient, given the state of the whole row; no communication. The result is the same on
every rank, and its gradient is taken once, as in Megatron: do not sum losses over the group.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import divergences, reference, shard_agreement, shard_states

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Shards(NamedTuple):
    """This rank's slice of a vocabulary, in plain numbers."""

    group_name: str
    ranks: int
    begin: int  # the vocabulary entry its first logit stands for
    size: int
    total: int  # entries of all ranks

    def holds(self, valid_vocab: int | None) -> int:
        """How many of the slice's logits exist; valid_vocab counts from the slice's first."""
        return self.size if valid_vocab is None else valid_vocab

    def local_vocabulary(self, valid_vocab: int | None) -> int | None:
        """valid_vocab of the whole vocabulary as that of this slice."""
        if valid_vocab is None:
            return None
        return min(max(valid_vocab - self.begin, 0), self.size)

    def local_ids(self, ids: Tensor, name: str, mask: Tensor | None = None) -> Tensor:
        """Ids [N, K] of the whole vocabulary as those of this slice; -1 outside of it."""
        if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
            counted = ids if mask is None else ids[mask]
            low, high = (int(v) for v in counted.aminmax()) if counted.numel() else (0, 0)
            if low < 0 or high >= self.total:
                raise ValueError(
                    f"{name} must hold token ids of the whole vocabulary, from 0 to "
                    f"{self.total - 1}; got {low} to {high}"
                )
        return self.slice_ids(ids)

    def slice_ids(self, ids: Tensor) -> Tensor:
        """The same without a look at the ids."""
        here = (ids >= self.begin) & (ids < self.begin + self.size)
        return torch.where(here, ids - self.begin, -1)


def shards(
    group: ProcessGroup | None,
    logits: Tensor,
    *,
    valid_vocab: int | None = None,
    **call: Any,
) -> Shards | None:
    """This rank's place in the group, after all ranks were found to make the same call.

    None without a group. `call`: what else must be the same on every rank.
    """
    if group is None:
        return None
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "group must be a torch.distributed.ProcessGroup that this process is a member of; "
            f"got {type(group).__name__}"
        )
    name, here = group.group_name, len(range(logits.shape[-1]))  # never symbolic
    call["valid_vocab"] = valid_vocab
    # of a tensor only that it is one: its contents stay on the device
    said = tuple((k, "a tensor" if isinstance(v, Tensor) else v) for k, v in call.items())
    sizes = shard_agreement.sizes(name, here, math.prod(logits.shape[:-1]), said)
    found = Shards(name, len(sizes), sum(sizes[: group.rank()]), here, sum(sizes))
    if not 1 <= (found.total if valid_vocab is None else valid_vocab) <= found.total:
        raise ValueError(
            f"the group's vocabulary must have at least 1 entry, and valid_vocab be from 1 to "
            f"{found.total}; got {valid_vocab}"
        )
    return found


def _collectives() -> Any:
    """The functional ones, which torch.compile traces; the import registers their shapes."""
    import torch.distributed._functional_collectives

    return torch.ops._c10d_functional


def _finished(started: Callable[[], Tensor], shards: Shards) -> Tensor:
    wait = _collectives().wait_tensor
    if torch.compiler.is_compiling():
        done: Tensor = wait(started())
        return done
    try:
        done = wait(started())
    except RuntimeError as error:
        raise shard_agreement.why(shards.group_name, error) from error
    return done


def gather(payload: Tensor, shards: Shards) -> Tensor:
    """[P, ...] of all ranks' payloads, in their order."""
    ranks, name = shards.ranks, shards.group_name
    out = _finished(lambda: _collectives().all_gather_into_tensor(payload, ranks, name), shards)
    return out.view(ranks, *payload.shape)


def total(payload: Tensor, shards: Shards) -> Tensor:
    """The sum of all ranks' payloads."""
    return _finished(lambda: _collectives().all_reduce(payload, "sum", shards.group_name), shards)


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
    local = shard_states.local_fields(fields)
    state = torch.ops.fusedkl.slice_state(
        policy, reference_, local, inv_temperature, mask, valid_vocab, softcap, means, backend
    )
    dtype = reference.result_dtype(policy, reference_)
    tokens = []
    if token_ids is not None:
        rows = {"policy": policy, "reference": reference_}
        wanted = (rows[side] for side in shard_states.token_sides(fields))
        tokens = [token_logits(t, token_ids) for t in wanted if t is not None]
    payload = shard_states.pack(state, tokens, fields, inv_temperature, dtype)
    values, state = torch.ops.fusedkl.merge_shards(
        gather(payload, shards), list(fields), inv_temperature, mask, softcap, backend
    )
    for i, name in enumerate(fields):
        if divergences.FIELDS[name].second_sweep:
            assert reference_ is not None and not tokens
            sums = state.new_zeros((state.shape[0], 3))
            if shards.holds(valid_vocab) > 0:
                sums = torch.ops.fusedkl.row_sums(
                    policy, reference_, state, name, parameter, inv_temperature, mask,
                    valid_vocab, softcap, backend,
                )  # fmt: skip
            state = reference.with_sums(state, total(sums, shards), name, parameter)
            value = state[:, reference.STATE.index("divergence")]
            values[i] = value if mask is None else torch.where(mask, value, 0)
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
