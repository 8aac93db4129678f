"""Runs of TRL's own trainers on SmolLM2, or on its lowest layers, as log histories."""

from __future__ import annotations

import copy
import importlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

DEMO = Path(__file__).resolve().parents[1] / "demo"
PROMPTS = (
    "A list in Python is",
    "The dictionary maps each key to",
    "Exceptions are raised when",
    "An iterator returns",
)
ANSWERS = (
    " a mutable sequence of values, typically homogeneous.",
    " a value; keys must be hashable, values may be anything at all.",
    " an operation cannot be completed.",
    " one value at a time.",
)


class Models:
    """The weights, read once; each run gets copies."""

    def __init__(self, layers: tuple[int, int] | None, scratch: Path) -> None:
        """layers: how many the student and the teacher have; None: all of them, both.

        The student also lies in a folder in `scratch`, from where GRPO reads its reference.
        """
        import transformers

        sys.path.insert(0, str(DEMO))
        try:
            weights = importlib.import_module("model")
        finally:
            sys.path.remove(str(DEMO))
        self.folder = weights.prepare(weights.SPECS["smollm2"], weights.cache_root())
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder)
        transformers.utils.logging.set_verbosity_error()
        self._teacher = self._cut(layers[1] if layers else None)
        self._student = copy.deepcopy(self._teacher)
        if layers:
            self._student.model.layers = self._student.model.layers[: layers[0]]
            self._student.config.num_hidden_layers = layers[0]
        else:  # two models that differ
            for parameter in self._student.model.layers.parameters():
                parameter.data *= 0.95
        self._student.config.architectures = ["LlamaForCausalLM"]
        self._student.save_pretrained(scratch / "student")
        self._student.config._name_or_path = str(scratch / "student")

    def _cut(self, layers: int | None) -> Any:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(self.folder)
        config.num_hidden_layers = layers or config.num_hidden_layers
        return AutoModelForCausalLM.from_pretrained(
            self.folder, config=config, dtype=torch.float32, local_files_only=True
        )

    def student(self) -> Any:
        return copy.deepcopy(self._student)

    def teacher(self) -> Any:
        return copy.deepcopy(self._teacher)


def common(out: Path, steps: int, rate: float = 2e-5, **more: Any) -> dict[str, Any]:
    """Arguments of every trainer."""
    return dict(
        output_dir=str(out), max_steps=steps, per_device_train_batch_size=2, logging_steps=1,
        learning_rate=rate, lr_scheduler_type="constant", report_to=[], save_strategy="no",
        use_cpu=True, bf16=False, disable_tqdm=True, seed=0, **more,
    )  # fmt: skip


def history(trainer: Any) -> list[dict[str, float]]:
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def distillation(models: Models, out: Path, steps: int, **options: Any) -> list[dict[str, float]]:
    """The student's own completions of a few tokens, graded by the teacher."""
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    arguments = DistillationConfig(**common(out, steps, max_completion_length=6, **options))
    return history(
        DistillationTrainer(
            model=models.student(),
            teacher_model=models.teacher(),
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": list(PROMPTS)}),
            processing_class=models.tokenizer,
        )
    )


def gkd(models: Models, out: Path, steps: int, **options: Any) -> list[dict[str, float]]:
    """Given answers only: the text of others, as half of GKD's batches are."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    rows = [
        [{"role": "user", "content": p}, {"role": "assistant", "content": a}]
        for p, a in zip(PROMPTS, ANSWERS, strict=True)
    ]
    arguments = GKDConfig(**common(out, steps, lmbda=0.0, max_length=64, **options))
    return history(
        GKDTrainer(
            model=models.student(),
            teacher_model=models.teacher(),
            args=arguments,
            train_dataset=Dataset.from_dict({"messages": rows}),
            processing_class=models.tokenizer,
        )
    )


def dpo(models: Models, out: Path, steps: int, **options: Any) -> list[dict[str, float]]:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    data = {
        "prompt": list(PROMPTS),
        "chosen": list(ANSWERS),
        "rejected": [*ANSWERS[1:], ANSWERS[0]],
    }
    arguments = DPOConfig(**common(out, steps, **options))
    return history(
        DPOTrainer(
            model=models.student(),
            ref_model=models.teacher(),
            args=arguments,
            train_dataset=Dataset.from_dict(data),
            processing_class=models.tokenizer,
        )
    )


def grpo(models: Models, out: Path, steps: int, **options: Any) -> list[dict[str, float]]:
    """Recorded completions: the same tokens whatever the policy; longer ones are better."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def recorded(prompts: list[str], trainer: Any) -> dict[str, Any]:
        turns = list(range(len(prompts)))
        return {
            "prompt_ids": [models.tokenizer(p)["input_ids"] for p in prompts],
            "completion_ids": [models.tokenizer(ANSWERS[i % 4])["input_ids"] for i in turns],
            "logprobs": None,
        }

    def length(completions: list[str], **rest: Any) -> list[float]:
        return [math.log(len(text)) for text in completions]

    # GRPO's own rate: at that of the others k3, an exponential, makes 1000 of a whole model's loss
    # on completions that are not its own, and of every rounding
    given = dict(num_generations=2, max_completion_length=24, beta=0.1)
    arguments = GRPOConfig(**common(out, steps, 1e-6, **given, **options))
    return history(
        GRPOTrainer(
            model=models.student(),
            reward_funcs=length,
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": list(PROMPTS)}),
            processing_class=models.tokenizer,
            rollout_func=recorded,
        )
    )


RUNS: dict[str, Callable[..., list[dict[str, float]]]] = {
    "distillation": distillation, "gkd": gkd, "dpo": dpo, "grpo": grpo,
}  # fmt: skip
