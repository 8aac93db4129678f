"""Logits of a language model over text: SmolLM2 against itself after one optimizer step.

The model and the text come from demo/, which dequantises the weights once into its cache; run
`make demo` first, or install what the message of a failing run names.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import cases
import torch
from cases import DTYPES, Problem
from torch import Tensor

# Enough rows that differ, in positions and confidence, and still quick to check in float64.
ROWS, LENGTH = 2, 128
LEARNING_RATE = 1e-4


def problem(dtype: str, quick: bool) -> Problem:
    """Policy and reference logits [rows, 49152], the distinct ones repeated to the usual size."""
    policy, reference = _logits()
    distinct, vocabulary = reference.shape
    rows = 64 if quick else cases.rows_for(vocabulary, DTYPES[dtype], False)
    distinct = min(distinct, rows)
    return Problem(
        f"SmolLM2 {dtype} {rows}x{vocabulary}",
        dtype,
        cases.repeat(policy[:distinct], rows, dtype),
        cases.repeat(reference[:distinct], rows, dtype),
        distinct,
    )


def _logits() -> tuple[Tensor, Tensor]:
    """fp32 logits of the model after and before one step of Adam's first kind: lr * sign(grad)."""
    models, texts = _demo("model"), _demo("text")
    models.offline()
    spec = models.SPECS["smollm2"]
    language_model: Any
    language_model, tokenizer = models.load(spec, models.prepare(spec, models.cache_root()))
    batch = texts.batches(
        texts.topics(), tokenizer.encode, count=1, rows=ROWS, length=LENGTH, seed=0
    )[0]
    logits = language_model(input_ids=batch.inputs).logits
    reference = logits.detach().flatten(0, 1).clone()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten()).backward()
    with torch.no_grad():
        for parameter in language_model.parameters():
            if parameter.grad is not None:
                parameter -= LEARNING_RATE * parameter.grad.sign()
        policy = language_model(input_ids=batch.inputs).logits.flatten(0, 1)
    return policy, reference


def _demo(name: str) -> ModuleType:
    folder = str(Path(__file__).resolve().parent.parent / "demo")
    # Behind everything else: demo/ has files of the same names as bench/.
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)
