"""What the recipes share: a model to play with, text, sampling, and the look of the figures.

`--model smollm2` is SmolLM2-135M-Instruct, loaded as the demo loads it (`make demo` installs what
that needs); `--model tiny` is a model of 128 characters, trained for a second, for a first look.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws to a file; no display is needed

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import fusedkl

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))

import text

BLUE, ORANGE, GREY = "#0050a0", "#e69f00", "#8a939c"


class Tiny(nn.Module):
    """Next-character logits [B, T, 128] from the last `context` ones: embeddings and two layers."""

    def __init__(self, width: int = 48, context: int = 6, vocabulary: int = 128) -> None:
        super().__init__()
        self.context = context
        self.embed = nn.Embedding(vocabulary, width)
        self.hidden = nn.Linear(context * width, width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        padded = nn.functional.pad(ids, (self.context - 1, 0))
        seen = self.embed(padded.unfold(1, self.context, 1)).flatten(2)
        logits: Tensor = self.head(torch.tanh(self.hidden(seen)))
        return logits


class Whole(nn.Module):
    """A model of transformers, as a function from ids to logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(ids, use_cache=False).logits
        return logits


@dataclass
class Language:
    """A model and its tokens."""

    name: str
    model: nn.Module
    encode: Callable[[str], list[int]]
    spelling: list[str]  # of every token

    def batches(self, count: int, rows: int, length: int, seed: int = 0) -> list[text.Batch]:
        """Python's documentation, which every Python carries."""
        return text.batches(
            text.topics(), self.encode, count=count, rows=rows, length=length, seed=seed
        )

    def smaller(self) -> nn.Module:
        """A student: fewer units, or the lower half of the layers."""
        if isinstance(self.model, Tiny):
            return Tiny(width=16)
        student: Any = copy.deepcopy(self.model)
        layers = student.model.model.layers
        student.model.model.layers = layers[: len(layers) // 2]
        smaller: nn.Module = student.requires_grad_(True)
        return smaller

    def wanted(self, letters: str = "aeiou") -> Tensor:
        """bool [V]: the tokens that hold one of the letters, a reward that needs no judge."""
        return torch.tensor(
            [any(letter in word.lower() for letter in letters) for word in self.spelling]
        )


_LEARNT: dict[int, dict[str, Tensor]] = {}


def _learnt(seed: int, language: Language) -> dict[str, Tensor]:
    """Weights after a second of reading: enough to have preferences. Once per process."""
    if seed not in _LEARNT:
        optimise = optimizer(language.model, 1e-2)
        for batch in language.batches(150, 8, 64, seed):
            logits = language.model(batch.inputs).flatten(0, 1)
            optimise.zero_grad()
            nn.functional.cross_entropy(logits, batch.labels.flatten()).backward()
            optimise.step()
        _LEARNT[seed] = copy.deepcopy(language.model.state_dict())
    return _LEARNT[seed]


def load(name: str, seed: int = 0) -> Language:
    """The model called `name` and its tokens; the same for the same seed."""
    torch.manual_seed(seed)
    if name == "tiny":

        def ascii_codes(string: str) -> list[int]:
            return list(string.encode("ascii", "replace"))

        language = Language(name, Tiny(), ascii_codes, [chr(code) for code in range(128)])
        language.model.load_state_dict(_learnt(seed, language))
        return language
    import model as models

    models.offline()
    spec = models.SPECS[name]
    prepared = models.prepare(spec, models.cache_root())
    model, tokenizer = models.load(spec, prepared)
    model.set_attn_implementation("eager")  # forward mode differentiates it

    def encode(string: str) -> list[int]:
        ids: list[int] = tokenizer(string)["input_ids"]
        return ids

    spelling = tokenizer.convert_ids_to_tokens(list(range(model.config.vocab_size)))
    return Language(name, Whole(model), encode, spelling)


def frozen(model: nn.Module) -> nn.Module:
    """A copy that is not trained: a reference, or the policy of before."""
    return copy.deepcopy(model).requires_grad_(False)


def optimizer(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.Adam([w for w in model.parameters() if w.requires_grad], lr=rate)


@torch.no_grad()
def sample(model: nn.Module, prompts: Tensor, tokens: int) -> Tensor:
    """Prompts [B, T] continued by `tokens` tokens drawn from the model."""
    ids = prompts
    for _ in range(tokens):
        p = model(ids)[:, -1].float().softmax(-1)
        ids = torch.cat([ids, torch.multinomial(p, 1)], 1)
    return ids


def logprobs(logits: Tensor, ids: Tensor, tokens: int) -> Tensor:
    """log p [B, tokens] of the last `tokens` of ids [B, T], from logits [B, T, V]."""
    return fusedkl.selective_log_softmax(answers(logits, tokens), ids[:, -tokens:])


def answers(logits: Tensor, tokens: int) -> Tensor:
    """The rows [B, tokens, V] that predict the last `tokens` tokens; no copy."""
    return logits[:, -tokens - 1 : -1]


def arguments(
    description: str | None,
    argv: list[str] | None,
    *,
    steps: int,
    model: bool = True,
    models: tuple[str, ...] = ("tiny", "smollm2"),
) -> argparse.Namespace:
    """The options that all recipes have."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n", 1)[0])
    if model:
        parser.add_argument("--model", choices=models, default="smollm2")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the picture")
    return parser.parse_args(argv)


def panels(count: int, width: float = 4.2) -> tuple[Any, Any]:
    """A figure with `count` panels side by side."""
    figure, axes = plt.subplots(1, count, figsize=(width * count, 3.4), dpi=120, squeeze=False)
    for ax in axes[0]:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#eceff2")
        ax.set_axisbelow(True)
    return figure, axes[0]


def curve(ax: Any, title: str, lines: dict[str, list[float]], xlabel: str = "step") -> None:
    """Lines over steps, with a legend where there are several."""
    looks = ((BLUE, "-"), (ORANGE, "--"), (GREY, ":"))  # dashed: what lies on another is seen
    for (label, values), (colour, style) in zip(lines.items(), looks, strict=False):
        ax.plot(values, style, color=colour, label=label, linewidth=1.8)
    ax.set_title(title, fontsize=10, loc="left")
    ax.set_xlabel(xlabel)
    ax.xaxis.get_major_locator().set_params(integer=True)
    if len(lines) > 1:
        ax.legend(frameon=False, fontsize=8)


def save(figure: Any, folder: Path, name: str) -> Path:
    """Write the picture and say where."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    print(f"{path} written")
    return path
