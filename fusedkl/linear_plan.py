"""Tile sizes of a fused lm_head: the one place where they are chosen."""

from __future__ import annotations

from typing import NamedTuple

_MIB = 1 << 20


class _Limits(NamedTuple):
    tokens: int  # of a tile; more of them make better use of a weight that was loaded or widened
    vocabulary: int
    tiles: int  # bytes of the two tiles of logits
    widened: int  # bytes of a widened operand


# CPU: tiles and operands that the last-level cache holds beside each other. Rows of 1000 and more
# logits keep the fixed cost of a row small. GPU: products large enough to fill it.
_CPU = _Limits(512, 4096, 4 * _MIB, 4 * _MIB)
_GPU = _Limits(2048, 16384, 128 * _MIB, 64 * _MIB)
# The inner dimension is widened in pieces of at most so many columns.
_INNER = 1024


class Tiles(NamedTuple):
    """Tokens and vocabulary entries of a tile of logits, columns of a widened operand."""

    tokens: int
    vocabulary: int
    inner: int


def tiles(
    tokens: int,
    vocabulary: int,
    itemsize: int,
    device: str,
    tile: tuple[int, int] | None = None,
) -> Tiles:
    """The tile for `tokens` x `vocabulary` logits of `itemsize` bytes on a type of device.

    `tile` sets tokens and vocabulary by hand.
    """
    limits = _CPU if device == "cpu" else _GPU
    if tile is not None:
        rows, columns = min(tokens, tile[0]), min(vocabulary, tile[1])
    else:
        rows = _even(tokens, limits.tokens)
        columns = limits.tiles // (2 * itemsize * max(rows, 1))
        columns = _even(vocabulary, max(8, min(limits.vocabulary, columns)))
    inner = limits.widened // (4 * max(rows, columns, 1)) // 64 * 64
    return Tiles(max(rows, 1), max(columns, 1), max(64, min(_INNER, inner)))


def _even(length: int, largest: int) -> int:
    """The size of the fewest parts of at most `largest`, all of about one size, by eights."""
    parts = max(1, -(-length // largest))
    size = -(-length // parts)
    return min(largest, -(-size // 8) * 8)
