"""Error against the size of the divergence: the worst of a few rows, ours and PyTorch's."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import formulas
import oracle_f64
import torch
from cases import EVERY_DTYPE
from torch import Tensor

import fusedkl

from .entry import Point

VOCABULARY, ROWS = 32768, 8
NOISES = tuple(10 ** (e / 2) for e in range(-12, 3))  # KL about noise^2 / 2
FORMS: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "F.kl_div, float32": ("fp32", formulas.forward_kl),
    "F.kl_div, bfloat16 upcast": ("bf16", formulas.forward_kl),
    "F.kl_div, bfloat16": ("bf16", lambda x, y: formulas.forward_kl(x, y, formulas.as_is)),
    "fusedkl, float32": ("fp32", lambda x, y: fusedkl.forward_kl(x, y)),
    "fusedkl, bfloat16": ("bf16", lambda x, y: fusedkl.forward_kl(x, y)),
}


def points(say: Callable[[str], None], device: str, quick: bool) -> Iterator[Point]:
    """Every form at every size; the truth is that of the rows as the dtype holds them."""
    vocabulary = 4096 if quick else VOCABULARY
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(ROWS, vocabulary, generator=generator) * 3
    noise = torch.randn(ROWS, vocabulary, generator=generator)
    for size in NOISES[::3] if quick else NOISES:
        say(f"error at noise {size:.0e}")
        for dtype in ("fp32", "bf16"):
            x, y = (t.to(EVERY_DTYPE[dtype]) for t in (reference + size * noise, reference))
            pairs = zip(x, y, strict=True)
            true = torch.stack([oracle_f64.row(a, b).forward_kl for a, b in pairs])
            if not float(true.min()) > 0:
                continue  # differences that the dtype does not hold
            for name, (of, form) in FORMS.items():
                if of == dtype:
                    found = form(x.to(device), y.to(device)).double().cpu()
                    worst = float(((found - true).abs() / true).max())
                    kl = float(true.median())
                    yield Point(name, kl, worst, int((found < 0).sum()), len(true))
