"""Distillation with the Trainer of transformers: a `compute_loss_func`.

    teacher = AutoModelForCausalLM.from_pretrained(...)
    loss = distillation_loss_func(student, teacher, temperature=2.0)
    Trainer(model=student, compute_loss_func=loss, ...).train()

transformers itself is not imported.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from ..functional import divergence
from ..stats import token_stats

__all__ = ["DistillationLossFunc", "distillation_loss_func"]

# What the student's call has and the teacher's must not: they would make it compute a loss.
_NOT_FOR_THE_TEACHER = ("labels", "num_items_in_batch", "shift_labels")


class DistillationLossFunc:
    """What `distillation_loss_func` returns: callable as the Trainer calls it."""

    def __init__(
        self,
        student: torch.nn.Module,
        teacher: torch.nn.Module,
        kind: str,
        temperature: float,
        scale_t2: bool,
        ce_weight: float,
        ignore_index: int,
        options: dict[str, Any],
    ) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.kind, self.temperature, self.scale_t2 = kind, temperature, scale_t2
        self.ce_weight, self.ignore_index, self.options = ce_weight, ignore_index, options
        self._inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._handle = student.register_forward_pre_hook(self._remember, with_kwargs=True)

    def _remember(self, module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {k: v for k, v in kwargs.items() if k not in _NOT_FOR_THE_TEACHER}
        self._inputs = args, given

    def remove(self) -> None:
        """Take the hook off the student."""
        self._handle.remove()
        self._inputs = None

    def _taken_inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._inputs is None:
            raise RuntimeError(
                "the student has not been called since its last loss: distillation_loss_func must "
                "be given the model that the Trainer trains"
            )
        inputs, self._inputs = self._inputs, None
        return inputs

    def _divergence(
        self, student: Tensor, inputs: tuple[tuple[Any, ...], dict[str, Any]], counted: Tensor
    ) -> Tensor:
        args, kwargs = inputs
        with torch.no_grad():
            teacher = self.teacher(*args, **kwargs).logits[:, :-1]
        total = divergence(
            student,
            teacher,
            self.kind,
            temperature=self.temperature,
            mask=counted,
            reduction="sum",
            **self.options,
        )
        return total * self.temperature**2 if self.scale_t2 else total

    def __call__(
        self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
        if labels is None:
            raise ValueError("labels must be in the batch: they say which tokens count; got None")
        inputs, student = self._taken_inputs(), logits[:, :-1]
        labels = labels[:, 1:].to(logits.device)
        counted = labels.long() != self.ignore_index  # a narrow type would wrap that number
        total: Tensor | float = 0.0
        if self.ce_weight < 1:  # 0 times an infinite term is no number
            total = (1 - self.ce_weight) * self._divergence(student, inputs, counted)
        if self.ce_weight:
            shared = {name: self.options[name] for name in self.options.keys() & _OF_BOTH_TERMS}
            logprob = token_stats(
                student, token_ids=labels, fields=("logprob",), mask=counted, **shared
            ).logprob
            assert logprob is not None
            total = total - self.ce_weight * logprob.sum()
        assert isinstance(total, Tensor)
        if num_items_in_batch is None:
            return total / counted.sum().clamp(min=1)
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(total.device)
        return total / num_items_in_batch


def distillation_loss_func(
    student: torch.nn.Module,
    teacher: torch.nn.Module,
    *,
    kind: str = "forward_kl",
    temperature: float = 1.0,
    scale_t2: bool = False,
    ce_weight: float = 0.0,
    ignore_index: int = -100,
    **options: Any,
) -> DistillationLossFunc:
    """A `compute_loss_func` for transformers' Trainer: the divergence from a teacher.

        sum over counted tokens of (1 - ce_weight) [T^2] D(kind) + ce_weight CE, / number of tokens

    The Trainer gives a loss function the outputs and the labels, and not the inputs that the
    teacher needs, so a hook on the student keeps those of its last call. The logits of token i are
    held to label i + 1, as in transformers; labels equal to ignore_index do not count.

    Args:
        student: the model that the Trainer is given.
        teacher: any model with the student's inputs and vocabulary; put into eval mode, its
            parameters without gradients, and run under no_grad.
        kind, temperature, options: as `fusedkl.divergence` has them. The cross-entropy, which is at
            temperature 1, has the same valid_vocab, softcap, logit_scale, group and backend.
        scale_t2: multiply the divergence by T^2.
        ce_weight: the share of the cross-entropy to the labels. At 1 the teacher is not run.

    Returns:
        A callable (outputs, labels, num_items_in_batch=None) -> float32 0-d tensor, nats per token.
        It divides by num_items_in_batch, the Trainer's count over all batches of a gradient
        accumulation step, if that is given, and by its own count otherwise. The Trainer counts
        labels other than -100, whatever ignore_index is. `.remove()` takes the hook off again.

    Raises:
        TypeError, ValueError: naming the argument; what `divergence` raises, at the first call.

    Equivalent, for ce_weight = 0::

        log_p, log_q = (F.log_softmax(m(**inputs).logits[:, :-1] / T, -1) for m in (s, t))
        kl = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
        kl[labels[:, 1:] != -100].sum() / num_items_in_batch

    Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015.
    """
    for name, module in (("student", student), ("teacher", teacher)):
        if not isinstance(module, torch.nn.Module):
            raise TypeError(f"{name} must be a torch.nn.Module; got {type(module).__name__}")
    if not 0 <= ce_weight <= 1:
        raise ValueError(f"ce_weight must be from 0 to 1; got {ce_weight}")
    known = inspect.signature(divergence).parameters
    unknown = sorted(options.keys() - known.keys() | options.keys() & _OURS)
    if unknown:
        raise TypeError(f"unknown options {', '.join(unknown)}")
    return DistillationLossFunc(
        student, teacher, kind, temperature, scale_t2, ce_weight, ignore_index, options
    )


# What says which logits there are, and where.
_OF_BOTH_TERMS = {"valid_vocab", "softcap", "logit_scale", "group", "backend"}
# What divergence takes and this decides.
_OURS = {"policy_logits", "reference_logits", "mask", "labels", "reduction", "weight"}
