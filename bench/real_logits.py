"""Logits of a language model over text, against those of itself after one optimizer step.

The model and the text come from demo/, which dequantises the weights once into its cache; run
`make demo` first, or install what the message of a failing run names.
"""

from __future__ import annotations

import functools
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
# The suite's names, the demo's.
SPECS = {"smollm2": "smollm2", "gemma3-270m": "gemma3"}
LEARNING_RATE = 1e-4


def problem(dtype: str, quick: bool) -> Problem:
    """Policy and reference logits [rows, 49152], the distinct ones repeated to the usual size."""
    policy, reference = logits("smollm2")
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


def missing(name: str) -> str:
    """What has to be installed for a model, or "" if it is there."""
    models = _demo("model")
    try:
        models.check(models.SPECS[SPECS[name]])
    except models.MissingPackage as error:
        return str(error)
    return ""


@functools.cache
def logits(name: str) -> tuple[Tensor, Tensor]:
    """fp32 logits of the model after and before one step of Adam's first kind: lr * sign(grad)."""
    models, texts = _demo("model"), _demo("text")
    models.offline()
    spec = models.SPECS[SPECS[name]]
    language_model: Any
    language_model, tokenizer = models.load(spec, models.prepare(spec, models.cache_root()))
    first = tokenizer("a").input_ids[0]
    batch = texts.batches(
        texts.topics(),
        lambda text: tokenizer(text, add_special_tokens=False).input_ids,
        count=1,
        rows=ROWS,
        length=LENGTH,
        seed=0,
        prefix=[first] if first == tokenizer.bos_token_id else [],
    )[0]
    found = language_model(input_ids=batch.inputs).logits.flatten(0, 1)
    reference = found.detach().clone()
    torch.nn.functional.cross_entropy(found, batch.labels.flatten()).backward()
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
