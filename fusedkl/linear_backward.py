"""Backward of a fused lm_head: the tiles again, and the sums of their gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .linear_products import Products
from .linear_tiles import Engine, Rows, Side
from .linear_topk import add_gradient, put_back

OPS: Any = torch.ops.fusedkl


class Wanted(NamedTuple):
    """Which gradients of a side are asked for."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False
    given: bool = False


@dataclass
class Gradients:
    """What a backward adds up; None where it was not asked for."""

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    given: Tensor | None = None


class _Scale(NamedTuple):
    """Powers of two, 0-d: what float16 gradients of tiles are multiplied by, and its inverse."""

    up: Tensor
    down: Tensor


# The largest gradient that an upstream one may give becomes 2^8 to 2^9: a float16 tile holds 2^-14
# of 1 to 2^8 times 1 of it with all digits.
_LARGEST = 8
# Per upstream it is at most 1, but for the KL whose slopes by a side's logits are log-ratios less
# their mean: of that at most 1 and itself.
_OF_LOG_RATIOS = {"policy": "reverse_kl", "reference": "forward_kl"}


def _scale_of(
    asked: list[Rows], grads: list[Tensor], states: list[Tensor], sides: list[_Sums]
) -> _Scale | None:
    """So that float16 tiles neither underflow, as 1 / (N V) would, nor overflow; None without."""
    if not any(side.products.narrow for side in sides):
        return None
    bounds = []
    for one, grad, state in zip(asked, grads, states, strict=True):
        size = torch.where(grad.isfinite(), grad.abs(), 0).to(reference.inside(grad.device))
        for name in {_OF_LOG_RATIOS[side.name] for side in sides if side.wanted} & set(one.fields):
            kl = state[:, reference.STATE.index(name)]
            size = size + size * torch.where(kl.isfinite(), kl, 0)
        if one.inverse is not None:  # of a row that does not count it may be no number
            size = size * one.inverse
            size = torch.where(size.isfinite(), size, 0)
        bounds.append(size.amax())
    most = torch.stack(bounds).amax() * max(1.0, *(abs(side.side.scale) for side in sides))
    shift = (_LARGEST - torch.frexp(most).exponent).clamp(-120, 120).to(most.dtype)
    return _Scale(torch.exp2(shift), torch.exp2(-shift))


class _Sums:
    """The gradients of one side: d hidden in the accumulators' dtype, d weight by tiles."""

    def __init__(
        self,
        name: str,
        side: Side,
        products: Products,
        wanted: Wanted,
        weight_of: _Sums | None = None,
    ) -> None:
        self.name = name
        self.side, self.products, self.weight_of = side, products, weight_of
        self.wanted = any(wanted)
        self.out = Gradients()
        if wanted.hidden and side.hidden is not None:
            shape = side.hidden.shape
            self.out.hidden = torch.zeros(shape, dtype=products.total, device=products.device)
        if wanted.weight and side.weight is not None and weight_of is None:
            self.out.weight = torch.empty_like(side.weight, memory_format=torch.contiguous_format)
        if wanted.bias and side.bias is not None:
            self.out.bias = torch.empty_like(side.bias)
        if wanted.given and side.given is not None:
            made = torch.empty_like if side.live is None else torch.zeros_like
            self.out.given = made(side.given, memory_format=torch.contiguous_format)
        self._weight: Tensor | None = None
        self._fresh = False  # nothing has been added to the tile of d weight yet
        self._bias: Tensor | None = None
        self.scale: _Scale | None = None

    def _room(self, name: str, rows: int, columns: int) -> Tensor:
        total = self.products.total
        return self.products.room(f"d {self.name} {name}", rows, columns, total)

    def begin(self, columns: slice) -> None:
        """Before a tile of the vocabulary."""
        size = columns.stop - columns.start
        if self.out.weight is not None:
            self._fresh = True
            self._weight = (
                self.out.weight[columns]  # summed where it is wanted
                if self.out.weight.dtype == self.products.total
                else self._room("weight", size, self.out.weight.shape[1])
            )
        elif self.weight_of is not None:  # one weight for both sides
            self._weight = self.weight_of._weight
        if self.out.bias is not None:
            self._bias = self._room("bias", 1, size)[0].zero_()

    def take(self, gradient: Tensor, logits: Tensor, tokens: slice, columns: slice) -> None:
        """Add the products of one tile of gradients; `logits` are those of `_logits`.

        Both are overwritten.
        """
        side = self.side
        if side.softcap is not None:  # tanh' = 1 - tanh^2
            # of a token without a gradient the logit may be NaN
            inside = logits.div_(side.softcap).nan_to_num_(0.0, 0.0, 0.0)
            gradient *= inside.square_().neg_().add_(1)
        if side.scale != 1:
            gradient *= side.scale
        if self.out.given is not None:
            if self.scale is not None:
                gradient = gradient.to(self.products.total).mul_(self.scale.down)
            rows = tokens if side.live is None else side.live[tokens]
            self.out.given[rows, columns] = gradient.to(self.out.given.dtype)
            return
        if self._bias is not None:
            self._bias += gradient.sum(0, dtype=self._bias.dtype)
        gradient = self.products.as_operand(gradient)
        if self.out.hidden is not None and side.weight is not None:
            self.products.add(self.out.hidden[tokens], gradient, side.weight[columns])
        if self._weight is not None and side.hidden is not None:
            owner = self if self.weight_of is None else self.weight_of
            self.products.add(self._weight, gradient.t(), side.hidden[tokens], owner._fresh)
            owner._fresh = False

    def end(self, columns: slice) -> None:
        """After it: rounded once."""
        if self.out.weight is not None and self._weight is not None:
            if self._fresh:  # there are no tokens
                self._weight.zero_()
            total = self._unscaled(self._weight)
            if total.dtype != self.out.weight.dtype:
                self.out.weight[columns] = total
        if self.out.bias is not None and self._bias is not None:
            self.out.bias[columns] = self._unscaled(self._bias)

    def finish(self) -> Gradients:
        """After the last tile."""
        if self.out.hidden is not None:
            self._unscaled(self.out.hidden)
        return self.out

    def _unscaled(self, t: Tensor) -> Tensor:
        return t if self.scale is None else t.mul_(self.scale.down)


def _tile(
    engine: Engine,
    asked: list[Rows],
    grads: list[Tensor],
    states: list[Tensor],
    policy: _Sums,
    other: _Sums | None,
    tokens: slice,
    columns: slice,
) -> None:
    """Both sides' sums of one tile; what it allocates is gone before the next."""
    x, y = engine.logits(tokens, columns)
    dx: Tensor | None = None
    left = len(asked)
    for one, grad, state in zip(asked, grads, states, strict=True):
        left -= 1
        ids, inverse = one.part(tokens, columns)
        apart = one.take_out(x, tokens, columns)
        own = 0 if apart is None else apart.at.shape[1]  # rows of grad
        read = (
            grad[own:, tokens], x, y if one.paired else None, ids, state[tokens],
            one.fields, one.parameter, inverse, None, None,
        )  # fmt: skip
        to_y = one.paired and other is not None
        over = policy.wanted and policy.side.softcap is None and not left
        if over:  # nobody reads x again
            gx, gy = x, OPS.row_stats_backward_(*read, to_y, one.backend)
        else:
            gx, gy = OPS.row_stats_backward(*read, policy.wanted, to_y, one.backend)
        if apart is not None:
            if not over:
                put_back(x, apart)
            if policy.wanted:
                add_gradient(gx, grad[:own, tokens], apart, inverse)
        if policy.wanted:
            dx = gx if dx is None else gx.add_(dx)
        if other is not None and one.paired and y is not None:
            other.take(gy, y, tokens, columns)
    if dx is not None:
        policy.take(dx, x, tokens, columns)


def backward(
    engine: Engine,
    asked: list[Rows],
    grads: list[Tensor],
    states: list[Tensor],
    wanted: tuple[Wanted, Wanted],
) -> tuple[Gradients, Gradients]:
    """Gradients of both sides; each question's grad [R, n] and state of the whole rows."""
    policy = _Sums("policy", engine.policy, engine.products, wanted[0])
    other = None
    if engine.other is not None and any(wanted[1]):
        shared = policy if engine.other.weight is engine.policy.weight else None
        other = _Sums("reference", engine.other, engine.of_other, wanted[1], shared)
    sides = [side for side in (policy, other) if side is not None]
    scale = _scale_of(asked, grads, states, sides)
    if scale is not None:
        grads = [grad * scale.up for grad in grads]
        for side in sides:
            side.scale = scale
    for columns in engine.columns() if any(side.wanted for side in sides) else ():
        for side in sides:
            side.begin(columns)
        for tokens in engine.blocks():
            _tile(engine, asked, grads, states, policy, other, tokens, columns)
        for side in sides:
            side.end(columns)
    return policy.finish(), Gradients() if other is None else other.finish()
