"""Divergences as trainers compose them from PyTorch's operators, one value per row of logits.

`cast` is what is done to logits first: `upcast` to float32 as careful code does, or `as_is`. In
float64 the same formulas are the truth that contenders are held to.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Cast = Callable[[Tensor], Tensor]


def upcast(logits: Tensor) -> Tensor:
    """To float32; the truth comes in float64 and stays there."""
    return logits if logits.dtype == torch.float64 else logits.float()


def as_is(logits: Tensor) -> Tensor:
    return logits


def forward_kl(policy: Tensor, reference: Tensor, cast: Cast = upcast) -> Tensor:
    """KL(reference || policy)."""
    log_p, log_q = F.log_softmax(cast(policy), -1), F.log_softmax(cast(reference), -1)
    return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)


def reverse_kl(policy: Tensor, reference: Tensor, cast: Cast = upcast) -> Tensor:
    """KL(policy || reference)."""
    return forward_kl(reference, policy, cast)


def jsd(policy: Tensor, reference: Tensor, cast: Cast = upcast, beta: float = 0.5) -> Tensor:
    """The generalized JSD by the operators that TRL runs."""
    student, teacher = F.log_softmax(cast(policy), -1), F.log_softmax(cast(reference), -1)
    mixture = torch.logsumexp(
        torch.stack([student + math.log1p(-beta), teacher + math.log(beta)]), dim=0
    )
    to_teacher = F.kl_div(mixture, teacher, reduction="none", log_target=True)
    to_student = F.kl_div(mixture, student, reduction="none", log_target=True)
    return (beta * to_teacher + (1 - beta) * to_student).sum(-1)


def statistics(
    policy: Tensor, reference: Tensor, ids: Tensor, cast: Cast = upcast
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probability of a token, entropy, KL(policy || reference) and k3, as TRL composes them."""
    log_p, log_q = F.log_softmax(cast(policy), -1), F.log_softmax(cast(reference), -1)
    p = log_p.exp()
    logprob = log_p.gather(-1, ids[:, None]).squeeze(-1)
    ref_logprob = log_q.gather(-1, ids[:, None]).squeeze(-1)
    ratio = ref_logprob - logprob
    k3 = torch.exp(ratio) - ratio - 1
    return logprob, -(p * log_p).sum(-1), (p * (log_p - log_q)).sum(-1), k3


def topk(policy: Tensor, ids: Tensor, logprobs: Tensor, cast: Cast = upcast) -> Tensor:
    """KL(reference || policy) of K tokens and the rest as one more."""
    log_p = F.log_softmax(cast(policy), -1).gather(-1, ids)
    log_q = logprobs.to(log_p.dtype)
    rest_p, rest_q = (torch.log1p(-z.exp().sum(-1)) for z in (log_p, log_q))
    return (log_q.exp() * (log_q - log_p)).sum(-1) + rest_q.exp() * (rest_q - rest_p)
