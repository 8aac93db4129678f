"""How wrong a KL is, against how small it is: fusedkl and F.kl_div beside float64.

    python bench/error_curve.py

Rows of 32768 logits as a language model has them (a few likely tokens, a long tail), the policy a
perturbation of the reference whose size is set so that the KL is as wanted. The truth is float64's,
of the logits as they arrive: rounding them to bfloat16 is not counted as an error of either.
Writes bench/results/error-by-kl.json; `python bench/figures.py` draws it.
"""

from __future__ import annotations

import json
import math
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import machine
import oracle_f64
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import fusedkl

OUT = Path(__file__).resolve().parent / "results" / "error-by-kl.json"
VOCABULARY, ROWS = 32768, 16
KLS = [10.0**e for e in range(-12, 2)]


def composed(x: Tensor, y: Tensor) -> Tensor:
    log_p, log_q = F.log_softmax(x, -1), F.log_softmax(y, -1)
    return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)


def fused(x: Tensor, y: Tensor) -> Tensor:
    return fusedkl.forward_kl(x, y)


CONTENDERS = {"fusedkl": fused, "F.kl_div": composed}


def rows(kl: float, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """[ROWS, VOCABULARY] twice, whose KLs are about `kl`."""
    ranks = torch.arange(1, VOCABULARY + 1, dtype=torch.float64)
    zipf = -1.2 * ranks.log()
    order = torch.stack([torch.randperm(VOCABULARY, generator=generator) for _ in range(ROWS)])
    y = (zipf[order] + 12).to(dtype)
    noise = torch.randn(ROWS, VOCABULARY, generator=generator, dtype=torch.float64)
    # In bfloat16 most logits cannot move that little: a few of them move by a whole step instead.
    x = (y.double() + math.sqrt(2 * kl) * noise).to(dtype)
    return x, y


def curves() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    found: dict[tuple[str, str, int], list[float]] = {}
    for kl in tqdm(KLS):
        for dtype in (torch.float32, torch.bfloat16):
            x, y = rows(kl, dtype, generator)
            truth = [float(oracle_f64.row(a, b).forward_kl) for a, b in zip(x, y, strict=True)]
            for name, contender in CONTENDERS.items():
                for value, true in zip(contender(x, y).tolist(), truth, strict=True):
                    if true >= 1e-12:  # what is promised, and what float64 itself knows
                        key = (name, str(dtype).removeprefix("torch."), round(math.log10(true)))
                        found.setdefault(key, []).append((value - true) / true)
    return [
        {
            "contender": name,
            "dtype": dtype,
            "kl": 10.0**decade,
            "rows": len(errors),
            "worst": max(abs(e) for e in errors),
            "median": sorted(abs(e) for e in errors)[len(errors) // 2],
            "negative": sum(e < -1 for e in errors),
        }
        for (name, dtype, decade), errors in sorted(found.items())
    ]


def main() -> None:
    torch.set_num_threads(1)
    content = {
        "command": "python bench/error_curve.py",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "machine": machine.describe(),
        "versions": machine.versions(),
        "vocabulary": VOCABULARY,
        "curves": curves(),
    }
    OUT.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
