"""Which cases a run measures, and which contenders on each."""

from __future__ import annotations

from dataclasses import dataclass

from .batch import Case
from .models import REAL

ALL = ""
PAIR = "eager;torch.compile"
FEW = "eager;chunked;torch.compile"
HEADS = "eager;eager, float32 products;chunked"
# Contenders whose peak is measured in a process each.
PEAKS = (
    *("fusedkl cpu", "fusedkl cpu inplace_grad", "eager", "row loop"),
    *("chunked", "chunked, checkpoint", "torch.compile"),
)


@dataclass(frozen=True)
class Item:
    """A case, who is timed on it beside ours (names with ";", or all), whose peak is measured."""

    case: Case
    only: str = ALL
    peaks: tuple[str, ...] = ()

    def chooses(self, contender: str) -> bool:
        return not self.only or contender.startswith("fusedkl") or contender in self.only.split(";")


def plan(device: str, quick: bool) -> list[Item]:
    if quick:
        return _quick()
    return _gpu() if device == "cuda" else _cpu()


def _quick() -> list[Item]:
    return [
        Item(Case("models", "forward_kl", "small", 64), peaks=PEAKS),
        Item(Case("models", "forward_kl", "odd", 64), FEW, ("fusedkl cpu", "eager")),
        Item(Case("operations", "reverse_kl", "small", 64), "eager"),
        Item(Case("operations", "jsd", "small", 64, "fp16"), "eager"),
        Item(Case("operations", "token_stats", "small", 64), "eager"),
        Item(Case("operations", "topk", "small", 64), "eager;chunked"),
        Item(Case("operations", "linear", "small", 64), HEADS),
        Item(Case("inputs", "forward_kl", "small", 64, "fp32", masked=0.5), "eager"),
        Item(Case("inputs", "forward_kl", "odd", 64, layout="sliced"), "eager;row loop"),
        Item(Case("tokens", "forward_kl", "small", 16), "eager;chunked"),
        Item(Case("tokens", "forward_kl", "small", 256), "eager;chunked"),
    ]


def _cpu() -> list[Item]:
    """At most a quarter of an hour on two cores."""
    named = {"llama2": 512, "llama3": 256, "deepseek-v3": 128, "qwen3": 128, "glm-5": 128}
    named |= {"kimi-k2": 128, "gpt-oss": 128, "qwen3.5": 128, "gemma3": 128}
    measured = {"llama2": PEAKS, "llama3": PEAKS, "gemma3": PEAKS}
    shown = tuple(measured)
    return [
        *(
            Item(
                Case("models", "forward_kl", name, tokens),
                ALL if name in shown else PAIR,
                measured.get(name, ()),
            )
            for name, tokens in named.items()
        ),
        Item(Case("models", "forward_kl", "llama3", 256, backward=False), PAIR),
        *(
            Item(Case("operations", kind, "qwen3", 128), FEW)
            for kind in ("reverse_kl", "jsd", "token_stats", "topk")
        ),
        Item(Case("operations", "linear", "llama3", 64, hidden=1024), HEADS),
        *(
            Item(Case("inputs", "forward_kl", "llama3", 128, dtype), PAIR)
            for dtype in ("fp32", "fp16")
        ),
        *(
            Item(Case("inputs", "forward_kl", "llama3", 128, masked=share), PAIR)
            for share in (0.5, 0.9)
        ),
        Item(Case("inputs", "forward_kl", "llama3", 128, layout="sliced"), PAIR),
        *(Item(Case("inputs", "forward_kl", name, 128), PAIR) for name in REAL),
        *(
            Item(Case("tokens", "forward_kl", "llama3", tokens), "chunked;torch.compile")
            for tokens in (16, 64, 512)
        ),
    ]


def _gpu() -> list[Item]:
    models = ("llama3", "deepseek-v3", "qwen3", "glm-5", "kimi-k2", "gpt-oss", "qwen3.5", "gemma3")
    kinds = ("forward_kl", "reverse_kl", "jsd", "token_stats", "topk")
    return [
        *(Item(Case("models", "forward_kl", name, 4096)) for name in models),
        *(Item(Case("models", "forward_kl", name, 4096, backward=False), FEW) for name in models),
        *(Item(Case("operations", kind, "qwen3", 4096)) for kind in kinds[1:]),
        *(Item(Case("operations", "linear", name, 4096)) for name in ("llama3", "gemma3")),
        *(
            Item(Case("inputs", kind, "llama3", 4096, dtype))
            for kind in kinds[:3]
            for dtype in ("fp32", "fp16")
        ),
        *(
            Item(Case("inputs", kind, "llama3", 4096, masked=share))
            for kind in kinds[:3]
            for share in (0.5, 0.9)
        ),
        *(Item(Case("inputs", kind, "llama3", 4096, layout="sliced")) for kind in kinds[:3]),
        *(Item(Case("inputs", "forward_kl", name, 2048)) for name in REAL),
        *(
            Item(Case("tokens", "forward_kl", name, tokens))
            for name in ("llama3", "gemma3")
            for tokens in (256, 1024, 8192, 16384, 32768)
        ),
    ]
