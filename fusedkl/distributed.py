"""Vocabularies sharded over a process group: local rows, one gather of states; docs/sharding.md.

Each rank holds a slice of every row. Forward: the slice's state, as if it were the whole row; one
all_gather of a few numbers a row; the chain rule over slices, by every rank alike. Backward: the
slice's gradient, given the state of the whole row; no communication. The result is the same on
every rank, and its gradient is taken once, as in Megatron: do not sum losses over the group.
"""

from __future__ import annotations

import math
import operator
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from . import reference, shard_agreement, shard_states
from .sliced_rows import local_fields, put_sums, second_sweep, token_logits, token_sides

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


_T = TypeVar("_T")
# One gather up to so many ranks; beyond, its buffer of ranks x rows would be the largest thing.
_GATHERED_BY = 8


class Shards(NamedTuple):
    """This rank's slice of a vocabulary, in plain numbers."""

    group_name: str
    ranks: int
    rank: int
    begin: int  # the vocabulary entry its first logit stands for
    size: int
    total: int  # entries of all ranks
    ids_name: str | None  # of the argument with token ids, if there is one
    # Of the cut that this rank goes by, if the call's numbers depend on that; docs/sharding.md.
    mark: int | None
    question: tuple[int, tuple[tuple[str, str], ...]] | None  # that the cut was the answer to

    def holds(self, valid_vocab: int | None) -> int:
        """How many of the slice's logits exist; valid_vocab counts from the slice's first."""
        return self.size if valid_vocab is None else valid_vocab

    def local_vocabulary(self, valid_vocab: int | None) -> int | None:
        """valid_vocab of the whole vocabulary as that of this slice."""
        if valid_vocab is None:
            return None
        return min(max(valid_vocab - self.begin, 0), self.size)

    def local_ids(self, ids: Tensor, valid_vocab: int | None = None) -> Tensor:
        """Ids [N, K] of the whole vocabulary, so much of it as exists, as those of this slice.

        -1 for those of other slices, -2 for those of none, where nobody looks at them: see
        `sliced_rows.token_logits`.
        """
        begin: int | Tensor = self.begin
        total: int | Tensor = self.total
        if not _looked_at(ids):  # nobody would notice that the cut is another one by now
            here = torch.full((1,), self.size, dtype=torch.int64, device=ids.device)
            sizes = _gather(here, self)
            begin, total = sizes[: self.rank].sum(), sizes.sum()
        known = (ids >= 0) & (ids < (total if valid_vocab is None else valid_vocab))
        held = known & (ids >= begin) & (ids < begin + self.size)
        return torch.where(held, ids - begin, torch.where(known, -1, -2))

    def check_ids(
        self, ids: Tensor, mask: Tensor | None = None, valid_vocab: int | None = None
    ) -> None:
        """A ValueError for ids outside of the vocabulary; on CPU. After the call: see `placed`."""
        if ids.numel() and _looked_at(ids):
            counted = ids if mask is None else ids[mask]
            low, high = (int(v) for v in counted.aminmax()) if counted.numel() else (0, 0)
            total = self.total if valid_vocab is None else valid_vocab
            if low < 0 or high >= total:
                low += low < 0  # as it was given: layout.of_no_slice
                raise ValueError(
                    f"{self.ids_name} must hold token ids of the whole vocabulary, from 0 to "
                    f"{total - 1}; got {low} to {high}"
                )

    def check_topk(self, ids: Tensor) -> None:
        """`check_ids` of K tokens a row [N, K], -1 for none; and whether there are as many."""
        if ids.shape[1] > self.total:
            raise ValueError(
                f"{self.ids_name} must hold from 1 to V = {self.total} tokens a row; "
                f"got {ids.shape[1]}"
            )
        self.check_ids(ids.clamp(min=0))


def _looked_at(t: Tensor) -> bool:
    """Whether the host may read t: eagerly, and in its own memory."""
    return t.device.type == "cpu" and not torch.compiler.is_compiling()


class CutAnew(Exception):
    """Raised on every rank alike: they believe in different cuts of the vocabulary."""


def shards(
    group: ProcessGroup | None,
    logits: Tensor,
    *,
    valid_vocab: int | None = None,
    ids_name: str | None = None,
    **call: Any,
) -> Shards | None:
    """This rank's place in the group, after all ranks were found to make the same call.

    None without a group. ids_name: the argument with token ids, if there is one. `call`: what else
    must be the same on every rank.
    """
    if group is None:
        return None
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "group must be a torch.distributed.ProcessGroup that this process is a member of; "
            f"got {type(group).__name__}"
        )
    name, here = group.group_name, operator.index(logits.shape[-1])
    call["valid_vocab"] = valid_vocab
    # Text is never symbolic. Of a tensor only that it is one: its contents stay on the device.
    said = tuple((k, "a tensor" if isinstance(v, Tensor) else f"{v}") for k, v in call.items())
    rows = math.prod(logits.shape[:-1])
    sizes = shard_agreement.sizes(name, here, rows, said)
    by_cut = valid_vocab is not None or (ids_name is not None and _looked_at(logits))
    # rows may be symbolic in a graph, and nothing asks again there
    question = None if torch.compiler.is_compiling() else (rows, said)
    begin = sum(sizes[: group.rank()])
    return Shards(
        name, len(sizes), group.rank(), begin, here, sum(sizes), ids_name,
        _mark(sizes) if by_cut else None, question,
    )  # fmt: skip


def _mark(sizes: tuple[int, ...]) -> int:
    return zlib.crc32(repr(sizes).encode())


_mark._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in shard_agreement.py


def placed(shards: Shards, run: Callable[[Shards], _T]) -> tuple[_T, Shards]:
    """run(shards), by the cut that all ranks agree on; and that one."""
    try:
        return run(shards), shards
    except CutAnew:
        assert shards.question is not None
        rows, call = shards.question
        sizes = shard_agreement.sizes_again(shards.group_name, shards.size, rows, call)
        begin = sum(sizes[: shards.rank])
        shards = shards._replace(begin=begin, total=sum(sizes), mark=_mark(sizes))
        return run(shards), shards


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


def _gather(payload: Tensor, shards: Shards) -> Tensor:
    """[P, ...] of all ranks' payloads, in their order."""
    ranks, name = shards.ranks, shards.group_name
    out = _finished(lambda: _collectives().all_gather_into_tensor(payload, ranks, name), shards)
    return out.view(ranks, *payload.shape)


def _exchange(parts: Tensor, shards: Shards) -> Tensor:
    """[P, ...]: of every rank its part for this one. parts [P, ...]: this rank's for all."""
    split = [parts.shape[0] // shards.ranks] * shards.ranks
    return _finished(
        lambda: _collectives().all_to_all_single(parts, split, split, shards.group_name), shards
    )


def _marked(parts: Tensor, shards: Shards) -> Tensor:
    """parts [P, n, C] with one more row each, which says by what cut they were made."""
    if shards.mark is None:
        return parts
    row = parts.new_zeros((parts.shape[0], 1, parts.shape[2]))
    row[..., 0] = shards.mark >> 16  # halves are numbers of any dtype that is sent
    row[..., 1] = shards.mark & 0xFFFF
    return torch.cat([parts, row], 1)


def _unmarked(parts: Tensor, shards: Shards) -> Tensor:
    """parts [P, n, C] of `_marked`, by one cut; else CutAnew, or NaN where that is not seen."""
    if shards.mark is None:
        return parts
    marks = parts[:, -1, :2]
    if _looked_at(parts):
        if not torch.equal(marks, marks[:1].expand_as(marks)):
            raise CutAnew
        return parts[:, :-1]
    return torch.where((marks == marks[:1]).all(), parts[:, :-1], torch.nan)


class Payload(NamedTuple):
    """What a rank says of its slice of some rows: numbers [N, C] of shard_states, and of what."""

    numbers: Tensor
    fields: tuple[str, ...] | list[str]
    inv_temperature: Tensor | None


def gather(payloads: list[Payload], shards: Shards, backend: str) -> list[Tensor]:
    """[P, N, C] of all ranks' payloads, each; or [1, N, C], of whole rows. All in one message.

    A gather's buffer is P times the payload. Where that is much, ranks first exchange rows, each
    merges its share of them, and what it made is gathered: two collectives, three payloads.
    """
    ranks = shards.ranks
    payload = torch.cat([p.numbers for p in payloads], -1)
    widths = [p.numbers.shape[1] for p in payloads]
    if ranks <= _GATHERED_BY:
        everything = _gather(_marked(payload[None], shards)[0], shards)
        return list(_unmarked(everything, shards).split(widths, -1))
    n, width = payload.shape
    share = (n + ranks - 1) // ranks
    parts = torch.nn.functional.pad(payload, (0, 0, 0, share * ranks - n))
    parts = _marked(parts.view(ranks, share, width), shards)
    mine = _unmarked(_exchange(parts, shards), shards).split(widths, -1)

    def of_share(inv_temperature: Tensor | None) -> Tensor | None:
        if inv_temperature is None or inv_temperature.shape[0] == 1:
            return inv_temperature
        begin = shards.rank * share
        padded = torch.nn.functional.pad(inv_temperature, (0, share * ranks - n), value=1.0)
        return padded[begin : begin + share]

    whole = [
        torch.ops.fusedkl.merge_payload(part, list(p.fields), of_share(p.inv_temperature), backend)
        for part, p in zip(mine, payloads, strict=True)
    ]
    merged = _gather(torch.cat(whole, -1), shards).view(1, ranks * share, width)[:, :n]
    return list(merged.split(widths, -1))


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
    second = second_sweep(fields)
    state = torch.ops.fusedkl.slice_state(
        policy, reference_, local_fields(fields), inv_temperature, mask, valid_vocab, softcap,
        means, second is not None, backend,
    )  # fmt: skip
    dtype = reference.result_dtype(policy, reference_)
    tokens = []
    if token_ids is not None:
        rows = {"policy": policy, "reference": reference_}
        wanted = (rows[side] for side in token_sides(fields))
        tokens = [token_logits(t, token_ids) for t in wanted if t is not None]
    payload = shard_states.pack(state, tokens, fields, inv_temperature, dtype)
    (gathered,) = gather([Payload(payload, fields, inv_temperature)], shards, backend)
    values, state = torch.ops.fusedkl.merge_shards(
        gathered, list(fields), inv_temperature, mask, softcap, backend
    )
    if second is not None:
        assert reference_ is not None
        sums = state.new_zeros((state.shape[0], 3))
        if shards.holds(valid_vocab) > 0:
            sums = torch.ops.fusedkl.row_sums(
                policy, reference_, state, second, parameter, inv_temperature, mask, valid_vocab,
                softcap, backend,
            )  # fmt: skip
        state = put_sums(values, state, total(sums, shards), fields, parameter)
        if mask is not None:
            values.masked_fill_(~mask, 0)
    return values.to(dtype), state


def refuse(shards: Shards | None, what: str) -> None:
    """A RuntimeError where a group has no such thing."""
    if shards is not None:
        raise RuntimeError(f"{what} is not supported with group=, whose ranks each hold a slice")
