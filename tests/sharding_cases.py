"""What every rank of a world checks: its slice's values and gradients against the whole rows'."""

from __future__ import annotations

import functools
import math
import zlib
from typing import Any

import cases
import oracle
import torch
import torch.distributed as dist
from sharding_tools import (
    GRADIENT,
    KINDS,
    case,
    close,
    cut,
    errors,
    grad_error,
    leaf,
    same_everywhere,
    true_numbers,
    whole_rows,
)
from torch import Tensor

import fusedkl

SCENARIOS = [
    (scenario, dtype, temperature)
    for i, scenario in enumerate(cases.SCENARIOS)
    for j, dtype in enumerate(cases.GRADIENT_DTYPES)
    for k, temperature in enumerate(cases.TEMPERATURES)
    if (i + j + k) % 3 == 0
]


@case
def divergences(group: dist.ProcessGroup) -> dict[str, Any]:
    worst: dict[str, float] = {}
    for scenario, dtype, temperature in SCENARIOS:
        whole = cases.make(scenario, dtype)
        truth = cases.truth(scenario, dtype, temperature)
        part = cut(group, cases.V, zlib.crc32(f"{scenario}{dtype}{temperature}".encode()))
        for kind in KINDS:
            what = f"{kind} {scenario} {dtype} {temperature} {part}"
            mine = [leaf(t, part) for t in whole]
            options = {"temperature": cases.TEMPERATURES[temperature], "group": group}
            value = fusedkl.divergence(mine[0], mine[1], kind, **options)
            value.sum().backward()
            close(value, truth[kind], dtype, what)
            for t, side in zip(mine, ("", "_reference"), strict=True):
                error = grad_error(t, truth[f"d_{kind}{side}"], part)
                assert error <= GRADIENT[dtype], f"{what}: gradient{side} off by {error}"
                worst[str(dtype)] = max(worst.get(str(dtype), 0), error)
    return {"worst": worst}


# (spread of the differences, sharpness of the rows)
PAIRS = [(1e-3, 1.0), (0.3, 2.0), (2.0, 3.0), (0.5, 12.0)]
LONG = 12011


@functools.cache
def pair(spread: float, sharp: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(LONG)
    base = sharp * torch.randn(3, LONG, generator=generator)
    return base, base + spread * torch.randn(3, LONG, generator=generator)


@functools.cache
def true_pair(spread: float, sharp: float, kind: str) -> tuple[Tensor, list[Tensor]]:
    return true_numbers(pair(spread, sharp), kind, temperature=0.8)


def prepare() -> None:
    """Before any rank exists: what all of them read."""
    for scenario in SCENARIOS:
        cases.truth(*scenario)
    for spread, sharp in PAIRS:
        for kind in KINDS:
            true_pair(spread, sharp, kind)


@case
def long_rows(group: dist.ProcessGroup) -> dict[str, Any]:
    worst: dict[str, float] = {}
    for way, rows in enumerate(PAIRS):
        part = cut(group, LONG, way)
        for kind in KINDS:
            found = errors(group, pair(*rows), part, true_pair(*rows, kind), kind, temperature=0.8)
            assert max(found) <= 3e-6, f"{kind} {rows}: values and gradients off by {found}"
            worst[kind] = max(worst.get(kind, 0), *found)
    return {"worst": worst}


@case
def tokens(group: dist.ProcessGroup) -> None:
    whole = 3 * torch.randn(5, 83)
    index = torch.randint(83, (5, 3))
    index[0] = torch.tensor([0, 82, 82])
    part = cut(group, 83, 0)
    for ids in (index, index[:, 0]):
        x, full = leaf(whole, part), whole.double().requires_grad_()
        value = fusedkl.selective_log_softmax(x, ids, temperature=0.7, group=group)
        expected = fusedkl.selective_log_softmax(full, ids, temperature=0.7)
        close(value, expected, torch.float32, "logprob")
        scale = torch.rand(ids.shape)
        (value * scale).sum().backward()
        (expected * scale).sum().backward()
        assert grad_error(x, full.grad, part) <= 3e-6
    for wrong in (-1, 83):
        try:
            fusedkl.selective_log_softmax(
                x, index.index_fill(1, torch.tensor([1]), wrong), group=group
            )
        except ValueError as error:
            assert "from 0 to 82" in str(error)
        else:
            raise AssertionError(f"index {wrong} went through")


@case
def token_stats(group: dist.ProcessGroup) -> None:
    whole = 3 * torch.randn(4, 90), 3 * torch.randn(4, 90)
    ids, part = torch.randint(90, (4, 2)), cut(group, 90, 0)
    mask = torch.tensor([True, True, False, True])
    ids[2] = 12345  # of a row that does not count
    for options in ({}, {"temperature": 1.3}, {"softcap": 4.0}):
        mine = [leaf(t, part) for t in whole]
        leaves = [t.double().requires_grad_() for t in whole]
        got = fusedkl.token_stats(mine[0], mine[1], ids, mask=mask, group=group, **options)
        expected = fusedkl.token_stats(leaves[0], leaves[1], ids, mask=mask, **options)
        total = [torch.zeros(()), torch.zeros((), dtype=torch.float64)]
        for i, name in enumerate(got._fields):
            a, e = getattr(got, name), getattr(expected, name)
            assert oracle.relative_error(a, e.detach(), 1e-1) <= 3e-6, f"{name} {options}"
            total = [total[0] + (i + 1) * a.sum(), total[1] + (i + 1) * e.sum()]
        for t in total:
            t.backward()
        for t, full in zip(mine, leaves, strict=True):
            assert grad_error(t, full.grad, part) <= 3e-6, f"{options}"


@case
def nothing_in_a_slice(group: dist.ProcessGroup) -> None:
    # a slice without any token of one row, or of both; a mask of finfo.min instead
    for way, (hole_x, hole_y, value) in enumerate(
        [
            (False, True, -math.inf),
            (True, False, -math.inf),
            (True, True, -math.inf),
            (True, True, torch.finfo(torch.float32).min),
        ]
    ):
        torch.manual_seed(way)
        whole = torch.randn(3, 97), torch.randn(3, 97)
        hole = slice(0, 7) if way % 2 else slice(7, 97 if group.size() == 2 else 21)
        for t, holed in zip(whole, (hole_x, hole_y), strict=True):
            t[:2, hole] = value if holed else t[:2, hole]
        part = cut(group, 97, 0)
        for kind in KINDS:
            mine = [leaf(t, part) for t in whole]
            got = fusedkl.divergence(mine[0], mine[1], kind, group=group)
            expected, gradients = whole_rows(*whole, kind)
            close(got, expected, torch.float32, f"{kind} {way}")
            got.sum().backward()
            for t, gradient in zip(mine, gradients, strict=True):
                assert grad_error(t, gradient, part) <= 3e-6, f"{kind} {way}"


@case
def bad_rows(group: dist.ProcessGroup) -> None:
    # NaN in one rank's slice: that row is NaN on every rank, and no other
    whole = torch.randn(3, 40), torch.randn(3, 40)
    whole[0][1, -1] = math.nan
    part = cut(group, 40, 0)
    mine = [leaf(t, part) for t in whole]
    value = fusedkl.reverse_kl(*mine, group=group)
    assert value.isnan().tolist() == [False, True, False]
    value.sum().backward()
    for t in mine:
        empty = t.shape[-1] == 0  # all of nothing is true
        assert empty or t.grad.isnan().all(-1).tolist() == [False, True, False]
    # masked out, it is exactly 0
    mine = [leaf(t, part) for t in whole]
    mask = torch.tensor([True, False, True])
    value = fusedkl.reverse_kl(*mine, group=group, mask=mask)
    assert value[1] == 0
    value.sum().backward()
    assert all(torch.equal(t.grad[1], torch.zeros_like(t.grad[1])) for t in mine)
    assert all(t.grad.isfinite().all() for t in mine)


@case
def reductions(group: dist.ProcessGroup) -> None:
    whole = torch.randn(2, 5, 61), torch.randn(2, 5, 61)
    part = cut(group, 61, 0)
    weight, mask = torch.rand(2, 5), torch.rand(2, 5) > 0.3
    for reduction in ("sum", "mean", "batchmean"):
        for options in ({}, {"mask": mask, "weight": weight}):
            x, y = (leaf(t, part) for t in whole)
            value = fusedkl.forward_kl(x, y, reduction=reduction, group=group, **options)
            full = whole[0].clone().requires_grad_()
            expected = fusedkl.forward_kl(full, whole[1], reduction=reduction, **options)
            same_everywhere(value, group)
            close(value, expected, torch.float32, reduction)
            value.backward()
            expected.backward()  # the whole gradient, not a share of it
            assert grad_error(x, full.grad, part) <= 3e-6


@case
def strides_and_inplace(group: dist.ProcessGroup) -> None:
    whole = torch.randn(3, 6, 53), torch.randn(53).expand(3, 6, 53)
    part = cut(group, 53, 0)
    full = whole[0][:, :-1].clone().requires_grad_()
    expected = fusedkl.jeffreys(full, whole[1][:, :-1])
    expected.sum().backward()
    for inplace in (False, True):
        held = whole[0][..., part].clone()
        x = held[:, :-1].requires_grad_()
        value = fusedkl.jeffreys(x, whole[1][:, :-1, part], group=group, inplace_grad=inplace)
        close(value, expected, torch.float32, "strided")
        value.sum().backward()
        assert grad_error(x, full.grad, part) <= 3e-6
        assert torch.equal(held[:, :-1], x.grad) == inplace or x.numel() == 0


@case
def equal_rows(group: dist.ProcessGroup) -> None:
    x = torch.randn(3, 50)
    for shift in (0.0, 4096.0):
        mine = x[:, cut(group, 50, 1)]
        rounded = (mine + shift) - shift  # so that the difference is a constant
        assert torch.equal(fusedkl.jeffreys(rounded + shift, rounded, group=group), torch.zeros(3))


@case
def no_rows(group: dist.ProcessGroup) -> None:
    x = torch.zeros(0, 4, requires_grad=True)
    value = fusedkl.forward_kl(x, torch.zeros(0, 4), group=group)
    assert value.shape == (0,)
    value.sum().backward()
    assert x.grad.shape == (0, 4)
