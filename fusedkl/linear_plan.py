"""Tile sizes of a fused lm_head: the one place where they are chosen."""

from __future__ import annotations

from typing import NamedTuple

# On a CPU a pair of float32 tiles of these sizes, and the widened operands of one product, stay
# within a second- or third-level cache; narrower tiles would make the products slower, and the
# widening of an operand, which is repeated for every tile of the other side, dearer.
_CPU = 1024
# On a GPU a product must be large enough to fill it: a pair of float32 tiles is 128 MiB.
_GPU_TOKENS, _GPU_VOCABULARY = 2048, 8192


class Tiles(NamedTuple):
    """Tokens and vocabulary entries of one tile of logits."""

    tokens: int
    vocabulary: int


def tiles(tokens: int, vocabulary: int, device: str, tile: tuple[int, int] | None = None) -> Tiles:
    """The tile for `tokens` x `vocabulary` logits on a type of device; `tile` sets it by hand."""
    if tile is not None:
        largest = Tiles(*tile)
    elif device == "cpu":
        largest = Tiles(_CPU, _CPU)
    else:
        largest = Tiles(_GPU_TOKENS, _GPU_VOCABULARY)
    return Tiles(_even(tokens, largest.tokens), _even(vocabulary, largest.vocabulary))


def _even(length: int, largest: int) -> int:
    """The size of the fewest parts of at most `largest`, all of about one size, by eights."""
    parts = max(1, -(-length // largest))
    size = -(-length // parts)
    return max(1, min(largest, -(-size // 8) * 8))
