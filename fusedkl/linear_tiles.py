"""The schedule of a fused lm_head: tiles of tokens x vocabulary, the vocabulary outermost.

Forward: a tile's logits, one row kernel over them, whose state of each token is merged into the
token's running state; the tile is overwritten by the next. What takes a second sweep makes the
tiles again, and sums given that state; where ranks hold slices of the vocabulary, theirs are merged
in between. Backward: the tiles again, a row kernel that turns them into gradients given the state
of the whole row, and two products that add them up: d hidden over all tiles, d weight tile by tile,
each finished and rounded before the next begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import reference
from .linear_plan import Tiles, tiles
from .linear_products import Products, tile_dtype
from .linear_topk import Apart, outcomes, put_back, take_out
from .sliced_rows import local_fields, of_parts, put_sums, second_sweep, token_logits, token_sides

# States of so many tiles wait before they are merged.
_WAITING = 8
# Fields whose states are made sharper, and below which divergence of a tile: where the two errors
# cross, see docs/linear.md.
_PAIRED = {"forward_kl", "reverse_kl"}
_TINY = 1e-6


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

    def token_sides(self) -> tuple[str, ...]:
        """The sides of which logits of single tokens are needed: at token_ids, or apart."""
        return ("policy",) if self.apart is not None else token_sides(self.fields)

    def per_row(self) -> int:
        """How many tokens these are."""
        ids = self.token_ids if self.apart is None else self.apart
        return 0 if ids is None else ids.shape[1]

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
        self,
        policy: Side,
        other: Side | None,
        fast: bool,
        tile: tuple[int, int] | None,
        read: int | None = None,  # by the forward, if the tokens are fewer now
    ) -> None:
        assert policy.hidden is not None and policy.weight is not None
        self.policy, self.other = policy, other
        self.tokens, self.vocabulary = policy.hidden.shape[0], policy.weight.shape[0]
        device = policy.hidden.device.type
        size = tile_dtype(policy.hidden.dtype, device, fast).itemsize
        # The columns of the forward: where a tile had whole rows, the state says so, and a kernel
        # that is given a part takes its mean for the row's.
        read = self.tokens if read is None else read
        self.tile: Tiles = tiles(read, self.vocabulary, size, device, tile)
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
        room = products.room(f"{name} absent", out.shape[0], out.shape[1], torch.bool)
        absent = torch.eq(out, -torch.inf, out=room)
        out.div_(side.softcap).tanh_().mul_(side.softcap).masked_fill_(absent, -torch.inf)
    return out


def _sharpen(x: Tensor, y: Tensor, state: Tensor, inverse: Tensor | None) -> None:
    """A tile's state, in place, as right as the gradients of a tiny divergence need it.

    In a row that is one token but for the rounding of a sum, log(p/q) of that token is a rest. What
    the rest of a mean adds to the divergence is known better there; where the divergence is larger
    it is not, and most tiles are not read again.
    """
    tiny = state[:, reference.STATE.index("forward_kl")] < _TINY
    torch.ops.fusedkl._sharpen_states(x, y, state, False, False, inverse, tiny, None)


class Sweep:
    """What a sweep over the tiles finds of one question: states, and logits of single tokens."""

    def __init__(self, asked: Rows, engine: Engine) -> None:
        self.asked = asked
        inner, device = reference.inside(engine.products.device), engine.products.device
        width, n = len(reference.STATE), engine.tokens
        self._parts = torch.empty(1 + _WAITING, n, width, dtype=inner, device=device)
        self._waiting = 0
        self._fields = local_fields(asked.fields)
        # [K, n], before the temperature
        self.tokens = {
            side: torch.zeros(asked.per_row(), n, dtype=inner, device=device)
            for side in asked.token_sides()
        }
        ids = asked.token_ids if asked.apart is None else asked.apart
        if ids is not None:  # -1 is elsewhere; no token, where nobody has looked
            ids = ids.t()
            nowhere = (ids < -1) | (ids >= engine.vocabulary)
            for logits in self.tokens.values():
                logits.masked_fill_(nowhere, torch.nan)

    def take(self, x: Tensor, y: Tensor | None, tokens: slice, columns: slice) -> None:
        """A tile of logits."""
        asked = self.asked
        ids, inverse = asked.part(tokens, columns)
        apart = asked.take_out(x, tokens, columns)
        _, state = torch.ops.fusedkl.row_stats(
            x, y if asked.paired else None, None, self._fields, None, inverse, None, None, None,
            asked.backend,
        )  # fmt: skip
        if asked.backend == "cpu" and y is not None and _PAIRED & set(self._fields):
            _sharpen(x, y, state, inverse)
        self._parts[self._waiting, tokens] = state
        if apart is not None:
            self.tokens["policy"][:, tokens] += apart.numbers()
            put_back(x, apart)
            return
        for side, logits in self.tokens.items():
            tile = x if side == "policy" else y
            assert tile is not None and ids is not None
            logits[:, tokens] += token_logits(tile, ids).t()

    def end(self) -> None:
        """The tile's tokens are all there."""
        self._waiting += 1
        if self._waiting > _WAITING:
            self._parts[0] = self.state()
            self._waiting = 1

    def state(self) -> Tensor:
        """[n, S], of all tiles together."""
        asked, parts = self.asked, self._parts[: self._waiting]
        out: Tensor = torch.ops.fusedkl.merge_states(parts, [], asked.inverse, asked.backend)[1]
        return out

    def result(self) -> tuple[Tensor, Tensor]:
        """Values [R, n] and state [n, S] of whole rows, without a second sweep."""
        asked = self.asked
        if asked.apart is not None:
            state = self.state()
            return outcomes(self.tokens["policy"], state, asked.inverse), state
        parts = self._parts[: self._waiting]
        return of_parts(parts, self.tokens, asked.fields, asked.inverse, asked.backend)


def first_sweep(
    engine: Engine,
    asked: list[Rows],
    watch: Callable[[Tensor, slice, slice], None] | None = None,
) -> list[Sweep]:
    """Over tiles of the whole vocabulary or of a slice. `watch`: see `forward`."""
    found = [Sweep(one, engine) for one in asked]
    for columns in engine.columns():
        for tokens in engine.blocks():
            x, y = engine.logits(tokens, columns)
            if watch is not None:
                watch(x, tokens, columns)
            for one in found:
                one.take(x, y, tokens, columns)
        for one in found:
            one.end()
    return found


def sums(engine: Engine, asked: Rows, state: Tensor) -> Tensor:
    """[n, 3] of the second sweep, given the state of the whole rows."""
    name = second_sweep(asked.fields)
    assert name is not None
    out = torch.zeros(engine.tokens, 3, dtype=state.dtype, device=state.device)
    for columns in engine.columns():
        for tokens in engine.blocks():
            x, y = engine.logits(tokens, columns)
            _, inverse = asked.part(tokens, columns)
            out[tokens] += torch.ops.fusedkl.row_sums(
                x, y, state[tokens], name, asked.parameter, inverse, None, None, None,
                asked.backend,
            )  # fmt: skip
    return out


def forward(
    engine: Engine,
    asked: list[Rows],
    watch: Callable[[Tensor, slice, slice], None] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Values [R, n] and state [n, S] of each question, in the state's dtype.

    `watch` is called with each tile of the policy's logits, its tokens and its columns.
    """
    found = []
    for one in first_sweep(engine, asked, watch):
        values, state = one.result()
        rows = one.asked
        if second_sweep(rows.fields):
            more = sums(engine, rows, state)
            state = put_sums(values, state, more, rows.fields, rows.parameter)
        found.append((values, state))
    return found
