"""Distillation: a divergence from the teacher and the cross-entropy of hard labels together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import autograd, distributed, divergences, dtensors, reductions, reference, validation
from .autograd import OPS, recorded
from .backends import needs, resolve
from .layout import inverse_temperature, row_parts, rows, token_ids
from .saving import keep, kept, ordinary

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    kind: str = "forward_kl",
    temperature: float | Tensor = 1.0,
    beta: float | None = None,
    alpha: float | None = None,
    ce_weight: float = 0.5,
    scale_t2: bool = True,
    label_smoothing: float = 0.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    valid_vocab: int | None = None,
    softcap: float | None = None,
    group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """(1 - ce_weight) T^2 D(teacher, student at T) + ce_weight CE(labels, student), in nats.

    D is `divergence` at temperature T, the cross-entropy is at temperature 1, as Hinton et al. have
    it; T^2 keeps the gradient of D at the size of the other's when T changes. Equivalent to, for
    forward_kl::

        log_p = torch.log_softmax(student_logits.float() / T, -1)
        log_q = torch.log_softmax(teacher_logits.float() / T, -1)
        kl = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
        ce = F.cross_entropy(student_logits.float(), labels, label_smoothing=label_smoothing)
        ((1 - ce_weight) * T**2 * kl + ce_weight * ce).mean()

    Args:
        student_logits, teacher_logits, temperature, mask, weight, reduction, backend: as policy and
            reference in `divergence`. Differentiable, twice too.
        valid_vocab: only the first so many logits of a row exist, for D, the cross-entropy and the
            V of label smoothing. Student and teacher may then have padding of different sizes.
        softcap: as in `divergence`, of both rows' logits, for the cross-entropy too.
        labels: int64, shape student_logits.shape[:-1], from 0 to V - 1. Rows with ignore_index, and
            rows that the mask excludes, count for neither term; what labels hold there is ignored.
        kind, beta, alpha: a divergence and its parameter, see `divergence`.
        ce_weight: from 0 (no labels' term; the labels still mask) to 1 (the teacher is not read).
        scale_t2: multiply D by T^2; False leaves it out.
        label_smoothing: from 0 to 1: that share of each label is spread evenly over the V tokens,
            as in F.cross_entropy.
        group: a torch.distributed.ProcessGroup over which the vocabulary is sharded: the logits are
            this rank's slice, labels are of the whole vocabulary; docs/sharding.md. DTensors as in
            `divergence`.

    Returns:
        a scalar, or shape student_logits.shape[:-1] for reduction="none"; float32, or float64 if an
        input is. At T = 1 one sweep over the rows gives both terms and another one the gradient. At
        another T each of the two sweeps visits the student's rows once per temperature, by blocks
        of rows, so that the gradient is again the only large tensor that is allocated, rounded
        once; not so in a graph of torch.compile or over a group, where the gradients of D and of
        the cross-entropy are each rounded to the dtype of the logits, and then added.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is accepted.

    Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015; Szegedy et al.,
    "Rethinking the Inception Architecture for Computer Vision", 2016, for label smoothing.
    """
    if dtensors.given(student_logits, teacher_logits):
        out: Tensor = dtensors.reduced(
            distillation_loss,
            {"student_logits": student_logits, "teacher_logits": teacher_logits},
            reduction,
            labels=labels,
            kind=kind,
            temperature=temperature,
            beta=beta,
            alpha=alpha,
            ce_weight=ce_weight,
            scale_t2=scale_t2,
            label_smoothing=label_smoothing,
            mask=mask,
            weight=weight,
            ignore_index=ignore_index,
            valid_vocab=valid_vocab,
            softcap=softcap,
            group=group,
            backend=backend,
        )
        return out
    fields, parameter = divergences.resolve(kind, beta, alpha)
    names = ("student_logits", "teacher_logits")
    validation.pair(student_logits, teacher_logits, valid_vocab, group is not None, names)
    softcap = validation.controls(softcap, 1.0)
    validation.reduction(reduction)
    validation.flag("scale_t2", scale_t2)
    validation.share("ce_weight", ce_weight)
    validation.share("label_smoothing", label_smoothing)
    shape = student_logits.shape[:-1]
    if reduction == "batchmean" and not shape:
        raise ValueError('reduction="batchmean" needs logits with a batch dim; got shape [V]')
    if validation.per_row("labels", labels, student_logits).dtype != torch.int64:
        raise TypeError(f"labels must be an int64 tensor; got {labels.dtype}")
    inverse = inverse_temperature(temperature, student_logits)
    counted = reductions.counted_tokens(student_logits, mask, labels, ignore_index)
    assert counted is not None
    dtype = reference.result_dtype(student_logits, teacher_logits)
    weights = reductions.token_weights(student_logits, weight, dtype)
    ids = torch.where(counted, labels.reshape(-1), 0)
    soft = fields if ce_weight < 1 else ()
    hard: tuple[str, ...] = ()
    if ce_weight > 0:
        hard = ("logprob", "mean_logprob") if label_smoothing > 0 else ("logprob",)
    wanted = needs(student_logits, teacher_logits, *soft, *hard, softcap=softcap)
    name = resolve(backend, student_logits.device, wanted)
    read = reductions.rows_to_read(counted, weights)
    shards = distributed.shards(
        group,
        student_logits,
        ids_name="labels",
        kind=f"distillation {kind} {parameter} {' '.join(hard)}",
        dtype=" ".join(wanted[:2]),
        temperature=temperature,
        valid_vocab=valid_vocab,
        softcap=softcap,
    )
    width = student_logits.shape[-1] if valid_vocab is None else valid_vocab
    if group is None or valid_vocab is not None:  # else the width of a slice
        validation.token_range("labels", ids, width, ", or ignore_index")
    ids = token_ids(ids.view(shape), student_logits)
    limits = (valid_vocab, softcap)
    call = _Call(soft, hard, parameter, inverse, read, ids, limits, name, shards)
    values = _values(rows(student_logits), rows(teacher_logits) if soft else None, call)

    squared: float | Tensor = 1.0
    if inverse is not None and scale_t2:
        squared = inverse.square().reciprocal()
    tokens = torch.zeros_like(values[0])
    for i in range(len(soft)):
        tokens = tokens + (1 - ce_weight) * squared * values[i]
    if hard:
        tokens = tokens - ce_weight * (1 - label_smoothing) * values[len(soft)]
    if label_smoothing > 0 and hard:
        tokens = tokens - ce_weight * label_smoothing * values[len(soft) + 1]
    tokens = torch.where(counted, tokens, 0).to(dtype)
    return reductions.reduce(tokens, counted, weights, reduction, shape, backend=name)


class _Call(NamedTuple):
    """What the two halves of the loss need besides logits: fields at T, fields at temperature 1."""

    soft: tuple[str, ...]
    hard: tuple[str, ...]
    parameter: float | None  # of the soft ones
    inverse: Tensor | None
    read: Tensor | None
    ids: Tensor  # int64 [N, 1]
    limits: tuple[int | None, float | None]  # valid_vocab, softcap
    backend: str
    shards: distributed.Shards | None


def _values(x: Tensor, y: Tensor | None, call: _Call) -> Tensor:
    """[R, N]: the soft fields, then the hard ones."""
    sharded = call.shards is not None
    # over slices, a second sweep's sums are reduced apart from numbers of tokens
    second = sharded and any(divergences.FIELDS[name].second_sweep for name in call.soft)
    valid_vocab, softcap = call.limits
    if not call.soft or not call.hard or (call.inverse is None and not second):
        inverse = call.inverse if call.soft else None
        fields = call.soft + call.hard
        return autograd.row_stats(
            x, y, call.ids if call.hard else None, fields, call.parameter, inverse, call.read,
            valid_vocab=valid_vocab, softcap=softcap, shards=call.shards, backend=call.backend,
        )  # fmt: skip
    if autograd.intercepted(x, y) or x.numel() == 0 or sharded:
        return _apart(x, y, call)
    out: Tensor = _TwoTemperatures.apply(x, y, call)
    return out


def _apart(x: Tensor, y: Tensor | None, call: _Call) -> Tensor:
    soft, hard, parameter, inverse, read, ids, (valid_vocab, softcap), name, shards = call
    options: dict[str, Any] = {"valid_vocab": valid_vocab, "softcap": softcap, "shards": shards}
    soft_ones = autograd.row_stats(
        x, y, None, soft, parameter, inverse, read, **options, backend=name
    )
    hard_ones = autograd.row_stats(x, None, ids, hard, None, None, read, **options, backend=name)
    return torch.cat([soft_ones, hard_ones])


class _TwoTemperatures(torch.autograd.Function):
    """`_apart` by blocks of rows, so that no second gradient of the logits' size is allocated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, call: _Call) -> Tensor:
        values, states = [], []
        for part, block_x, block_y in row_parts(x, y):
            c = _cut(call, part)
            shared = (*c.limits, c.backend)
            soft, soft_state = OPS.row_stats(
                block_x, block_y, None, c.soft, c.parameter, c.inverse, c.read, *shared
            )
            hard, hard_state = OPS.row_stats(
                block_x, None, c.ids, c.hard, None, None, c.read, *shared
            )
            values.append(torch.cat([soft, hard.to(soft.dtype)]))
            states.append(torch.stack([soft_state, hard_state]))
        ctx.call = call
        keep(ctx, x, y, torch.cat(states, 1))
        return torch.cat(values, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, y, state = kept(ctx)
        call: _Call = ctx.call
        to_x, to_y = ctx.needs_input_grad[:2]
        grad = grads[0] if call.read is None else torch.where(call.read, grads[0], 0)
        if recorded(x, y, grad):
            views = [ordinary(t.view_as(t)) for t in (x, y)]
            wanted = [t for t, asked in zip(views, (to_x, to_y), strict=True) if asked]
            values = _apart(views[0], views[1], call)
            found = iter(torch.autograd.grad(values, wanted, grad, create_graph=True))
            return next(found) if to_x else None, next(found) if to_y else None, None
        gx = x.new_empty(x.shape) if to_x else None
        gy = y.new_empty(y.shape) if to_y else None
        split = len(call.soft)
        targets = [t for t in (gx, gy) if t is not None]
        for part, block_x, block_y, *blocks in row_parts(x, y, *targets):
            c, out = _cut(call, part), iter(blocks)
            if to_x:  # both gradients in float32: near the optimum their sum is small
                block_x = block_x.to(reference.result_dtype(block_x, None))
            soft = OPS.row_stats_backward(
                grad[:split, part].contiguous(), block_x, block_y, None, state[0, part],
                c.soft, c.parameter, c.inverse, *c.limits, to_x, to_y, c.backend,
            )  # fmt: skip
            if to_x:
                hard, _ = OPS.row_stats_backward(
                    grad[split:, part].contiguous(), block_x, None, c.ids, state[1, part],
                    c.hard, None, None, *c.limits, True, False, c.backend,
                )  # fmt: skip
                target = next(out)
                if target.dtype == hard.dtype:
                    torch.add(soft[0], hard, out=target)
                else:  # out= of another dtype would take one block more
                    target.copy_(soft[0].add_(hard))
            if to_y:
                next(out).copy_(soft[1])
        return gx, gy, None


def _cut(call: _Call, part: slice) -> _Call:
    inverse, read = call.inverse, call.read
    assert inverse is not None
    return call._replace(
        inverse=inverse if inverse.numel() == 1 else inverse[part],
        read=None if read is None else read[part],
        ids=call.ids[part],
    )
