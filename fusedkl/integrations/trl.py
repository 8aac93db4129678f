"""TRL's trainers, made faster by one line.

    import fusedkl.integrations.trl

    fusedkl.integrations.trl.patch()  # before or after the trainer is made
    DPOTrainer(...).train()

What is replaced, by version of trl: `VERSIONS`; what that means for each trainer:
docs/integrations.md. Nothing of trl is imported before `patch()` is called.
"""

from __future__ import annotations

from . import trl_functions as ours
from .replacing import Adapter, Part

__all__ = ["VERSIONS", "patch", "unpatch"]

_UTILS = "trl.trainer.utils"
_DISTILLATION = "trl.trainer.distillation_trainer"

_JSD = Part(
    "trl.experimental.gkd.gkd_trainer",
    "GKDTrainer.generalized_jsd_loss",
    "student_logits, teacher_logits, labels=None, beta=0.5, temperature=1.0, "
    "reduction='batchmean', num_items_in_batch=None",
    ours.generalized_jsd_loss,
    optional=True,
)
_ENTROPY = Part(_UTILS, "entropy_from_logits", "logits, chunk_size=128", ours.entropy_from_logits)
_LOGITS_1_10 = (
    Part(_UTILS, "selective_log_softmax", "logits, index", ours.selective_log_softmax),
    _ENTROPY,
    _JSD,
)
_LOGITS_1_14 = (
    Part(
        _UTILS,
        "selective_log_softmax",
        "logits, index, temperature=1.0, row_mask=None",
        ours.selective_log_softmax,
    ),
    Part(
        _UTILS,
        "selective_log_softmax_and_entropy",
        "logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None",
        ours.selective_log_softmax_and_entropy,
    ),
    _ENTROPY,
    _JSD,
)
# From 1.15 on, these trainers score hidden states. The two functions are found through the names
# by which trl's own modules call them.
_HEADS_1_15 = (
    Part(
        _UTILS,
        "_ChunkedLogProbFunction",
        "hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping=None, "
        "logit_scale=1.0, outputs=('entropy', 'log_sum_sq_probs', 'mean_logits', 'is_top1')",
        ours.ChunkedLogProb,
    ),
    Part(
        _DISTILLATION,
        "ChunkedDivergenceFunction",
        "student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, "
        "teacher_bias, beta, temperature=1.0, student_logit_scale=1.0, "
        "student_final_logit_softcapping=None, teacher_logit_scale=1.0, "
        "teacher_final_logit_softcapping=None",
        ours.ChunkedDivergence,
    ),
)
# In these two modules it only says whether masked positions are left out, which on a CPU they
# otherwise are not.
_COMPACT_1_16 = tuple(
    Part(module, "_use_triton", "device", ours.every_position_that_counts, here_only=True)
    for module in (_UTILS, _DISTILLATION)
)

VERSIONS: dict[str, tuple[Part, ...]] = {
    **dict.fromkeys(("1.10", "1.11", "1.12", "1.13"), _LOGITS_1_10),
    "1.14": _LOGITS_1_14,
    "1.15": _LOGITS_1_14 + _HEADS_1_15,
    "1.16": _LOGITS_1_14 + _HEADS_1_15 + _COMPACT_1_16,
}

_ADAPTER = Adapter("trl", VERSIONS)
patch, unpatch = _ADAPTER.patch, _ADAPTER.unpatch
