"""Divergences from a teacher of whom only the K most likely tokens of each row were kept."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import autograd, contents, distributed, dtensors, reductions, reference, validation
from .backends import needs, resolve
from .layout import inverse_temperature, rows
from .saving import ordinary
from .sharded_topk import topk_logprobs as sharded_outcomes
from .topk_ops import KERNELS
from .topk_ops import topk_logprobs as outcomes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

KINDS = ("forward_kl", "reverse_kl")
NAMES = ("topk_ids", "topk_logprobs")
TAILS = ("bucket", "drop", "renormalize")


class TopkDivergence(NamedTuple):
    """What `topk_divergence(return_mass=True)` returns."""

    value: Tensor
    """The divergence, reduced as asked."""
    policy_mass: Tensor
    """Share of the policy on the K tokens, one per row, no gradient."""
    reference_mass: Tensor
    """Share of the reference on them: the sum of exp(topk_logprobs), no gradient."""


@overload
def topk_divergence(
    policy_logits: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    kind: str = "forward_kl",
    *,
    tail: str = ...,
    temperature: float | Tensor = ...,
    mask: Tensor | None = ...,
    reduction: str = ...,
    return_mass: Literal[True],
    group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> TopkDivergence: ...
@overload
def topk_divergence(
    policy_logits: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    kind: str = "forward_kl",
    *,
    tail: str = ...,
    temperature: float | Tensor = ...,
    mask: Tensor | None = ...,
    reduction: str = ...,
    return_mass: Literal[False] = ...,
    group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> Tensor: ...
def topk_divergence(
    policy_logits: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    kind: str = "forward_kl",
    *,
    tail: str = "bucket",
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    reduction: str = "none",
    return_mass: bool = False,
    group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor | TopkDivergence:
    """KL between full rows of policy logits and a reference known at K tokens a row, in nats.

    With p = softmax(policy_logits / T), q = exp(topk_logprobs), sums over the K tokens, and P and Q
    the sums of p and of q over them::

        tail         forward_kl, KL(q || p)                          reverse_kl, KL(p || q)
        bucket       sum q log(q/p) + (1-Q) log((1-Q) / (1-P))       the same, p and q swapped
        drop         sum q log(q/p)                                  sum p log(p/q)
        renormalize  sum q/Q log((q/Q) / (p/P))                      the same, p and q swapped

    "bucket" takes all other tokens as one outcome: a lower bound of the full divergence, never
    negative, that moves mass to and from the tail. "drop" leaves them out: it may be negative, and
    as reverse_kl it rewards a policy for leaving the K tokens. "renormalize" compares the rows
    given that a token is one of the K, and lets P do what it likes. 1 - P is summed from the other
    tokens, so that it keeps its digits where P is nearly 1. Equivalent to, for bucket and
    forward_kl::

        p = torch.softmax(policy_logits.double() / T, -1).gather(-1, topk_ids)
        q = topk_logprobs.double().exp()
        tails = 1 - p.sum(-1), 1 - q.sum(-1)
        (q * (q / p).log()).sum(-1) + tails[1] * (tails[1] / tails[0]).log()

    Args:
        policy_logits: [..., V], float32, bfloat16, float16 or float64, any strides; read once
            forward, once backward ("renormalize" reads the K tokens alone). Differentiable, twice
            too. Of a padded vocabulary give `policy_logits[..., :n]`, which is read in place, but
            whose gradient autograd copies once into the padded one. There is no softcap: cap the
            logits first.
        topk_ids: int64 [..., K], from 0 to V - 1, different in each row; -1 is padding. Any K
            tokens, not only the likeliest: K <= V.
        topk_logprobs: floating-point [..., K], at most 0: log q of them, already at `temperature`,
            which divides the policy's logits only. Ignored at padding. Differentiable.
        kind: "forward_kl" or "reverse_kl".
        tail: as above.
        temperature: T > 0, a number or a float tensor, 0-d or of shape policy_logits.shape[:-1].
        mask: bool [...], True = counted. Other rows are not read: exactly 0, gradient exactly 0.
        reduction: "none", "sum", "mean" per counted row, "batchmean" = sum / size(0).
        return_mass: also return P and Q, as a `TopkDivergence`.
        group: a process group whose ranks each hold a slice of the vocabulary; see `divergence`.
            topk_ids are those of the whole vocabulary, the same on every rank. DTensors as there.
        backend: None for the best, or a name from `backends()`.

    Returns:
        shape [...] or a scalar; float32, or float64 if an input is. +inf where the supports say so,
        with p - q (over the outcomes) as the policy's gradient and 0 to the reference. A row whose
        logits have NaN, +inf or nothing but -inf is NaN, and no other, but for one of NaN
        log-probabilities. "renormalize" sees only what stands at the K tokens (over a group, which
        reads whole rows, such a row is NaN too), and is NaN for a row of padding alone, where the
        others are 0. log p is known to 1e-7 where logits are not float64: "bucket" is wrong by 1e-4
        of a divergence of 1e-8 and by 1e-2 of one of 1e-12, "drop" by 1e-8 in all. 1 - Q is taken
        to be at least 1.2e-7 (2.2e-16 for float64): rounded log-probabilities may sum to 1 and
        more, and reverse_kl would be infinite.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is accepted.

    Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015: the full sum.
    """
    if dtensors.given(policy_logits):
        out: Tensor | TopkDivergence = dtensors.reduced(
            topk_divergence,
            {"policy_logits": policy_logits},
            reduction,
            topk_ids=topk_ids,
            topk_logprobs=topk_logprobs,
            kind=kind,
            tail=tail,
            temperature=temperature,
            mask=mask,
            return_mass=return_mass,
            group=group,
            backend=backend,
        )
        return out
    validation.logits("policy_logits", policy_logits, sliced=group is not None)
    check(policy_logits, topk_ids, topk_logprobs, kind, tail)
    validation.reduction(reduction)
    validation.flag("return_mass", return_mass)
    shape, k = policy_logits.shape[:-1], topk_ids.shape[-1]
    if reduction == "batchmean" and not shape:
        raise ValueError('reduction="batchmean" needs logits with a batch dim; got shape [V]')
    inverse = inverse_temperature(temperature, policy_logits)
    counted = reductions.counted_tokens(policy_logits, mask, None, -100)
    name = _resolve(backend, policy_logits.device, needs(policy_logits))
    shards = distributed.shards(
        group,
        policy_logits,
        ids_name="topk_ids",
        kind=f"topk {kind} {tail} {k}",
        dtype=" ".join(needs(policy_logits, topk_logprobs)),
        temperature=temperature,
    )
    # of slices, what the whole vocabulary has is looked at by sharded_topk
    width = policy_logits.shape[-1] if shards is None else None
    ids, log_q = teacher_rows(topk_ids, topk_logprobs, counted, width)
    if inverse is not None and ids.device.type == "cpu" and not autograd.intercepted(inverse):
        contents.temperatures(inverse, counted)
    x = rows(policy_logits)
    log_p: Tensor | None = None
    if shards is not None:
        log_p = sharded_outcomes(x, ids, inverse, counted, shards, backend=name)
    elif tail != "renormalize" or return_mass:
        log_p = outcomes(x, ids, inverse, counted, backend=name)
    if tail == "renormalize" and shards is None:
        tokens = _logits_at(x, ids).to(log_q.dtype)
        if inverse is not None:
            if counted is not None:  # whatever temperature a masked row has
                inverse = torch.where(counted, inverse, 1)
            tokens = tokens * inverse.unsqueeze(-1)
        rest = None
    else:
        assert log_p is not None
        tokens, rest = log_p[:, :-1], log_p[:, -1:]
    dtype = reference.result_dtype(policy_logits, topk_logprobs)
    values = of_outcomes(tokens, rest, ids, log_q, kind, tail, counted, dtype, name)
    value = reductions.reduce(values, counted, None, reduction, shape, backend=name)
    if not return_mass:
        return value
    assert log_p is not None
    with torch.no_grad():
        masses = (
            torch.where(ids >= 0, t, -torch.inf).exp().sum(-1).to(dtype).reshape(shape)
            for t in (log_p[:, :-1], log_q)
        )
        return TopkDivergence(value, *masses)


def _logits_at(x: Tensor, ids: Tensor) -> Tensor:
    """[N, K] of x [..., V], where it lies; any logit for padding."""
    rest = torch.arange(ids.shape[0], device=x.device)[:, None]
    row: list[Tensor] = []
    for size in reversed(x.shape[:-1]):  # torch.unravel_index would wait for the device
        row.insert(0, rest % size)
        rest = rest // size
    # not gather, whose derivative adds 16-bit numbers up in float32 logits
    return x[(*row, ids.clamp(min=0))]


def teacher_rows(
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    counted: Tensor | None,
    width: int | None,
    names: tuple[str, str] = NAMES,
) -> tuple[Tensor, Tensor]:
    """The teacher's rows as [N, K]: ids, and log q in float64; -1 and -inf where nothing is."""
    k = topk_ids.shape[-1]
    if k < 1 or (width is not None and k > width):
        most = "V" if width is None else f"V = {width}"
        raise ValueError(f"{names[0]} must hold from 1 to {most} tokens a row; got {k}")
    ids = topk_ids.reshape(-1, k)
    log_q = topk_logprobs.reshape(-1, k).to(reference.inside(topk_ids.device))
    ids = ordinary(ids) if counted is None else torch.where(counted[:, None], ids, -1)
    log_q = torch.where(ids == -1, -torch.inf, log_q)
    if ids.device.type == "cpu" and not autograd.intercepted(ids, log_q):
        _check_contents(ids, log_q, width, names)
        return ids.contiguous(), log_q
    wrong = _wrong(ids, log_q, width)
    if ids.device.type != "cpu" and os.environ.get(contents.ENVIRONMENT) == "1":
        torch._assert_async(~wrong.any(), f"fusedkl: {' or '.join(names)} holds what it must not")
    return torch.where(wrong, -1, ids).contiguous(), torch.where(wrong, torch.nan, log_q)


def _wrong(ids: Tensor, log_q: Tensor, width: int | None) -> Tensor:
    """What `_check_contents` refuses, where nobody can wait for it: such a row will be NaN."""
    wrong = _given_twice(ids) | (ids < -1) | (log_q > 0)
    return wrong if width is None else wrong | (ids >= width)


def _given_twice(ids: Tensor) -> Tensor:
    """Which tokens of a row stand before in it; -1 is none."""
    order = ids.argsort(dim=-1, stable=True)
    ordered = ids.gather(-1, order)
    again = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    twice = torch.cat([torch.zeros_like(ids[:, :1], dtype=torch.bool), again], -1)
    return torch.zeros_like(twice).scatter(-1, order, twice)


def of_outcomes(
    tokens: Tensor,
    rest: Tensor | None,
    ids: Tensor,
    log_q: Tensor,
    kind: str,
    tail: str,
    counted: Tensor | None,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """The divergence [N] from log p of the tokens [N, K] and of the rest [N, 1].

    For "renormalize" the tokens' logits over T do as well, and rest is not read.
    """
    log_p = torch.where(ids >= 0, tokens, -torch.inf)
    if tail == "drop":
        return _dropped(log_p, log_q, kind, counted).to(dtype)
    if tail == "bucket":
        assert rest is not None
        left = _tail(log_q, rest, torch.finfo(dtype).eps)
        log_p, log_q = torch.cat([log_p, rest], -1), torch.cat([log_q, left], -1)
    # Few outcomes in float64: the rows of any other divergence.
    few = "reference" if backend == "triton" else backend  # in float64, which triton does not take
    rows = autograd.row_stats(log_p, log_q, None, (kind,), None, None, counted, backend=few)
    return rows[0].to(dtype)


def _tail(log_q: Tensor, policy_rest: Tensor, floor: float) -> Tensor:
    """log(1 - Q) [N, 1]. Nothing, where nothing is left by rounding and no token is left either."""
    left = 1 - log_q.exp().sum(-1, keepdim=True)
    nothing = (left <= floor) & (policy_rest == -torch.inf)
    return torch.where(nothing, -torch.inf, left.clamp(min=floor).log())


def _dropped(log_p: Tensor, log_q: Tensor, kind: str, counted: Tensor | None) -> Tensor:
    weight, other = (log_q, log_p) if kind == "forward_kl" else (log_p, log_q)
    joint = (weight > -torch.inf) & (other > -torch.inf)
    terms = torch.where(joint, weight, 0).exp() * torch.where(joint, weight - other, 0)
    value = torch.where(joint, terms, 0).sum(-1)
    infinite = ((weight > -torch.inf) & (other == -torch.inf)).any(-1)
    bad = (log_p.isnan() | log_q.isnan()).any(-1)
    value = torch.where(bad, torch.nan, torch.where(infinite, torch.inf, value))
    if torch.is_grad_enabled():
        slope = torch.where(infinite[:, None], log_p.exp() - log_q.exp(), 0)
        slope = torch.where(bad[:, None], torch.nan, slope).detach()
        value = value + reference.pull(log_p, slope).squeeze(-1)
    return value if counted is None else torch.where(counted, value, 0)


def _resolve(backend: str | None, device: torch.device, wanted: tuple[str, ...]) -> str:
    name = resolve(backend, device, wanted)
    if name in KERNELS:
        return name
    if backend is not None:
        raise ValueError(
            f"backend={backend!r} has no kernel for topk_divergence; {' and '.join(KERNELS)} do"
        )
    return "reference"


def check(
    policy: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    kind: str,
    tail: str,
    names: tuple[str, str] = NAMES,
) -> None:
    """The teacher's tensors fit the policy, logits [..., V] or hidden states [..., H]."""
    validation.one_of("kind", kind, KINDS)
    validation.one_of("tail", tail, TAILS)
    first, second = names
    if validation.tensor(first, ids).dtype != torch.int64:
        raise TypeError(f"{first} must be an int64 tensor; got {ids.dtype}")
    leading = list(policy.shape[:-1])
    if ids.dim() != policy.dim() or list(ids.shape[:-1]) != leading:
        raise ValueError(f"{first} must have shape {[*leading, 'K']}; got {list(ids.shape)}")
    validation.on_device(first, ids, policy)
    validation.floating(second, logprobs)
    validation.alike(second, logprobs, first, ids)


def _check_contents(ids: Tensor, log_q: Tensor, width: int | None, names: tuple[str, str]) -> None:
    if not ids.numel():
        return
    low, high = (int(v) for v in ids.aminmax())
    if low < -1 or (width is not None and high >= width):  # of slices: sharded_topk
        last = "V - 1" if width is None else width - 1
        raise ValueError(
            f"{names[0]} must hold token ids from 0 to {last}, or -1; got {low} to {high}"
        )
    if bool(_given_twice(ids).any()):
        raise ValueError(f"{names[0]} must be different in each row; got some twice")
    if bool((log_q > 0).any()):
        raise ValueError(f"{names[1]} must be at most 0; got {float(log_q.detach().max())}")
