"""The schedule of a fused lm_head: tiles of tokens x vocabulary, the vocabulary outermost.

Forward: a tile's logits, one row kernel over them, whose state of each token is merged into the
token's running state; the tile is overwritten by the next. Backward: the tiles again, a row kernel
that turns them into gradients given the state of the whole row, and two products that add them up:
d hidden over all tiles, d weight tile by tile, each finished and rounded before the next begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import divergences, reference, reference_family
from .linear_plan import Tiles, tiles
from .linear_products import Products, tile_dtype
from .linear_topk import Apart, put_back, take_out

# States of so many tiles wait before they are merged.
_WAITING = 8
_NORMALISER = {
    side: tuple(reference.STATE.index(name) for name in names)
    for side, names in {
        "policy": ("policy_max", "policy_log_sum"),
        "reference": ("reference_max", "reference_log_sum"),
        "both": ("centre", "residual"),
    }.items()
}


@dataclass(frozen=True)
class Side:
    """One row of logits per token: hidden [n, H] weight [V, H]^T + bias [V], or given as [n, V].

    They are multiplied by scale, then capped: c tanh(logits / c).
    """

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    given: Tensor | None = None
    live: Tensor | None = None  # int64 [n]: rows of a longer `given`; None: all of them, in order

    @property
    def operand(self) -> Tensor:
        """The weight, or the logits that are given."""
        held = self.weight if self.given is None else self.given
        assert held is not None
        return held

    def rows(self, index: Tensor) -> Side:
        """Of some of the tokens only."""
        hidden = None if self.hidden is None else self.hidden[index]
        return replace(self, hidden=hidden, given=None if self.given is None else self.given[index])


@dataclass(frozen=True)
class Rows:
    """What is asked of the rows: see operator row_stats."""

    fields: list[str]
    parameter: float | None
    token_ids: Tensor | None
    inverse: Tensor | None
    backend: str
    paired: bool  # about both sides
    apart: Tensor | None = None  # [n, K] outcomes of their own: not in the rows (linear_topk)

    def part(self, tokens: slice, columns: slice) -> tuple[Tensor | None, Tensor | None]:
        """token_ids, counted from the start of a tile and -1 outside of it, and 1/T."""
        ids, inverse = self.token_ids, self.inverse
        if ids is not None:
            ids = ids[tokens]
            inside = (ids >= columns.start) & (ids < columns.stop)
            ids = torch.where(inside, ids - columns.start, -1)
        if inverse is not None and inverse.shape[0] != 1:
            inverse = inverse[tokens]
        return ids, inverse

    def take_out(self, x: Tensor, tokens: slice, columns: slice) -> Apart | None:
        """The outcomes of their own, out of a tile; `put_back` puts them back."""
        return None if self.apart is None else take_out(x, self.apart[tokens], columns)


class Engine:
    """Tiles of the logits of both sides, and of their gradients."""

    def __init__(
        self, policy: Side, other: Side | None, fast: bool, tile: tuple[int, int] | None
    ) -> None:
        assert policy.hidden is not None and policy.weight is not None
        self.policy, self.other = policy, other
        self.tokens, self.vocabulary = policy.hidden.shape[0], policy.weight.shape[0]
        size = tile_dtype(policy.hidden.dtype, fast).itemsize
        device = policy.hidden.device.type
        self.tile: Tiles = tiles(self.tokens, self.vocabulary, size, device, tile)
        self.products = Products(policy.hidden, fast, self.tile.inner)
        self.of_other = self.products
        hidden = None if other is None else other.hidden
        if hidden is not None and hidden.dtype != policy.hidden.dtype:
            self.of_other = Products(hidden, fast, self.tile.inner)

    def columns(self) -> Iterator[slice]:
        """Tiles of the vocabulary."""
        for at in range(0, self.vocabulary, self.tile.vocabulary):
            yield slice(at, min(at + self.tile.vocabulary, self.vocabulary))

    def blocks(self) -> Iterator[slice]:
        """Tiles of the tokens."""
        for at in range(0, self.tokens, self.tile.tokens):
            yield slice(at, min(at + self.tile.tokens, self.tokens))

    def logits(self, tokens: slice, columns: slice) -> tuple[Tensor, Tensor | None]:
        """A tile of both sides; valid until the next one."""
        x = _logits(self.policy, self.products, "policy", tokens, columns)
        if self.other is None:
            return x, None
        return x, _logits(self.other, self.of_other, "reference", tokens, columns)


def _logits(side: Side, products: Products, name: str, tokens: slice, columns: slice) -> Tensor:
    if side.given is not None:
        out = side.given[:, columns]
        if side.live is None:
            out = out[tokens]
        else:
            live = side.live[tokens]
            room = products.room(f"{name} given", live.shape[0], out.shape[1], out.dtype)
            out = torch.index_select(out, 0, live, out=room)
        if side.scale == 1 and side.softcap is None:
            return out
        wide = reference.result_dtype(out, None)
        out = products.room(name, out.shape[0], out.shape[1], wide).copy_(out)
    else:
        assert side.hidden is not None and side.weight is not None
        hidden, weight = side.hidden[tokens], side.weight[columns]
        out = products.room(name, hidden.shape[0], weight.shape[0], products.tile)
        products.logits(out, hidden, weight)
        if side.bias is not None:
            out += side.bias[columns]
    if side.scale != 1:
        out *= side.scale
    if side.softcap is not None:
        # -inf, from a bias, is an absent token, not a logit of -softcap
        capped = torch.tanh(out / side.softcap) * side.softcap
        out.copy_(torch.where(out == -torch.inf, out, capped))
    return out


class _Running:
    """One question's numbers of all tokens, as the tiles of the vocabulary go by."""

    def __init__(self, asked: Rows, engine: Engine) -> None:
        self.asked = asked
        inner, device = reference.inside(engine.products.device), engine.products.device
        width, n = len(reference.STATE), engine.tokens
        self._parts = torch.empty(1 + _WAITING, n, width, dtype=inner, device=device)
        self._waiting = 0
        per_row = 0 if asked.token_ids is None else asked.token_ids.shape[1]
        rows = divergences.value_rows(asked.fields, per_row)
        self._values = torch.zeros(rows, n, dtype=inner, device=device)
        self._tokens: list[tuple[slice, slice, str]] = []  # of all values, of a tile's; side
        self._rows: list[tuple[str, int]] = []
        self.swept: tuple[str, int] | None = None  # a field of a second sweep
        self._sums = torch.zeros(n, 3, dtype=inner, device=device)
        self._first: list[str] = []
        at = of_tile = 0
        for name in asked.fields:
            field = divergences.FIELDS[name]
            size = divergences.value_rows([name], per_row)
            if field.second_sweep:
                self.swept = (name, at)
                at += 1
                continue
            if field.needs_token_ids:
                here = slice(at, at + size), slice(of_tile, of_tile + size)
                self._tokens.append((*here, field.side))
            else:
                self._rows.append((name, at))
            self._first.append(name)
            at, of_tile = at + size, of_tile + size
        if self.swept:  # which supports there are, for what is infinite
            self._first.append("forward_kl")
        # ids of no tile, where nobody could look at them: [K, n]
        self._nowhere: Tensor | None = None
        if asked.token_ids is not None:
            ids = asked.token_ids.t()
            self._nowhere = (ids < 0) | (ids >= engine.vocabulary)
        self._outcomes: Tensor | None = None
        if asked.apart is not None:
            shape = asked.apart.shape[1], n
            self._outcomes = torch.zeros(shape, dtype=inner, device=device)

    def take(self, x: Tensor, y: Tensor | None, tokens: slice, columns: slice) -> None:
        """A tile of logits."""
        asked = self.asked
        ids, inverse = asked.part(tokens, columns)
        apart = asked.take_out(x, tokens, columns)
        got, state = torch.ops.fusedkl.row_stats(
            x, y if asked.paired else None, ids, self._first, None, inverse, None, None, None,
            asked.backend,
        )  # fmt: skip
        self._parts[self._waiting, tokens] = state
        if apart is not None and self._outcomes is not None:
            self._outcomes[:, tokens] += apart.numbers(inverse)
            put_back(x, apart)
        for at, of_tile, side in self._tokens:
            assert ids is not None
            # relative to the tile: added up as logits, less the whole row's normaliser at the end
            absolute = got[of_tile] + _normaliser(state, side, inverse)
            self._values[at, tokens] += torch.where(ids.t() >= 0, absolute, 0)

    def take_again(
        self, x: Tensor, y: Tensor | None, state: Tensor, tokens: slice, columns: slice
    ) -> None:
        """The second sweep over a tile, given the state of the whole rows."""
        asked = self.asked
        assert self.swept is not None and y is not None
        _, inverse = asked.part(tokens, columns)
        self._sums[tokens] += torch.ops.fusedkl.row_sums(
            x, y, state[tokens], self.swept[0], asked.parameter, inverse, None, None, None,
            asked.backend,
        )  # fmt: skip

    def end(self) -> None:
        """The tile's tokens are all there."""
        self._waiting += 1
        if self._waiting > _WAITING:
            self._parts[0] = self._merged([])[1]
            self._waiting = 1

    def _merged(self, fields: list[str]) -> tuple[Tensor, Tensor]:
        parts, asked = self._parts[: self._waiting], self.asked
        out: tuple[Tensor, Tensor] = torch.ops.fusedkl.merge_states(
            parts, fields, asked.inverse, asked.backend
        )
        return out

    def result(self) -> tuple[Tensor, Tensor]:
        """Values [R, n] and state [n, S] of the whole rows."""
        names = [name for name, _ in self._rows]
        merged, state = self._merged([*names, "forward_kl"] if self.swept else names)
        for row, (_, at) in zip(merged, self._rows, strict=False):
            self._values[at] = row
        if self.swept:  # NaN where a row is no distribution
            self._values[self.swept[1]] = torch.where(merged[-1].isnan(), torch.nan, 0)
        for here, _, side in self._tokens:
            assert self._nowhere is not None
            values = self._values[here] - _normaliser(state, side, self.asked.inverse)
            self._values[here] = torch.where(self._nowhere, torch.nan, values)
        if self._outcomes is not None:  # from the state: -inf, not NaN, where nothing else is
            rest = _normaliser(state, "policy", self.asked.inverse)
            return torch.cat([self._outcomes, rest[None]]), state
        return self._values, state

    def end_again(self, values: Tensor, state: Tensor) -> None:
        """What the second sweep adds to a result."""
        assert self.swept is not None
        name, at = self.swept
        values[at] += reference_family.value_of_sums(name, self.asked.parameter, self._sums)
        found = values[at], self._sums[:, 1], self._sums[:, 2]
        for column, numbers in zip(
            ("divergence", "policy_slope", "reference_slope"), found, strict=True
        ):
            state[:, reference.STATE.index(column)] = numbers


def forward(
    engine: Engine,
    asked: list[Rows],
    watch: Callable[[Tensor, slice, slice], None] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Values [R, n] and state [n, S] of each question, in the state's dtype.

    `watch` is called with each tile of the policy's logits, its tokens and its columns.
    """
    running = [_Running(one, engine) for one in asked]
    for columns in engine.columns():
        for tokens in engine.blocks():
            x, y = engine.logits(tokens, columns)
            if watch is not None:
                watch(x, tokens, columns)
            for one in running:
                one.take(x, y, tokens, columns)
        for one in running:
            one.end()
    results = [one.result() for one in running]
    again = [pair for pair in zip(running, results, strict=True) if pair[0].swept]
    for columns in engine.columns() if again else ():
        for tokens in engine.blocks():
            x, y = engine.logits(tokens, columns)
            for one, (_, state) in again:
                one.take_again(x, y, state, tokens, columns)
    for one, result in again:
        one.end_again(*result)
    return results


def _normaliser(state: Tensor, side: str, inverse: Tensor | None) -> Tensor:
    """logsumexp of a side, or of both the log-ratio of theirs."""
    first, second = (state[:, i] for i in _NORMALISER[side])
    if side == "both" and inverse is not None:
        first = first * inverse
    return first + second
