"""Any divergence of two rows of logits: validate, lay out rows, call an operator, reduce."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from . import (
    autograd,
    distributed,
    divergences,
    dtensors,
    reductions,
    reference,
    scalar_loss,
    validation,
)
from .backends import needs, resolve
from .layout import inverse_temperature, rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def divergence(
    policy_logits: Tensor,
    reference_logits: Tensor,
    kind: str = "forward_kl",
    *,
    temperature: float | Tensor = 1.0,
    beta: float | None = None,
    alpha: float | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "none",
    valid_vocab: int | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    inplace_grad: bool = False,
    group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """Divergence between the distributions of two rows of logits, for every row, in nats.

    With p = softmax(policy_logits / T) and q = softmax(reference_logits / T)::

        forward_kl  KL(q || p) = sum q (log q - log p)
        reverse_kl  KL(p || q) = sum p (log p - log q)
        jeffreys    their sum
        jsd         beta KL(q || m) + (1 - beta) KL(p || m), m = (1 - beta) p + beta q
        skew_kl     KL(q || alpha q + (1 - alpha) p)
        renyi       log(sum q^alpha p^(1 - alpha)) / (alpha - 1)
        tvd         sum |p - q| / 2
        hellinger   1 - sum sqrt(p q), the squared distance

    Equivalent to, but for accuracy, one pass over memory, and the edge cases below::

        log_p = torch.log_softmax(policy_logits.float() / T, -1)
        log_q = torch.log_softmax(reference_logits.float() / T, -1)
        F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)  # forward_kl
        F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)  # reverse_kl

    The named functions have the code of the other kinds.

    Args:
        policy_logits: [..., V], float32, bfloat16, float16 or float64, any strides (a last dim with
            a stride is copied). Differentiable, twice too.
        reference_logits: the same shape and device; the dtype may differ, and with valid_vocab the
            last dim. Nothing is broadcast, but an expanded tensor is read as it is. Differentiable.
        kind: one of the names above.
        temperature: T > 0, a number or a float tensor, 0-d or of shape logits.shape[:-1]. No
            gradient flows to it, and there is no T^2 factor.
        beta: of jsd, from 0 to 1, 0.5 if left out. 0 is exactly forward_kl and 1 exactly
            reverse_kl; the limits at the ends are 0, so it jumps there.
        alpha: of skew_kl, in (0, 1), 0.1 if left out; of renyi, > 0, required, 1 is forward_kl.
        mask: bool, shape logits.shape[:-1], True = counted. Other rows are not read: they give
            exactly 0 and exactly zero gradient, even if they hold NaN.
        weight: floating-point, shape logits.shape[:-1], multiplies each row's value; a weight of 0
            acts as the mask does. Differentiable.
        labels, ignore_index: integer, shape logits.shape[:-1]; counts rows whose label is not
            ignore_index. With a mask too, both must count a row.
        reduction: "none" (shape logits.shape[:-1]), "sum", "mean" = sum(w D) / sum(w) over counted
            rows (0 if there are none), "batchmean" = sum / logits.shape[0]. Note that the "mean" of
            F.kl_div is per element, V times smaller.
        valid_vocab: only the first so many logits of a row exist; the rest (padding) may hold
            anything and gets exactly zero gradient.
        softcap: c > 0, both rows' logits become c tanh(logits / c), after logit_scale and before
            the temperature.
        logit_scale: > 0, multiplies both rows' logits.
        inplace_grad: backward overwrites policy_logits with their gradient instead of allocating
            one. For logits that nothing else needs: autograd refuses to use them afterwards, and a
            second backward or create_graph raises. A leaf's .grad then shares its memory. Under
            torch.compile the compiler decides whether memory is reused. Refused under hooks for
            saved tensors (checkpoint, save_on_cpu), where autograd would not notice.
        group: a torch.distributed.ProcessGroup whose ranks each hold a slice of the vocabulary, in
            the order of ranks, of any size; docs/sharding.md. The result is the same on every
            rank. DTensors say it themselves, and make the result one. No double backward.
        backend: None for the best one (see `explain`), or a name from `backends()`, which then runs
            or raises.

    Returns:
        float32, or float64 if either input is; autocast changes nothing. Gradients come in each
        input's dtype. Values are never negative, exactly 0 for rows that differ by an exactly
        representable constant, +inf where the supports (logits other than -inf) say so (forward_kl,
        reverse_kl, jeffreys, renyi); the gradient of such a term (jeffreys has two) is (p - q) / T
        to the policy and 0 to the reference. -inf in both rows is skipped. NaN, +inf, or nothing
        but -inf makes that row NaN, and no other.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is accepted.

    Kullback and Leibler, "On Information and Sufficiency", 1951; the named functions have the
    sources of the other kinds.
    """
    if dtensors.given(policy_logits, reference_logits):
        out: Tensor = dtensors.reduced(
            divergence,
            {"policy_logits": policy_logits, "reference_logits": reference_logits},
            reduction,
            kind=kind,
            temperature=temperature,
            beta=beta,
            alpha=alpha,
            mask=mask,
            weight=weight,
            labels=labels,
            ignore_index=ignore_index,
            valid_vocab=valid_vocab,
            softcap=softcap,
            logit_scale=logit_scale,
            inplace_grad=inplace_grad,
            group=group,
            backend=backend,
        )
        return out
    fields, parameter = divergences.resolve(kind, beta, alpha)
    validation.pair(policy_logits, reference_logits, valid_vocab, group is not None)
    softcap = validation.controls(softcap, logit_scale)
    validation.reduction(reduction)
    validation.flag("inplace_grad", inplace_grad)
    shape = policy_logits.shape[:-1]
    if reduction == "batchmean" and not shape:
        raise ValueError('reduction="batchmean" needs logits with a batch dim; got shape [V]')
    if inplace_grad:
        validation.inplace_grad(policy_logits, reference_logits)
    inverse = inverse_temperature(temperature, policy_logits, logit_scale)
    counted = reductions.counted_tokens(policy_logits, mask, labels, ignore_index)
    dtype = reference.result_dtype(policy_logits, reference_logits)
    weights = reductions.token_weights(policy_logits, weight, dtype)
    wanted = needs(policy_logits, reference_logits, *fields, softcap=softcap)
    name = resolve(backend, policy_logits.device, wanted)
    shards = None
    if group is not None:
        shards = distributed.shards(
            group,
            policy_logits,
            kind=f"{kind} {parameter}",
            dtype=" ".join(wanted[:2]),
            temperature=temperature,
            valid_vocab=valid_vocab,
            softcap=softcap,
        )
    x, y = rows(policy_logits), rows(reference_logits)
    read = reductions.rows_to_read(counted, weights)

    def reduced(values: Tensor) -> Tensor:
        tokens = values.squeeze(0) if len(fields) == 1 else values[0]
        for i in range(1, len(fields)):
            tokens = tokens + values[i]
        return reductions.reduce(tokens, counted, weights, reduction, shape, backend=name)

    ahead = reduction != "none" and not inplace_grad and shards is None
    if ahead and scalar_loss.gradient_ahead(x, y, weights, name):
        share = reductions.shares(
            shape.numel(), counted, weights, reduction, shape, x, dtype, backend=name
        )
        return scalar_loss.scalar_loss(
            x,
            y,
            fields,
            parameter,
            inverse,
            read,
            share,
            reduced,
            valid_vocab=valid_vocab,
            softcap=softcap,
            backend=name,
        )
    return reduced(
        autograd.row_stats(
            x,
            y,
            None,
            fields,
            parameter,
            inverse,
            read,
            valid_vocab=valid_vocab,
            softcap=softcap,
            inplace_grad=inplace_grad,
            shards=shards,
            backend=name,
        )
    )
