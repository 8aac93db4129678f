"""Megatron-LM's cross-entropies of sharded vocabularies by fusedkl; log p, entropy and KL too.

    import fusedkl.integrations.megatron

    fusedkl.integrations.megatron.patch()  # in every process, before the model is built

Nothing of megatron is imported before `patch()` is called, or a function is without its group.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..distillation import distillation_loss
from ..distribution import entropy, selective_log_softmax
from ..functional import divergence
from ..stats import token_stats
from .replacing import Adapter, Part

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "VERSIONS",
    "fused_vocab_parallel_cross_entropy",
    "patch",
    "unpatch",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_entropy",
    "vocab_parallel_kl_div",
    "vocab_parallel_log_probs_from_logits",
]


def _group(tp_group: ProcessGroup | None) -> Any:
    if tp_group is not None:
        return tp_group
    state = importlib.import_module("megatron.core.parallel_state")
    return state.get_tensor_model_parallel_group()


def vocab_parallel_cross_entropy(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    label_smoothing: float = 0.0,
    tp_group: ProcessGroup | None = None,
) -> Tensor:
    """-log p[target] per token, float32: logits [s, b, V / ranks], target [s, b] of all V.

    A target below 0, such as -100, gives 0 and no gradient; Megatron's gives the log of a sum of
    exps, for a loss mask to drop. The logits stay as they are. label_smoothing is spread over the
    V - 1 other tokens of the whole vocabulary; Megatron's spreads it over the rank's own slice, so
    that its ranks disagree.
    """
    group = _group(tp_group)
    counted = target >= 0
    if label_smoothing == 0:
        logprob = token_stats(
            vocab_parallel_logits,
            token_ids=target,
            fields=("logprob",),
            mask=counted,
            group=group,
        ).logprob
        assert logprob is not None
        return -logprob
    # Megatron's slices are of one size
    vocabulary = vocab_parallel_logits.shape[-1] * group.size()
    return distillation_loss(
        vocab_parallel_logits,
        vocab_parallel_logits.detach(),
        target,
        ce_weight=1.0,
        label_smoothing=label_smoothing * vocabulary / (vocabulary - 1),
        mask=counted,
        reduction="none",
        group=group,
    )


def fused_vocab_parallel_cross_entropy(
    vocab_parallel_logits: Tensor, target: Tensor, tp_group: ProcessGroup | None = None
) -> Tensor:
    """-log p[target] per token, float32: logits [s, b, V / ranks], target [s, b] of all V."""
    return vocab_parallel_cross_entropy(vocab_parallel_logits, target, tp_group=tp_group)


def _fused_without_group(vocab_parallel_logits: Tensor, target: Tensor) -> Tensor:
    return vocab_parallel_cross_entropy(vocab_parallel_logits, target)


def vocab_parallel_log_probs_from_logits(
    logits: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    tp_group: ProcessGroup | None = None,
) -> Tensor:
    """log p[labels] at a temperature, float32: logits [..., V / ranks], labels [...] of all V."""
    group = _group(tp_group)
    return selective_log_softmax(logits, labels, temperature=temperature, group=group)


def vocab_parallel_entropy(
    vocab_parallel_logits: Tensor,
    temperature: float | Tensor = 1.0,
    tp_group: ProcessGroup | None = None,
) -> Tensor:
    """-sum p log p per token, float32, of logits [..., V / ranks]; differentiable."""
    group = _group(tp_group)
    return entropy(vocab_parallel_logits, temperature=temperature, group=group)


def vocab_parallel_kl_div(
    student_logits: Tensor,
    teacher_logits: Tensor,
    reverse: bool = False,
    temperature: float | Tensor = 1.0,
    tp_group: ProcessGroup | None = None,
) -> Tensor:
    """KL(teacher || student) per token, or with reverse KL(student || teacher); float32, no T^2.

    Logits [..., V / ranks]; both may require a gradient. Other kinds: `fusedkl.divergence(...,
    group=)`.
    """
    kind = "reverse_kl" if reverse else "forward_kl"
    group = _group(tp_group)
    return divergence(student_logits, teacher_logits, kind, temperature=temperature, group=group)


_PLAIN = Part(
    "megatron.core.tensor_parallel.cross_entropy",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_logits, target, label_smoothing=0.0",
    vocab_parallel_cross_entropy,
)
_FUSIONS = "megatron.core.fusions.fused_cross_entropy"
_FUSED = "fused_vocab_parallel_cross_entropy"
_PARTS = (
    _PLAIN,
    Part(
        _FUSIONS,
        _FUSED,
        "vocab_parallel_logits, target, tp_group",
        fused_vocab_parallel_cross_entropy,
    ),
)

VERSIONS: dict[str, tuple[Part, ...]] = {
    "0.11": (_PLAIN, Part(_FUSIONS, _FUSED, "vocab_parallel_logits, target", _fused_without_group)),
    **dict.fromkeys(("0.12", "0.13", "0.14", "0.15", "0.16"), _PARTS),
}

_ADAPTER = Adapter("megatron", VERSIONS, source="megatron.core")
patch, unpatch = _ADAPTER.patch, _ADAPTER.unpatch
