"""Whether the ranks of a group make the same call, and how the vocabulary is cut between them.

Asked once per group and kind of call, over the group's key-value store: host to host, no device, no
collective, because a collective whose ranks disagree ends in a hang, a crash or wrong numbers.

A vocabulary may be cut anew for a call that is known, and only some ranks may see that: their
slices have another size. Nobody asks then, for the others would not come. A rank goes by the cut it
believes in, which no collective depends on; a call whose numbers do depend on it sends what it
believes along (distributed.py), and all ranks alike find out that they differ, and ask again.
"""

from __future__ import annotations

import json
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

# Numbers of rows whose answers are kept, over all kinds of calls; not of graphs, some ranks of
# which may be compiled again without the others.
_REMEMBERED = 1024

_Call = tuple[tuple[str, str], ...]  # names and what is said of them


@dataclass
class _Record:
    """What is known of one group."""

    asked: int = 0  # exchanges so far: the number of the next one
    # (rows or graph, call) -> size of this rank's slice -> sizes of all slices, the newest last
    answers: dict[Any, dict[int, tuple[int, ...]]] = field(default_factory=dict)


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


def _ask(group_name: str, vocabulary: int, rows: int | str, call: _Call) -> tuple[int, ...]:
    group = _group(group_name)
    cuts = _known.setdefault(group, _Record()).answers.get((rows, call))
    if not cuts:
        return _exchange(group, vocabulary, rows, call)
    if vocabulary in cuts:
        return cuts[vocabulary]
    believed = list(list(cuts.values())[-1])
    believed[group.rank()] = vocabulary
    return tuple(believed)


def _exchange(group: Any, vocabulary: int, rows: int | str, call: _Call) -> tuple[int, ...]:
    record = _known[group]
    store: Any = c10d._get_process_group_store(group)
    me = group.rank()
    number, record.asked = record.asked, record.asked + 1
    compared = {"rows": rows} if isinstance(rows, int) else {}
    mine = json.dumps({"vocabulary": vocabulary, **compared, **dict(call)})
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
    found = tuple(int(post["vocabulary"]) for post in posts)
    valid = dict(call).get("valid_vocab", "None")
    if not 1 <= (sum(found) if valid == "None" else int(valid)) <= sum(found):
        raise ValueError(
            f"the group's vocabulary must have at least 1 entry, and valid_vocab be from 1 to "
            f"{sum(found)}; got {valid}"
        )
    cuts = record.answers.setdefault((rows, call), {})
    cuts.pop(vocabulary, None)
    cuts[vocabulary] = found
    # By the order of exchanges, which all ranks made: all forget the same, and ask again together.
    eager = [key for key in record.answers if isinstance(key[0], int)]
    for key in eager[:-_REMEMBERED]:
        del record.answers[key]
    return found


# torch.compile: asked while the graph is made; the sizes are constants of it. All ranks compile a
# function when it is first called, and then it is asked. Compiled again, it may be by some only.
def _traced(group_name: str, vocabulary: int, **call: Any) -> tuple[int, ...]:
    made = torch._guards.CompileContext.current_compile_id()
    graph = f"graph {made.frame_id if made else None}"
    return _ask(group_name, vocabulary, graph, tuple(call.items()))


# What torch.compiler.assume_constant_result does, which imports the whole compiler for it.
_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]


def sizes(group_name: str, vocabulary: int, rows: int, call: _Call) -> tuple[int, ...]:
    """Vocabulary entries of every rank, in the order of ranks; as believed where asked before.

    Raises:
        ValueError: on every rank, if they differ in `rows` or in an item of `call`, or if
            valid_vocab, an item of it, does not fit.
        RuntimeError: a rank did not come within the timeout of the group's store.
    """
    if torch.compiler.is_compiling():  # rows may be symbolic there
        return _traced(group_name, vocabulary, **dict(call))
    return _ask(group_name, vocabulary, rows, call)


def sizes_again(group_name: str, vocabulary: int, rows: int, call: _Call) -> tuple[int, ...]:
    """`sizes`, asked anew by all ranks: what they believed differs."""
    return _exchange(_group(group_name), vocabulary, rows, call)


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
