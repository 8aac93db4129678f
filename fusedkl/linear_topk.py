"""A reference of which the K likeliest tokens are known, beside a fused lm_head.

A row of the policy becomes K + 1 outcomes: K logits, and logsumexp of all others. In a tile the K
tokens are taken out for a moment, so that the row kernels see the others only; what the outcomes
mean for the divergence is said once, in `fusedkl.topk`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference, topk

NAMES = ("ref_topk[0] (ids)", "ref_topk[1] (log-probabilities)")


class Teacher(NamedTuple):
    """ref_topk, checked, as [N, K]; -1 and -inf where nothing is."""

    ids: Tensor
    log_q: Tensor
    kind: str
    tail: str
    dtype: torch.dtype  # of the divergence

    def divergence(self, outcomes: Tensor, counted: Tensor | None, backend: str) -> Tensor:
        """Per token, from the outcomes [K + 1, N]: logits over T, and logsumexp of the rest."""
        logits, rest = outcomes[:-1].t(), outcomes[-1:].t()
        logits = torch.where(self.ids >= 0, logits, -torch.inf)
        rest = torch.where(rest == -torch.inf, -torch.inf, rest)  # no rest: no gradient to it
        row = torch.cat([logits, rest], -1)
        # of a row that is none, log_softmax would make 0 * NaN of a gradient of 0
        bad = (row.isnan() | (row == torch.inf)).any(-1) | (row == -torch.inf).all(-1)
        log_p = torch.log_softmax(torch.where(bad[:, None], 0, row), -1)
        parts = log_p[:, :-1], log_p[:, -1:]
        if backend not in topk.KERNELS:  # where topk_divergence takes them, too: K + 1 numbers
            backend = "reference"
        value = topk.of_outcomes(
            *parts, self.ids, self.log_q, self.kind, self.tail, counted, self.dtype, backend
        )
        if counted is not None:
            bad = bad & counted
        value = torch.where(bad, torch.nan, value)
        if torch.is_grad_enabled():
            lost = torch.where(bad, torch.nan, 0.0)[:, None].to(row.dtype)
            pulled = reference.pull(row, lost.expand_as(row)).squeeze(-1)
            value = value + pulled.to(value.dtype)
        return value


def one_reference(
    ref_topk: Any,
    ref_hidden: Tensor | None,
    ref_logits: Tensor | None,
    ref_softcap: float | None,
    ref_logit_scale: float,
) -> None:
    """There is a reference, and ref_topk is the only one where it is given."""
    if ref_topk is None:
        if ref_hidden is None and ref_logits is None:
            raise ValueError(
                "a reference is needed: ref_hidden (with ref_weight), ref_logits or ref_topk"
            )
        return
    for name, other in (("ref_hidden", ref_hidden), ("ref_logits", ref_logits)):
        if other is not None:
            raise ValueError(
                f"one form of reference is accepted; got {name} of shape {list(other.shape)} and "
                f"ref_topk of shapes {[list(t.shape) for t in ref_topk if isinstance(t, Tensor)]}"
            )
    if ref_softcap is not None or ref_logit_scale != 1:
        name = "ref_softcap" if ref_softcap is not None else "ref_logit_scale"
        raise ValueError(f"{name} has no effect with ref_topk, which holds log-probabilities")


def teacher(
    ref_topk: Any, tail: str | None, kind: str, hidden: Tensor, width: int | None,
    counted: Tensor | None,
) -> Teacher | None:  # fmt: skip
    """The reference, or None if it is given otherwise. width: of the vocabulary, if it is known."""
    if ref_topk is None:
        if tail is not None:
            raise ValueError(f"tail={tail!r} has no effect without ref_topk")
        return None
    if not isinstance(ref_topk, (tuple, list)) or len(ref_topk) != 2:
        got = type(ref_topk).__name__
        if isinstance(ref_topk, (tuple, list)):
            got = f"{len(ref_topk)} of them"
        raise TypeError(f"ref_topk must be two tensors, ids and log-probabilities; got {got}")
    tail = "bucket" if tail is None else tail
    if kind not in topk.KINDS:
        raise ValueError(f"kind must be one of {', '.join(topk.KINDS)} with ref_topk; got {kind!r}")
    ids, log_q = ref_topk
    topk.check(hidden, ids, log_q, kind, tail, NAMES)
    dtype = reference.result_dtype(hidden, log_q)
    rows = topk.teacher_rows(ids, log_q, counted, width, NAMES)
    return Teacher(*rows, kind, tail, dtype)


class Apart(NamedTuple):
    """The tokens of a tile that are outcomes of their own."""

    at: Tensor  # [n, K] columns of the tile, 0 where not inside
    inside: Tensor
    logits: Tensor

    def numbers(self) -> Tensor:
        """Logits [K, n], 0 where not inside."""
        return torch.where(self.inside, self.logits, 0).t()


def outcomes(logits: Tensor, state: Tensor, inverse: Tensor | None) -> Tensor:
    """[K + 1, n]: the tokens' logits [K, n] over T, and logsumexp of the rest, by its state."""
    column = dict(zip(reference.STATE, state.unbind(-1), strict=True))
    rest = column["policy_max"] + column["policy_log_sum"]  # -inf, not NaN, where nothing else is
    return torch.cat([logits if inverse is None else logits * inverse, rest[None]])


def take_out(x: Tensor, ids: Tensor, columns: slice) -> Apart:
    """-inf for the tokens `ids` [n, K] of x [n, columns], in place."""
    inside = (ids >= columns.start) & (ids < columns.stop)
    at = torch.where(inside, ids - columns.start, 0)
    found = Apart(at, inside, x.gather(1, at))
    # those that are elsewhere meet column 0 and leave it as it is
    x.scatter_reduce_(1, at, torch.where(inside, -torch.inf, torch.inf).to(x.dtype), "amin")
    return found


def put_back(x: Tensor, apart: Apart) -> None:
    x.scatter_reduce_(1, apart.at, torch.where(apart.inside, apart.logits, -torch.inf), "amax")


def add_gradient(gx: Tensor, grad: Tensor, apart: Apart, inverse: Tensor | None) -> None:
    """grad [K, n] to the logits over T, into gx [n, columns], where these tokens have 0."""
    if inverse is not None:  # of a row that does not count it may be no number
        grad = torch.where(grad != 0, grad * inverse, 0)
    scaled = grad.t()
    gx.scatter_add_(1, apart.at, torch.where(apart.inside, scaled, 0).to(gx.dtype))
