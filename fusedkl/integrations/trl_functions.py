"""TRL's loss functions with TRL's signatures; `fusedkl.integrations.trl` puts them in its place.

trl itself is not imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import distribution, divergences, validation
from ..layout import inverse_temperature, of_no_slice
from ..linear_arguments import Inputs
from ..linear_inputs import inputs_of
from ..named import jsd
from ..stats import token_stats
from .fused_head import head_numbers

OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


class ChunkedLogProb:
    """trl.kernels.ChunkedLogProbFunction: log-probabilities of tokens, from hidden states."""

    @staticmethod
    @torch.compiler.disable
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: Sequence[str] = OUTPUTS,
    ) -> tuple[Tensor | None, ...]:
        """(log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1), [N] each, or None.

        log_probs and entropy are differentiable in hidden [N, H], weight [V, H] and bias [V]; the
        others are metrics. float32. `chunk_size` is not needed. Logits are float32 whatever the
        inputs' dtype, where TRL rounds them to it.
        """
        inputs = _head(
            hidden, weight, bias, temperature, scale=logit_scale, softcap=final_logit_softcapping
        )
        fields = ["logprob"]
        if "entropy" in outputs:
            fields.append("entropy")
        if "log_sum_sq_probs" in outputs:
            fields.append("logsumexp")
        watch = _Metrics(inputs, targets, temperature, outputs)
        inputs = inputs._replace(fields=fields, token_ids=of_no_slice(targets.reshape(-1, 1)))
        found = head_numbers(inputs, watch if watch.wanted else None)
        return (
            found["logprob"],
            found.get("entropy"),
            watch.log_sum_sq_probs(found.get("logsumexp")),
            watch.mean_logits(),
            watch.is_top1(),
        )


class ChunkedDivergence:
    """trl.kernels.chunked_divergence.ChunkedDivergenceFunction: two heads' divergence."""

    @staticmethod
    @torch.compiler.disable
    def apply(
        student_hidden: Tensor,
        student_weight: Tensor,
        student_bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        beta: float,
        temperature: float = 1.0,
        student_logit_scale: float = 1.0,
        student_final_logit_softcapping: float | None = None,
        teacher_logit_scale: float = 1.0,
        teacher_final_logit_softcapping: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(divergence, the student's entropy), [N] float32 each; the entropy has no gradient.

        beta 0: KL(teacher || student), 1: KL(student || teacher), between: `fusedkl.jsd`. The
        gradient flows to the student only.
        """
        (kind,), parameter = divergences.resolve("jsd", float(beta))
        inputs = _head(
            student_hidden, student_weight, student_bias, temperature,
            teacher_hidden.detach(), teacher_weight.detach(),
            None if teacher_bias is None else teacher_bias.detach(),
            scale=student_logit_scale, softcap=student_final_logit_softcapping,
            ref_scale=teacher_logit_scale, ref_softcap=teacher_final_logit_softcapping,
        )  # fmt: skip
        found = head_numbers(inputs._replace(fields=[kind, "entropy"], parameter=parameter))
        return found[kind], found["entropy"].detach()


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """`fusedkl.selective_log_softmax`; float32, and 0 where row_mask (of index's shape) is."""
    if row_mask is None:
        return distribution.selective_log_softmax(logits, index, temperature=temperature)
    counted = row_mask != 0
    rows = counted if index.dim() < logits.dim() else counted.any(-1)
    ids = torch.where(counted, index, 0)
    options: dict[str, Any] = {"temperature": temperature, "mask": rows}
    found = token_stats(logits, None, ids, fields=("logprob",), **options).logprob
    assert found is not None
    return torch.where(counted, found, 0)


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """log p[index] and the entropy from one read of each row; float32, 0 where row_mask is."""
    mask = None if row_mask is None else row_mask != 0
    found = token_stats(
        logits, None, index, fields=("logprob", "entropy"), temperature=temperature, mask=mask
    )
    assert found.logprob is not None and found.entropy is not None
    return found.logprob, found.entropy if entropy_requires_grad else found.entropy.detach()


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """`fusedkl.entropy`; float32. `chunk_size` is not needed."""
    return distribution.entropy(logits)


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """`fusedkl.jsd` summed over the tokens with a label other than -100, divided by

    num_items_in_batch, or, without it: their number (at least 1; the batch size without labels)
    for "batchmean", their number times V for "mean", nothing for "sum". float32.
    """
    validation.one_of("reduction", reduction, ("batchmean", "sum", "mean"))
    counted = None if labels is None else labels != -100
    total = jsd(
        student_logits, teacher_logits, beta=beta,
        temperature=temperature, mask=counted, reduction="sum",
    )  # fmt: skip
    if num_items_in_batch is not None:
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(total.device)
        return total / num_items_in_batch
    if reduction == "sum":
        return total
    if reduction == "mean":
        entries = student_logits.numel()
        return total / (entries if counted is None else counted.sum() * student_logits.shape[-1])
    if counted is None:
        return total / max(student_logits.shape[0], 1)
    return total / counted.sum().clamp(min=1)


def every_position_that_counts(device: torch.device) -> bool:
    """trl's _use_triton where it decides whether masked positions are left out: they are."""
    return True


def _head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    *,
    scale: float,
    softcap: float | None,
    ref_scale: float = 1.0,
    ref_softcap: float | None = None,
) -> Inputs:
    """Arguments of the operators; weights in the dtype of their hidden states, as TRL has them."""
    for name, parameter in (("weight", weight), ("teacher's weight", ref_weight)):
        if hasattr(parameter, "ds_id"):
            raise RuntimeError(
                f"fusedkl.integrations.trl does not know DeepSpeed ZeRO-3's parameters, which are "
                f"partitioned; the {name} is one. Call fusedkl.integrations.trl.unpatch()"
            )
    weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    if ref_hidden is not None and ref_weight is not None:
        ref_weight = ref_weight.to(ref_hidden.dtype)
        ref_bias = None if ref_bias is None else ref_bias.to(ref_hidden.dtype)
    inputs = inputs_of(
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, None, (), None, None,
        (scale, ref_scale), (softcap, ref_softcap), None,
    )  # fmt: skip
    return inputs._replace(inv_temperature=inverse_temperature(temperature, hidden))


class _Metrics:
    """What TRL logs of every token besides: taken from the tiles as they go by."""

    def __init__(
        self, inputs: Inputs, targets: Tensor, temperature: float, outputs: Sequence[str]
    ) -> None:
        self.targets, self.inverse, self.outputs = targets, 1 / temperature, outputs
        self.vocabulary = inputs.weight.shape[0]
        shape, dtype = inputs.hidden.shape[:1], inputs.result_dtype()
        self._sum = inputs.hidden.new_zeros(shape, dtype=dtype)
        self._largest = inputs.hidden.new_full(shape, -torch.inf, dtype=dtype)
        self._squares = self._largest.clone()  # log sum exp(2 logits / T)
        self._argmax = torch.zeros_like(targets)
        self.wanted = any(name in outputs for name in OUTPUTS[1:])

    def __call__(self, x: Tensor, tokens: slice, columns: slice) -> None:
        if "mean_logits" in self.outputs:
            self._sum[tokens] += x.sum(-1)
        if "log_sum_sq_probs" in self.outputs:
            squares = torch.logsumexp(x * (2 * self.inverse), -1)
            self._squares[tokens] = torch.logaddexp(self._squares[tokens], squares)
        if "is_top1" in self.outputs:
            at = x.argmax(-1, keepdim=True)  # the first of equals, here and between tiles
            top, before = x.gather(-1, at).squeeze(-1), self._largest[tokens]
            found = at.squeeze(-1) + columns.start
            self._argmax[tokens] = torch.where(top > before, found, self._argmax[tokens])
            self._largest[tokens] = torch.maximum(before, top)

    def mean_logits(self) -> Tensor | None:
        asked = "mean_logits" in self.outputs
        return self._sum * (self.inverse / self.vocabulary) if asked else None

    def is_top1(self) -> Tensor | None:
        return self._argmax == self.targets if "is_top1" in self.outputs else None

    def log_sum_sq_probs(self, logsumexp: Tensor | None) -> Tensor | None:
        if "log_sum_sq_probs" not in self.outputs or logsumexp is None:
            return None
        return self._squares - 2 * logsumexp.detach()
