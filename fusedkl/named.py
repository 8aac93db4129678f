"""Named forms of `divergence`, one for each of its kinds."""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor
from torch.distributed import ProcessGroup
from typing_extensions import Unpack

from .functional import divergence


class DivergenceOptions(TypedDict, total=False):
    """Options of every kind; their meaning and defaults: `divergence`."""

    temperature: float | Tensor
    mask: Tensor | None
    weight: Tensor | None
    labels: Tensor | None
    ignore_index: int
    reduction: str
    valid_vocab: int | None
    softcap: float | None
    logit_scale: float
    inplace_grad: bool
    group: ProcessGroup | None
    backend: str | None


def forward_kl(
    policy_logits: Tensor, reference_logits: Tensor, **options: Unpack[DivergenceOptions]
) -> Tensor:
    """KL(q || p) = sum q (log q - log p) of every row: what F.kl_div(log p, q) computes.

    p = softmax(policy_logits / T), q = softmax(reference_logits / T); mode-covering, the usual
    distillation loss. Options, shapes, dtypes, gradients and errors: `divergence`. Equivalent to::

        log_p, log_q = (torch.log_softmax(z.float() / T, -1) for z in (policy, reference))
        F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)

    Kullback and Leibler, "On Information and Sufficiency", 1951.
    """
    return divergence(policy_logits, reference_logits, "forward_kl", **options)


def reverse_kl(
    policy_logits: Tensor, reference_logits: Tensor, **options: Unpack[DivergenceOptions]
) -> Tensor:
    """KL(p || q) = sum p (log p - log q) of every row: the KL penalty of RLHF.

    p = softmax(policy_logits / T), q = softmax(reference_logits / T); mode-seeking, also on-policy
    distillation. Options, shapes, dtypes, gradients and errors: `divergence`. Equivalent to::

        log_p, log_q = (torch.log_softmax(z.float() / T, -1) for z in (policy, reference))
        F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)

    Kullback and Leibler, "On Information and Sufficiency", 1951.
    """
    return divergence(policy_logits, reference_logits, "reverse_kl", **options)


def jeffreys(
    policy_logits: Tensor, reference_logits: Tensor, **options: Unpack[DivergenceOptions]
) -> Tensor:
    """KL(q || p) + KL(p || q) = sum (p - q) (log p - log q) of every row, from one read of it.

    p = softmax(policy_logits / T), q = softmax(reference_logits / T). Options, shapes, dtypes,
    gradients and errors: `divergence`. Equivalent to::

        log_p, log_q = (torch.log_softmax(z.float() / T, -1) for z in (policy, reference))
        ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)

    Jeffreys, "An Invariant Form for the Prior Probability in Estimation Problems", 1946.
    """
    return divergence(policy_logits, reference_logits, "jeffreys", **options)


def jsd(
    policy_logits: Tensor,
    reference_logits: Tensor,
    *,
    beta: float = 0.5,
    **options: Unpack[DivergenceOptions],
) -> Tensor:
    """Generalized Jensen-Shannon divergence beta KL(q || m) + (1 - beta) KL(p || m) of every row.

    m = (1 - beta) p + beta q; nats, at most the entropy of (beta, 1 - beta), ln 2 at the default.
    beta = 0 is exactly forward_kl and beta = 1 exactly reverse_kl, as in TRL, although the limits
    there are 0. A beta below 0.01 or above 0.99 takes double on cpu and cuda, which is slow, and
    loses digits on triton (docs/numerics.md). Options, shapes, dtypes, gradients and errors:
    `divergence`. Equivalent to::

        log_p, log_q = (torch.log_softmax(z.float() / T, -1) for z in (policy, reference))
        log_m = torch.logsumexp(torch.stack([log_p + log(1 - beta), log_q + log(beta)]), 0)
        to_m = [(z.exp() * (z - log_m)).sum(-1) for z in (log_q, log_p)]
        beta * to_m[0] + (1 - beta) * to_m[1]

    Lin, "Divergence Measures Based on the Shannon Entropy", 1991; the convention of beta is that of
    Agarwal et al., "On-Policy Distillation of Language Models", 2024, as TRL has it.
    """
    return divergence(policy_logits, reference_logits, "jsd", beta=beta, **options)


def skew_kl(
    policy_logits: Tensor,
    reference_logits: Tensor,
    *,
    alpha: float = 0.1,
    **options: Unpack[DivergenceOptions],
) -> Tensor:
    """KL(q || alpha q + (1 - alpha) p) of every row, 0 < alpha < 1: at most -log(alpha) nats.

    An alpha below 0.02 or above 0.95 takes double on cpu and cuda, which is slow, and loses digits
    on triton (docs/numerics.md).
    Options, shapes, dtypes, gradients and errors: `divergence`. Equivalent to::

        log_p, log_q = (torch.log_softmax(z.float() / T, -1) for z in (policy, reference))
        log_m = torch.logsumexp(torch.stack([log_q + log(alpha), log_p + log(1 - alpha)]), 0)
        (log_q.exp() * (log_q - log_m)).sum(-1)

    Lee, "On the Effectiveness of the Skew Divergence for Statistical Language Analysis", 2001; for
    distillation Ko et al., "DistiLLM", 2024.
    """
    return divergence(policy_logits, reference_logits, "skew_kl", alpha=alpha, **options)


def renyi(
    policy_logits: Tensor,
    reference_logits: Tensor,
    *,
    alpha: float,
    **options: Unpack[DivergenceOptions],
) -> Tensor:
    """D_alpha(q || p) = log(sum q^alpha p^(1 - alpha)) / (alpha - 1) of every row, alpha > 0.

    Nats. alpha = 1 is exactly forward_kl. An alpha within 0.01 of 1 or above 1000 takes double on
    cpu and cuda, which is slow, and loses digits on triton (docs/numerics.md). Options, shapes,
    dtypes, gradients and errors: `divergence`. Equivalent to::

        log_p, log_q = (torch.log_softmax(z.float() / T, -1) for z in (policy, reference))
        torch.logsumexp(alpha * log_q + (1 - alpha) * log_p, -1) / (alpha - 1)

    Renyi, "On Measures of Entropy and Information", 1961.
    """
    return divergence(policy_logits, reference_logits, "renyi", alpha=alpha, **options)


def tvd(
    policy_logits: Tensor, reference_logits: Tensor, **options: Unpack[DivergenceOptions]
) -> Tensor:
    """Total variation distance sum |p - q| / 2 of every row, from 0 to 1.

    The gradient takes sign(0) = 0. Options, shapes, dtypes, gradients and errors: `divergence`.
    Equivalent to::

        p, q = (torch.softmax(z.float() / T, -1) for z in (policy, reference))
        (p - q).abs().sum(-1) / 2

    Levin and Peres, "Markov Chains and Mixing Times", 2017, section 4.1.
    """
    return divergence(policy_logits, reference_logits, "tvd", **options)


def hellinger(
    policy_logits: Tensor, reference_logits: Tensor, **options: Unpack[DivergenceOptions]
) -> Tensor:
    """Squared Hellinger distance 1 - sum sqrt(p q) of every row, from 0 to 1.

    Options, shapes, dtypes, gradients and errors: `divergence`. Equivalent to::

        p, q = (torch.softmax(z.float() / T, -1) for z in (policy, reference))
        (p.sqrt() - q.sqrt()).square().sum(-1) / 2

    Hellinger, "Neue Begruendung der Theorie quadratischer Formen", 1909.
    """
    return divergence(policy_logits, reference_logits, "hellinger", **options)
