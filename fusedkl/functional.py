"""The divergences of two rows of logits: validate, lay out rows, call an operator, reduce."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from . import autograd, distributed, divergences, reductions, reference, scalar_loss, validation
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
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "none",
    inplace_grad: bool = False,
    group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """Divergence between the distributions of two rows of logits, for every row, in nats.

    With p = softmax(policy_logits / T) and q = softmax(reference_logits / T)::

        forward_kl  KL(q || p) = sum q (log q - log p)
        reverse_kl  KL(p || q) = sum p (log p - log q)
        jeffreys    their sum

    Equivalent to, but for accuracy, one pass over memory, and the edge cases below::

        log_p = torch.log_softmax(policy_logits.float() / T, -1)
        log_q = torch.log_softmax(reference_logits.float() / T, -1)
        F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)  # forward_kl
        F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)  # reverse_kl

    Args:
        policy_logits: [..., V], float32, bfloat16, float16 or float64, any strides (a last dim with
            a stride is copied). Differentiable, twice too.
        reference_logits: the same shape and device; the dtype may differ. Nothing is broadcast, but
            an expanded tensor is read as it is. Differentiable.
        kind: one of the names above.
        temperature: T > 0, a number or a float tensor, 0-d or of shape logits.shape[:-1]. No
            gradient flows to it, and there is no T^2 factor.
        mask: bool, shape logits.shape[:-1], True = counted. Other rows are not read: they give
            exactly 0 and exactly zero gradient, even if they hold NaN.
        weight: floating-point, shape logits.shape[:-1], multiplies each row's value; a weight of 0
            acts as the mask does. Differentiable.
        labels, ignore_index: integer, shape logits.shape[:-1]; counts rows whose label is not
            ignore_index. With a mask too, both must count a row.
        reduction: "none" (shape logits.shape[:-1]), "sum", "mean" = sum(w D) / sum(w) over counted
            rows (0 if there are none), "batchmean" = sum / logits.shape[0]. Note that the "mean" of
            F.kl_div is per element, V times smaller.
        inplace_grad: backward overwrites policy_logits with their gradient instead of allocating
            one. For logits that nothing else needs: autograd refuses to use them afterwards, and a
            second backward or create_graph raises. A leaf's .grad then shares its memory. Under
            torch.compile the compiler decides whether memory is reused.
        group: a torch.distributed.ProcessGroup whose ranks each hold a slice of the vocabulary, in
            the order of ranks, of any size; docs/sharding.md. No double backward.
        backend: None for the best one (see `explain`), or a name from `backends()`, which then runs
            or raises.

    Returns:
        float32, or float64 if either input is; autocast changes nothing. Gradients come in each
        input's dtype. Values are never negative, exactly 0 for rows that differ by an exactly
        representable constant, +inf where the supports (logits other than -inf) say so; such a
        row's gradient is (p - q) / T to the policy and 0 to the reference. -inf in both rows is
        skipped. NaN, +inf, or nothing but -inf makes that row NaN, and no other.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is accepted.
    """
    definition = divergences.get(kind)
    validation.pair(policy_logits, reference_logits, sliced=group is not None)
    validation.reduction(reduction)
    validation.flag("inplace_grad", inplace_grad)
    shape = policy_logits.shape[:-1]
    if reduction == "batchmean" and not shape:
        raise ValueError('reduction="batchmean" needs logits with a batch dim; got shape [V]')
    if inplace_grad:
        validation.inplace_grad(policy_logits, reference_logits)
    inverse = inverse_temperature(temperature, policy_logits)
    counted = reductions.counted_tokens(policy_logits, mask, labels, ignore_index)
    dtype = reference.result_dtype(policy_logits, reference_logits)
    weights = reductions.token_weights(policy_logits, weight, dtype)
    wanted = needs(policy_logits, reference_logits, *definition.fields)
    name = resolve(backend, policy_logits.device, wanted)
    shards = distributed.shards(
        group, policy_logits, kind=kind, dtype=wanted[:2], temperature=temperature
    )
    x, y = rows(policy_logits), rows(reference_logits)
    read = reductions.rows_to_read(counted, weights)

    def reduced(values: Tensor) -> Tensor:
        tokens = values[0]
        for i in range(1, len(definition.fields)):
            tokens = tokens + values[i]
        return reductions.reduce(tokens, counted, weights, reduction, shape, backend=name)

    fields = definition.fields
    ahead = reduction != "none" and not inplace_grad and shards is None
    if ahead and scalar_loss.gradient_ahead(x, y, weights, name):
        share = reductions.shares(
            shape.numel(), counted, weights, reduction, shape, x, dtype, backend=name
        )
        return scalar_loss.scalar_loss(
            x,
            y,
            fields,
            None,
            inverse,
            read,
            share,
            reduced,
            valid_vocab=None,
            softcap=None,
            backend=name,
        )
    return reduced(
        autograd.row_stats(
            x,
            y,
            None,
            fields,
            None,
            inverse,
            read,
            inplace_grad=inplace_grad,
            shards=shards,
            backend=name,
        )
    )


def forward_kl(
    policy_logits: Tensor,
    reference_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "none",
    inplace_grad: bool = False,
    backend: str | None = None,
) -> Tensor:
    """KL(q || p) = sum q (log q - log p) of every row: what F.kl_div(log p, q) computes.

    p = softmax(policy_logits / T), q = softmax(reference_logits / T); mode-covering, the usual
    distillation loss. Arguments, result, gradients and errors: see `divergence`. Equivalent to::

        log_p, log_q = (torch.log_softmax(z.float() / T, -1) for z in (policy, reference))
        F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)

    Kullback and Leibler, "On Information and Sufficiency", 1951.
    """
    return divergence(
        policy_logits,
        reference_logits,
        "forward_kl",
        temperature=temperature,
        mask=mask,
        weight=weight,
        labels=labels,
        ignore_index=ignore_index,
        reduction=reduction,
        inplace_grad=inplace_grad,
        backend=backend,
    )


def reverse_kl(
    policy_logits: Tensor,
    reference_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "none",
    inplace_grad: bool = False,
    backend: str | None = None,
) -> Tensor:
    """KL(p || q) = sum p (log p - log q) of every row: the KL penalty of RLHF.

    p = softmax(policy_logits / T), q = softmax(reference_logits / T); mode-seeking, also on-policy
    distillation. Arguments, result, gradients and errors: see `divergence`. Equivalent to::

        log_p, log_q = (torch.log_softmax(z.float() / T, -1) for z in (policy, reference))
        F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)

    Kullback and Leibler, "On Information and Sufficiency", 1951.
    """
    return divergence(
        policy_logits,
        reference_logits,
        "reverse_kl",
        temperature=temperature,
        mask=mask,
        weight=weight,
        labels=labels,
        ignore_index=ignore_index,
        reduction=reduction,
        inplace_grad=inplace_grad,
        backend=backend,
    )


def jeffreys(
    policy_logits: Tensor,
    reference_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "none",
    inplace_grad: bool = False,
    backend: str | None = None,
) -> Tensor:
    """KL(q || p) + KL(p || q) = sum (p - q) (log p - log q) of every row, from one read of it.

    p = softmax(policy_logits / T), q = softmax(reference_logits / T). Arguments, result, gradients
    and errors: see `divergence`. Equivalent to::

        log_p, log_q = (torch.log_softmax(z.float() / T, -1) for z in (policy, reference))
        ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)

    Jeffreys, "An Invariant Form for the Prior Probability in Estimation Problems", 1946.
    """
    return divergence(
        policy_logits,
        reference_logits,
        "jeffreys",
        temperature=temperature,
        mask=mask,
        weight=weight,
        labels=labels,
        ignore_index=ignore_index,
        reduction=reduction,
        inplace_grad=inplace_grad,
        backend=backend,
    )
