"""verl's log-probabilities, entropies, KL penalties and top-k distillation, by fusedkl.

    import fusedkl.integrations.verl

    fusedkl.integrations.verl.patch()  # in every worker, before it builds its engine

docs/integrations.md says where workers can run that. Nothing of verl is imported before.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ..distribution import entropy, selective_log_softmax
from ..named import reverse_kl
from ..penalties import kl_estimate
from .estimates import bounded_estimate
from .replacing import Adapter, Part

__all__ = ["VERSIONS", "patch", "unpatch"]

_ESTIMATES = {
    "kl": "k1", "k1": "k1", "abs": "abs", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3",
}  # fmt: skip


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """log p[labels], float32, shape logits.shape[:-1]. Logits stay as they are in backward."""
    return selective_log_softmax(logits, labels)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """-sum p log p, float32, shape logits.shape[:-1]."""
    return entropy(logits)


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """The same: there is nothing to cut in chunks."""
    return entropy(logits)


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """Per-token KL(policy || reference): estimated from log-probabilities, or exact from logits.

        kl, k1   log p - log q            mse, k2          (log p - log q)^2 / 2
        abs      |log p - log q|          low_var_kl, k3   q/p - 1 - log(q/p), at most 10
        full     sum p (log p - log q), of logits [batch, length, V] in place of log-probabilities

    and, with a "+" at the end, that value with the gradient of k2. float32.
    """
    kind = kl_penalty.removesuffix("+")
    if kind == "full":
        if logprob.dim() < 3:
            raise ValueError(
                'kl_penalty "full" takes logits of shape [batch, length, V] for logprob and '
                f"ref_logprob; got shape {list(logprob.shape)}, as of sampled tokens"
            )
        return reverse_kl(logprob, ref_logprob)
    if kind not in _ESTIMATES:
        # the type that verl's own function raises for a penalty it does not know
        raise NotImplementedError(
            f"kl_penalty must be one of {', '.join(_ESTIMATES)}, full; got {kl_penalty!r}"
        )
    estimate = _ESTIMATES[kind]
    value = bounded_estimate(logprob, ref_logprob, estimate, 10 if estimate == "k3" else None)
    if kind == kl_penalty:
        return value
    square = kl_estimate(logprob, ref_logprob, "k2")
    return value.detach() + (square - square.detach())


def compute_forward_kl_topk(
    student_logits: Tensor,
    teacher_topk_log_probs: Tensor,
    teacher_topk_ids: Tensor,
    config: Any,
    data_format: str,
) -> dict[str, Tensor]:
    """sum q (log q - log p) over the teacher's K tokens, without log-probabilities [1, nnz, V].

    student_logits [1, nnz, V]; the teacher's are nested, with values [nnz, K]. Returns float32
    [1, nnz]: distillation_losses, student_mass and teacher_mass on those tokens, overlap_count and
    overlap_token_advantage with the student's own K likeliest tokens.
    """
    ids, log_q = (t.values().unsqueeze(0) for t in (teacher_topk_ids, teacher_topk_log_probs))
    ulysses = importlib.import_module("verl.utils.ulysses")
    if ulysses.get_ulysses_sequence_parallel_world_size() > 1:
        ids, log_q = (ulysses.slice_input_tensor(t, dim=1) for t in (ids, log_q))
    if not ids.shape[:2] == log_q.shape[:2] == student_logits.shape[:2]:
        raise ValueError(
            f"teacher_topk_ids {list(ids.shape)} and teacher_topk_log_probs {list(log_q.shape)} "
            f"must have the tokens of student_logits, {list(student_logits.shape)}"
        )
    log_q = log_q.float()
    log_p = selective_log_softmax(student_logits, ids)
    masses = [t.exp().sum(-1) for t in (log_p, log_q)]
    floor = config.distillation_loss.log_prob_min_clamp
    if floor is not None:
        log_p, log_q = log_p.clamp_min(floor), log_q.clamp_min(floor)
    terms = log_q.exp() * (log_q - log_p)
    own = student_logits.topk(ids.shape[-1], dim=-1).indices
    shared = (ids.unsqueeze(-1) == own.unsqueeze(-2)).any(-1)
    count = shared.sum(-1)
    advantage = torch.where(shared, -terms, 0).sum(-1) / count.clamp(min=1)
    return {
        "distillation_losses": terms.sum(-1),
        "student_mass": masses[0],
        "teacher_mass": masses[1],
        "overlap_count": count,
        "overlap_token_advantage": advantage,
    }


_FUNCTIONAL = "verl.utils.torch_functional"
_RL = (
    Part(
        _FUNCTIONAL,
        "logprobs_from_logits",
        "logits, labels, inplace_backward=True",
        logprobs_from_logits,
    ),
    Part(_FUNCTIONAL, "entropy_from_logits", "logits", entropy_from_logits),
    Part(
        _FUNCTIONAL,
        "entropy_from_logits_with_chunking",
        "logits, chunk_size=2048",
        entropy_from_logits_with_chunking,
    ),
    Part(
        "verl.trainer.ppo.core_algos", "kl_penalty", "logprob, ref_logprob, kl_penalty", kl_penalty
    ),
)
_DISTILLATION = Part(
    "verl.trainer.distillation.fsdp.losses",
    "compute_forward_kl_topk",
    "student_logits, teacher_topk_log_probs, teacher_topk_ids, config, data_format",
    compute_forward_kl_topk,
)

VERSIONS: dict[str, tuple[Part, ...]] = {
    **dict.fromkeys(("0.5", "0.6", "0.7"), _RL),
    **dict.fromkeys(("0.8", "0.9", "0.10"), (*_RL, _DISTILLATION)),
}

_ADAPTER = Adapter("verl", VERSIONS)
patch, unpatch = _ADAPTER.patch, _ADAPTER.unpatch
