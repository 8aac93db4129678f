"""A TRL trainer made faster by one line: DistillationTrainer, with `--fused` or without.

SmolLM2's lowest layers learn from the whole model, on answers of their own. `make demo` installs
the model, `pip install 'fusedkl[trl]'` TRL.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import fusedkl.integrations.trl

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))

import model as weights

QUESTIONS = ("What is a list?", "What is a dictionary?", "What raises an exception?")


def models(teacher_layers: int | None, student_layers: int) -> tuple[Any, Any, Any]:
    """Teacher, student and tokenizer."""
    import transformers

    folder = weights.prepare(weights.SPECS["smollm2"], weights.cache_root())
    transformers.utils.logging.set_verbosity_error()
    found = []
    for layers in (teacher_layers, student_layers):
        language = transformers.AutoModelForCausalLM.from_pretrained(folder)
        language.model.layers = language.model.layers[:layers]
        language.config.num_hidden_layers = len(language.model.layers)
        found.append(language)
    return found[0], found[1], transformers.AutoTokenizer.from_pretrained(folder)


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fused", action="store_true", help="with the one line")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=128, help="of an answer")
    parser.add_argument("--layers", type=int, help="of the teacher; all, if left out")
    options = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    if options.fused:
        fusedkl.integrations.trl.patch()  # the one line

    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    teacher, student, tokenizer = models(options.layers, 2)
    with tempfile.TemporaryDirectory() as out:
        arguments = DistillationConfig(
            output_dir=out,
            max_steps=options.steps,
            per_device_train_batch_size=3,
            max_completion_length=options.tokens,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        )
        trainer = DistillationTrainer(
            model=student,
            teacher_model=teacher,
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": list(QUESTIONS)}),
            processing_class=tokenizer,
        )
        started = time.perf_counter()
        trainer.train()
    seconds = time.perf_counter() - started
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    which = "fusedkl" if options.fused else "TRL"
    print(f"{which}: loss {losses[0]:.4f} -> {losses[-1]:.4f}, {seconds:.1f} s")
    return losses


if __name__ == "__main__":
    main()
