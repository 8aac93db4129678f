"""Two small language-model heads, and their divergence composed of torch's operators in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Sizes that divide nothing: 37 tokens, a vocabulary of 301, tiles of 16 x 40.
T, V, H, REF_H = 37, 301, 24, 20
TILE = (16, 40)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return F.kl_div(log_b, log_a, log_target=True, reduction="none").sum(-1)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": lambda lp, lq: kl(lq, lp),
    "reverse_kl": lambda lp, lq: kl(lp, lq),
    "jeffreys": lambda lp, lq: kl(lq, lp) + kl(lp, lq),
}


@dataclass
class Heads:
    """Tensors of both sides, and the options of the call."""

    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def logits(self, side: str) -> Tensor:
        """In the dtype of the tensors; scaled and capped as the options say."""
        t = self.tensors
        if side == "ref_" and "ref_logits" in t:
            out = t["ref_logits"]
        else:
            weight = t.get(f"{side}weight", t["weight"])
            out = t[f"{side}hidden"] @ weight.transpose(0, 1)
        if f"{side}bias" in t:
            out = out + t[f"{side}bias"]
        name = "ref_logit_scale" if side else "logit_scale"
        out = out * self.options.get(name, 1.0)
        cap = self.options.get(f"{side}softcap")
        return out if cap is None else cap * torch.tanh(out / cap)

    def leaves(self, *names: str) -> list[Tensor]:
        return [self.tensors[name].requires_grad_() for name in names]

    def double(self) -> Heads:
        doubled = {name: t.detach().double() for name, t in self.tensors.items()}
        return Heads(doubled, self.options)

    def log_probs(self, temperature: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
        inverse = 1 / torch.as_tensor(temperature, dtype=torch.float64)
        inverse = inverse[..., None] if inverse.dim() else inverse
        found = [F.log_softmax(self.logits(side) * inverse, -1) for side in ("", "ref_")]
        return found[0], found[1]


def heads(dtype: torch.dtype, *, far: float = 1.0, **shapes: int) -> Heads:
    """Hidden states of size 1 and weights of size 0.3; KL about 1."""
    t, v = shapes.get("t", T), shapes.get("v", V)
    made = {
        "hidden": torch.randn(t, H),
        "weight": 0.3 * torch.randn(v, H),
        "ref_hidden": far * torch.randn(t, REF_H),
        "ref_weight": 0.3 * torch.randn(v, REF_H),
    }
    return Heads({name: x.to(dtype) for name, x in made.items()})
