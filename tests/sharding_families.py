"""What every rank of a world checks: divergences of a second sweep, softcap, valid_vocab."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from sharding_tools import EVERY_KIND, SECOND_SWEEP, case, cut, errors, leaf, true_numbers
from torch import Tensor

import fusedkl

V = 301
# Height of a token above the others, whether of one token in both rows, how far the rest differ:
# slopes of the second sweep become small rests of their means.
SHARP = [
    (height, same, spread)
    for height in (0.0, 9.0, 14.0, 25.0)
    for same in (True, False)
    for spread in (1e-3, 0.3, 4.0)
]


@functools.cache
def pair(height: float, same: bool, spread: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(int(height))
    x = torch.randn(2, V, generator=generator)
    y = x + spread * torch.randn(2, V, generator=generator)
    x[:, 3] += height
    y[:, 3 if same else 290] += height
    return x, y


@functools.cache
def truth(height: float, same: bool, spread: float, kind: str) -> tuple[Tensor, list[Tensor]]:
    return true_numbers(pair(height, same, spread), kind, **SECOND_SWEEP[kind])


def prepare() -> None:
    """Before any rank exists: what all of them read."""
    for rows in SHARP:
        for kind in SECOND_SWEEP:
            truth(*rows, kind)


@case
def second_sweep(group: dist.ProcessGroup) -> dict[str, Any]:
    worst: dict[str, float] = {}
    for i, rows in enumerate(SHARP):
        for j, (kind, parameter) in enumerate(SECOND_SWEEP.items()):
            part = cut(group, V, i + j)
            found = errors(group, pair(*rows), part, truth(*rows, kind), kind, **parameter)
            # of rows that hardly overlap, or are one token, the gradient itself vanishes
            limit = 2e-4 if rows[0] >= 14 and rows[2] == 4 else 1e-5
            assert found[0] <= 1e-5, f"{kind} {rows} {part}: values off by {found[0]}"
            assert max(found) <= limit, f"{kind} {rows} {part}: gradients off by {found}"
            worst[kind] = max(worst.get(kind, 0), *found)
    return {"worst": worst}


@case
def second_sweep_of_16_bits(group: dist.ProcessGroup) -> None:
    for way, (kind, parameter) in enumerate(SECOND_SWEEP.items()):
        rows = tuple(t.bfloat16() for t in pair(9.0, False, 0.3))
        part = cut(group, V, way)
        found = errors(group, rows, part, true_numbers(rows, kind, **parameter), kind, **parameter)
        assert found[0] <= 1e-5 and max(found) <= 4e-3, f"{kind}: off by {found}"
        mixed = pair(9.0, False, 0.3)[0], rows[1]
        found = errors(
            group, mixed, part, true_numbers(mixed, kind, **parameter), kind, **parameter
        )
        assert max(found[:2]) <= 1e-5 and found[2] <= 4e-3, f"{kind}: off by {found}"


@case
def controls(group: dist.ProcessGroup) -> None:
    rows = tuple(6 * t for t in pair(0.0, True, 0.3))
    for way, options in enumerate(
        [
            {"softcap": 5.0},
            {"valid_vocab": 200},  # with ranks that hold only what does not exist
            {"valid_vocab": 5},
            {"softcap": 9.0, "valid_vocab": 290, "temperature": torch.tensor([0.7, 2.0])},
            {"temperature": 0.5, "logit_scale": 0.25},
        ]
    ):
        part = cut(group, V, way)
        for kind, parameter in EVERY_KIND.items():
            expected = true_numbers(rows, kind, **options, **parameter)
            found = errors(group, rows, part, expected, kind, **options, **parameter)
            assert max(found) <= 1e-5, f"{kind} {options}: values, gradients off by {found}"


@case
def controls_of_one_row(group: dist.ProcessGroup) -> None:
    whole, ids = 4 * torch.randn(3, 70), torch.tensor([0, 40, 63])
    for way, options in enumerate([{"softcap": 3.0}, {"valid_vocab": 64}]):
        part = cut(group, 70, way)
        mine, full = leaf(whole, part), whole.double().requires_grad_()
        got = fusedkl.token_stats(mine, None, ids, group=group, **options)
        expected = fusedkl.token_stats(full, None, ids, backend="reference", **options)
        for name in ("logprob", "entropy", "logsumexp"):
            a, e = getattr(got, name), getattr(expected, name)
            assert float(((a - e) / e).detach().abs().max()) <= 1e-5, f"{name} {options}"
        (got.logprob - 2 * got.entropy).sum().backward()
        (expected.logprob - 2 * expected.entropy).sum().backward()
        error = (mine.grad - full.grad[:, part]).norm() / full.grad.norm()
        assert error <= 1e-5, f"{options}: gradient off by {float(error)}"


@case
def distillation(group: dist.ProcessGroup) -> None:
    whole = 3 * torch.randn(4, 90), 3 * torch.randn(4, 90)
    calls = [("forward_kl", 1.0), ("reverse_kl", 2.0), ("jsd", 1.0), ("tvd", 3.0)]
    for way, (kind, temperature) in enumerate(calls):
        for ce_weight, smoothing in ((0.4, 0.0), (0.6, 0.1), (1.0, 0.0), (0.0, 0.0)):
            options = {"kind": kind, "temperature": temperature, "ce_weight": ce_weight}
            options |= {"label_smoothing": smoothing, "reduction": "mean"}
            if way % 2:  # padding, of the last rank or ranks
                options |= {"softcap": 4.0, "valid_vocab": 90 - 7 * group.size()}
            part = cut(group, 90, way)
            labels = torch.tensor([0, 90 - 7 * group.size() - 1, -100, 44])
            mine = [leaf(t, part) for t in whole]
            full = [t.double().requires_grad_() for t in whole]
            got = fusedkl.distillation_loss(*mine, labels, group=group, **options)
            expected = fusedkl.distillation_loss(*full, labels, backend="reference", **options)
            assert abs(float(got.detach() / expected.detach()) - 1) <= 1e-5, options
            got.backward()
            expected.backward()
            for a, e in zip(mine, full, strict=True):
                if e.grad is None or not e.grad.any():
                    assert a.grad is None or not a.grad.any()
                    continue
                error = (a.grad - e.grad[:, part]).norm() / e.grad.norm()
                assert error <= 1e-5, f"{options}: gradient off by {float(error)}"
