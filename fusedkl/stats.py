"""Every per-token number that an RL or distillation step needs, from one read of its rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from . import autograd, distributed, divergences, dtensors, reductions, validation
from .backends import needs, resolve
from .layout import inverse_temperature, rows
from .layout import token_ids as operator_ids
from .reference_parts import gap

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class TokenStats(NamedTuple):
    """Per-token numbers in nats; those not asked for are None.

    Shape logits.shape[:-1]; logprob, ref_logprob and log_ratio have the shape of token_ids.
    """

    logprob: Tensor | None = None
    ref_logprob: Tensor | None = None
    entropy: Tensor | None = None
    ref_entropy: Tensor | None = None
    logsumexp: Tensor | None = None
    ref_logsumexp: Tensor | None = None
    forward_kl: Tensor | None = None
    reverse_kl: Tensor | None = None
    log_ratio: Tensor | None = None

    @property
    def k1(self) -> Tensor:
        """log p - log q of the token: unbiased for KL(p || q) under tokens drawn from p."""
        if self.log_ratio is None:
            raise ValueError(
                "k1, k2 and k3 need log_ratio: token_stats with reference_logits and token_ids, "
                "and log_ratio among its fields"
            )
        return self.log_ratio

    @property
    def k2(self) -> Tensor:
        """k1^2 / 2."""
        return self.k1.square() / 2

    @property
    def k3(self) -> Tensor:
        """exp(-k1) - 1 + k1 >= 0, to full relative accuracy near 0: also unbiased."""
        value: Tensor = gap(-self.k1)
        return value


def token_stats(
    policy_logits: Tensor,
    reference_logits: Tensor | None = None,
    token_ids: Tensor | None = None,
    *,
    fields: Sequence[str] | None = None,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    valid_vocab: int | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    group: ProcessGroup | None = None,
    backend: str | None = None,
) -> TokenStats:
    """Log-probabilities of tokens, entropies, logsumexps and both KLs of every row, in one call.

    With p = softmax(policy_logits / T), q = softmax(reference_logits / T), a a token id::

        logprob     log p[a]                 ref_logprob     log q[a]
        entropy     -sum p log p             ref_entropy     -sum q log q
        logsumexp   log sum exp(policy / T)  ref_logsumexp   log sum exp(reference / T)
        forward_kl  sum q (log q - log p)    reverse_kl      sum p (log p - log q)
        log_ratio   log p[a] - log q[a], from the difference of the logits: where it is small it
                    has digits that the difference of two log-probabilities has lost

    Equivalent to, but for accuracy and one pass over memory::

        log_p, log_q = (torch.log_softmax(z.float() / T, -1) for z in (policy, reference))
        logprob = log_p.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        reverse_kl = (log_p.exp() * (log_p - log_q)).sum(-1)

    Args:
        policy_logits: [..., V], float32, bfloat16, float16 or float64. Differentiable.
        reference_logits: the same shape and device (with valid_vocab the last dim may differ), or
            None for the policy's half. Differentiable.
        token_ids: int64, shape logits.shape[:-1] or that and one dim K more, from 0 to V - 1.
        fields: the names wanted; the others are None and cost nothing. All that the arguments
            allow, if left out.
        temperature: T > 0, a number or a float tensor, 0-d or of shape logits.shape[:-1].
        mask: bool, shape logits.shape[:-1], True = counted. Other rows are not read: they give
            exactly 0 and exactly zero gradient, and their token ids may be anything.
        valid_vocab, softcap, logit_scale, group: as in `divergence`; token_ids are those of the
            whole vocabulary. DTensors as there.
        backend: None, or a name from `backends()`.

    Returns:
        TokenStats, float32, or float64 if either input is that the fields need; its k1, k2 and k3
        are estimates of KL(p || q) from the given tokens. Any combination of fields is
        differentiated by one sweep.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is accepted.

    Kullback and Leibler, 1951; Shannon, 1948; k1, k2, k3: Schulman, "Approximating KL Divergence",
    2020.
    """
    if dtensors.given(policy_logits, reference_logits):
        out: TokenStats = dtensors.per_token(
            token_stats,
            {"policy_logits": policy_logits, "reference_logits": reference_logits},
            token_ids=token_ids,
            fields=fields,
            temperature=temperature,
            mask=mask,
            valid_vocab=valid_vocab,
            softcap=softcap,
            logit_scale=logit_scale,
            group=group,
            backend=backend,
        )
        return out
    sliced = group is not None
    validation.logits("policy_logits", policy_logits, sliced)
    if reference_logits is not None:
        validation.pair(policy_logits, reference_logits, valid_vocab, sliced)
    elif valid_vocab is not None and not sliced:
        validation.vocabulary(valid_vocab, policy_logits)
    if token_ids is not None:
        validation.token_index("token_ids", token_ids, policy_logits)
    softcap = validation.controls(softcap, logit_scale)
    wanted = wanted_fields(fields, reference_logits is not None, token_ids is not None)
    inverse = inverse_temperature(temperature, policy_logits, logit_scale)
    counted = reductions.counted_tokens(policy_logits, mask, None, -100)
    paired = any(divergences.FIELDS[name].needs_reference for name in wanted)
    ids = None
    if token_ids is not None and any(divergences.FIELDS[name].needs_token_ids for name in wanted):
        ids = operator_ids(token_ids, policy_logits)
    needed = needs(policy_logits, reference_logits, *wanted, softcap=softcap)
    name = resolve(backend, policy_logits.device, needed)
    shards = distributed.shards(
        group,
        policy_logits,
        valid_vocab=valid_vocab,
        kind=" ".join(wanted),
        dtype=" ".join(needed[:2]),
        temperature=temperature,
        softcap=softcap,
        ids=None if ids is None else ids.shape[1],
        ids_name=None if ids is None else "token_ids",
    )
    values = autograd.row_stats(
        rows(policy_logits),
        rows(reference_logits) if reference_logits is not None and paired else None,
        ids,
        wanted,
        None,
        inverse,
        counted,
        valid_vocab=valid_vocab,
        softcap=softcap,
        shards=shards,
        backend=name,
    )
    return packed(values, wanted, token_ids, policy_logits)


def packed(
    values: Tensor, wanted: tuple[str, ...], token_ids: Tensor | None, like: Tensor
) -> TokenStats:
    """Values [R, N] of an operator, in the shape of token_ids or of like.shape[:-1]."""
    found: dict[str, Tensor] = {}
    shape = like.shape[:-1]
    per_token = 1
    if token_ids is not None and token_ids.dim() == like.dim():
        per_token = token_ids.shape[-1]
    at = 0
    for name in wanted:  # not by split(), of whose outputs none may be written to
        if divergences.FIELDS[name].needs_token_ids:
            assert token_ids is not None
            found[name] = values[at : at + per_token].t().reshape(token_ids.shape)
            at += per_token
        else:
            found[name] = values[at].reshape(shape)
            at += 1
    return TokenStats(**found)


def wanted_fields(fields: Sequence[str] | None, reference: bool, tokens: bool) -> tuple[str, ...]:
    """The fields of one call, in the order of TokenStats."""
    definitions = {name: divergences.FIELDS[name] for name in TokenStats._fields}
    if fields is None:
        return tuple(
            name
            for name, field in definitions.items()
            if (reference or not field.needs_reference) and (tokens or not field.needs_token_ids)
        )
    if isinstance(fields, str) or not isinstance(fields, Iterable):
        raise TypeError(f"fields must be a sequence of names; got {fields!r}")
    chosen = tuple(fields)
    for name in chosen:
        if name not in definitions:
            raise ValueError(f"fields must be of {', '.join(definitions)}; got {name!r}")
        if definitions[name].needs_reference and not reference:
            raise ValueError(f"fields: {name} needs reference_logits")
        if definitions[name].needs_token_ids and not tokens:
            raise ValueError(f"fields: {name} needs token_ids")
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"fields must name at least one, and each once; got {list(chosen)}")
    return chosen
