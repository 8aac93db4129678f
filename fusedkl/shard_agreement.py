"""Whether the ranks of a group make the same call, and how the vocabulary is cut between them.

Asked once per group and kind of call, over the group's key-value store: host to host, no device, no
collective, because a collective whose ranks disagree ends in a hang, a crash or wrong numbers.
"""

from __future__ import annotations

import json
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

_Call = tuple[tuple[str, Any], ...]  # names and constants


@dataclass
class _Record:
    """What is known of one group."""

    asked: int = 0  # exchanges so far: the number of the next one
    answers: dict[Any, tuple[int, ...]] = field(default_factory=dict)


_known: weakref.WeakKeyDictionary[Any, _Record] = weakref.WeakKeyDictionary()


def _group(group_name: str) -> Any:
    resolve: Any = c10d._resolve_process_group
    return resolve(group_name)


def _key(number: int, rank: int) -> str:
    return f"fusedkl/{number}/{rank}"


def _said(values: list[Any]) -> str:
    """rank 0 has 3, ranks 1, 2 have 4"""
    holders: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        holders.setdefault(str(value), []).append(rank)
    return ", ".join(
        f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} "
        f"{'have' if len(ranks) > 1 else 'has'} {value}"
        for value, ranks in holders.items()
    )


def _compare(posts: list[dict[str, Any]]) -> None:
    """A ValueError that names each thing in which the posts differ."""
    names = [name for name in posts[0] if name != "vocabulary"]
    differ = [name for name in names if len({str(post.get(name)) for post in posts}) > 1]
    if differ:
        said = "; ".join(f"{name}: {_said([post.get(name) for post in posts])}" for name in differ)
        raise ValueError(f"the ranks of the group disagree in {said}")


def _ask(group_name: str, vocabulary: int, rows: int | None, call: _Call) -> tuple[int, ...]:
    group = _group(group_name)
    record = _known.setdefault(group, _Record())
    question = vocabulary, rows, call
    if question not in record.answers:
        record.answers[question] = _exchange(group, record, *question)
    return record.answers[question]


def _exchange(
    group: Any, record: _Record, vocabulary: int, rows: int | None, call: _Call
) -> tuple[int, ...]:
    store: Any = c10d._get_process_group_store(group)
    me = group.rank()
    number, record.asked = record.asked, record.asked + 1
    mine = json.dumps({"vocabulary": vocabulary, "rows": rows, **{k: str(v) for k, v in call}})
    store.set(_key(number, me), mine)
    posts = []
    for rank in range(group.size()):
        try:
            posts.append(json.loads(store.get(_key(number, rank))))
        except (dist.DistStoreError, RuntimeError) as error:
            raise RuntimeError(
                f"rank {rank} of the group did not come to this call, or came to another one, "
                f"within {store.timeout}; this rank, {me}, has {mine}"
            ) from error
    if number > 0:  # whoever posted here has read all of the question before
        store.delete_key(_key(number - 1, me))
    _compare(posts)
    return tuple(int(post["vocabulary"]) for post in posts)


# torch.compile: asked while the graph is made; the sizes are constants of it.
def _traced(group_name: str, vocabulary: int, **call: Any) -> tuple[int, ...]:
    return _ask(group_name, vocabulary, None, tuple(call.items()))


# What torch.compiler.assume_constant_result does, which imports the whole compiler for it.
_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]


def sizes(group_name: str, vocabulary: int, rows: int, call: _Call) -> tuple[int, ...]:
    """Vocabulary entries of every rank, in the order of ranks.

    Raises:
        ValueError: on every rank, if they differ in `rows` or in an item of `call`.
        RuntimeError: a rank did not come within the timeout of the group's store.
    """
    if torch.compiler.is_compiling():  # rows may be symbolic there
        return _traced(group_name, vocabulary, **dict(call))
    return _ask(group_name, vocabulary, rows, call)


def why(group_name: str, error: Exception) -> Exception:
    """Of a collective: a ValueError where another rank turns out to have made another call."""
    group = _group(group_name)
    record, store = _known.get(group), c10d._get_process_group_store(group)
    if record is None:
        return error
    for rank in range(group.size()):
        try:
            if rank != group.rank() and store.check([_key(record.asked, rank)]):
                theirs = store.get(_key(record.asked, rank)).decode()
                return ValueError(
                    f"the ranks of the group disagree: rank {rank} came to another call, {theirs}"
                )
        except (dist.DistStoreError, RuntimeError):
            return error
    return error
