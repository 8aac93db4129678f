"""How many products of [N, H] by [H, V] a call makes: the table of docs/linear.md."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import fusedkl

N, V, H = 48, 320, 32
TILE = (20, 96)  # neither divides
SWEPT = ("jsd", "skew_kl", "renyi", "tvd", "hellinger")


def products(run: Any) -> float:
    """The operations of all matrix products of run(), in products of the whole."""
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as seen:
        run()
    flops = sum(e.flops or 0 for e in seen.events() if e.name in ("aten::mm", "aten::addmm"))
    return flops / (2 * N * V * H)


# kind, reference, gradient to the weight: products forward, and with backward
CASES = [
    ("forward_kl", "hidden", True, 2, 6),
    ("forward_kl", "hidden", False, 2, 5),
    ("forward_kl", "logits", True, 1, 4),
    ("forward_kl", "top-k", True, 1, 4),
    *((kind, "hidden", True, 4, 8) for kind in SWEPT),
    ("jsd", "hidden", False, 4, 7),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "reference", "trained", "forward", "both", "dtype"),
    [*((*case, torch.float32) for case in CASES), (*CASES[0], torch.bfloat16)],
)
def test_products_of_a_call(
    kind: str, reference: str, trained: bool, forward: int, both: int, dtype: torch.dtype
) -> None:
    hidden, weight = torch.randn(N, H, dtype=dtype), torch.randn(V, H, dtype=dtype)
    hidden.requires_grad_()
    weight.requires_grad_(trained)
    given: dict[str, Any] = {
        "hidden": {"ref_hidden": hidden.detach(), "ref_weight": torch.randn(V, H, dtype=dtype)},
        "logits": {"ref_logits": torch.randn(N, V)},
        "top-k": {"ref_topk": (torch.arange(4).expand(N, 4), torch.full((N, 4), -2.0))},
    }[reference]
    if kind == "renyi":
        given["alpha"] = 0.7

    def loss() -> torch.Tensor:
        return fusedkl.linear_divergence(
            hidden, weight, kind=kind, reduction="mean", tile=TILE, backend="cpu", **given
        )

    with torch.no_grad():
        assert products(loss) == forward
    assert products(lambda: loss().backward()) == both
    # tokens that do not count make none
    given["mask"] = torch.arange(N) < N // 4
    assert products(lambda: loss().backward()) == both / 4
