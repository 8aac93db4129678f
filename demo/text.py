"""The training text: Python's own documentation topics, cut into rows of tokens."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Encode = Callable[[str], Sequence[int]]


class Batch(NamedTuple):
    inputs: Tensor  # int64 [rows, length]
    labels: Tensor  # int64 [rows, length]: the token after each input


def topics() -> dict[str, str]:
    """Topic -> text, what `help("TOPIC")` prints; part of Python's standard library."""
    try:
        from pydoc_data.topics import topics as found
    except ImportError as error:
        raise RuntimeError(
            "the training text is Python's module pydoc_data.topics, which this Python lacks "
            "(some Linux distributions put it in a package of its own)"
        ) from error
    return dict(found)


def stream(texts: dict[str, str], encode: Encode, seed: int) -> Iterator[int]:
    """The tokens of all texts one after another, the texts in an order drawn from `seed`."""
    names = sorted(texts)
    random.Random(seed).shuffle(names)
    for name in names:
        yield from encode(texts[name])


def batches(
    texts: dict[str, str],
    encode: Encode,
    *,
    count: int,
    rows: int,
    length: int,
    seed: int,
    prefix: Sequence[int] = (),
) -> list[Batch]:
    """`count` batches of rows x length tokens; no token is used twice.

    A row starts with `prefix` (the token a model was trained to see first, where it has one).
    Tokenising stops when there are enough.
    """
    fresh = length + 1 - len(prefix)  # a row holds one token more than it has inputs
    if fresh < 1:
        raise ValueError(f"length must be at least {len(prefix)}, got {length}")
    tokens = stream(texts, encode, seed)
    cut: list[list[int]] = []
    for _ in range(count * rows):
        row = [*prefix, *itertools.islice(tokens, fresh)]
        if len(row) <= length:
            raise ValueError(
                f"the text is too short for {count} batches of {rows} x {length} tokens: "
                f"it fills {len(cut)} of {count * rows} rows"
            )
        cut.append(row)
    table = torch.tensor(cut, dtype=torch.int64).view(count, rows, length + 1)
    return [Batch(batch[:, :-1], batch[:, 1:]) for batch in table]
