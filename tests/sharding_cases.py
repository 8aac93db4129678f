"""What every rank of a world checks: its slice's values and gradients against the whole rows'."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import cases
import oracle
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

import fusedkl
from fusedkl import reference

Case = Callable[[dist.ProcessGroup], dict[str, Any] | None]
CASES: dict[str, Case] = {}
KINDS = ("forward_kl", "reverse_kl", "jeffreys")
# Relative L2 of the whole row's gradient, and relative error of values. Measured here: below half.
GRADIENT = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float64: 1e-8}
VALUE = {torch.float32: 3e-6, torch.bfloat16: 3e-6, torch.float64: 1e-9}

SCENARIOS = [
    (scenario, dtype, temperature)
    for i, scenario in enumerate(cases.SCENARIOS)
    for j, dtype in enumerate(cases.GRADIENT_DTYPES)
    for k, temperature in enumerate(cases.TEMPERATURES)
    if (i + j + k) % 3 == 0
]


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def prepare() -> None:
    """Before any rank exists: what all of them read."""
    for scenario in SCENARIOS:
        cases.truth(*scenario)


def cut(group: dist.ProcessGroup, total: int, way: int) -> slice:
    """This rank's part of `total` entries: growing parts; the first empty; the last empty."""
    ranks = group.size()
    rest = total // (ranks - 1)
    sizes = [
        [7 * (r + 1) for r in range(ranks - 1)],
        [0, *[11] * (ranks - 2)],
        [*[rest] * (ranks - 2), total - rest * (ranks - 2)],
    ][way % 3]
    begin = sum(sizes[: group.rank()])
    return slice(begin, begin + [*sizes, total - sum(sizes)][group.rank()])


def leaf(t: Tensor, part: slice) -> Tensor:
    return t[..., part].clone().requires_grad_()


def grad_error(leaf_: Tensor, expected: Tensor, part: slice) -> float:
    """Of a slice, relative to the whole row's gradient; where that is NaN, both must be."""
    assert leaf_.grad is not None
    ours, theirs = leaf_.grad.double(), expected.double()[..., part]
    if theirs.isnan().any():
        assert torch.equal(ours.isnan(), theirs.isnan())
    error = (ours - theirs).nan_to_num(0, math.inf).norm(dim=-1)
    size = expected.double().nan_to_num(0).norm(dim=-1)
    relative = torch.where(error == 0, 0.0, error / size)
    return float(relative.nan_to_num(math.inf).max()) if relative.numel() else 0.0


def whole_rows(
    x: Tensor, y: Tensor | None, kind: str, temperature: float = 1.0
) -> tuple[Tensor, list[Tensor]]:
    """Values of the whole rows in float64 and, of their sum, the gradients: by autograd."""
    leaves = [t.double().requires_grad_() for t in (x, y) if t is not None]
    fields = ("forward_kl", "reverse_kl") if kind == "jeffreys" else (kind,)
    inverse = torch.tensor([1 / temperature], dtype=torch.float64)
    other = leaves[1] if y is not None else None
    values, _ = reference.rows(leaves[0], other, None, fields, None, inverse, None, None, None)
    return values.sum(0).detach(), list(torch.autograd.grad(values.sum(), leaves))


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> None:
    error = oracle.relative_error(actual, expected)
    assert error <= VALUE[dtype], f"{what}: value off by {error}"


def same_everywhere(t: Tensor, group: dist.ProcessGroup) -> None:
    """The same bits on every rank."""
    others = [torch.empty_like(t) for _ in range(group.size())]
    dist.all_gather(others, t.detach().contiguous(), group=group)
    assert all(torch.equal(o.nan_to_num(7.5), t.detach().nan_to_num(7.5)) for o in others)


@case
def divergences(group: dist.ProcessGroup) -> dict[str, Any]:
    worst: dict[str, float] = {}
    for way, (scenario, dtype, temperature) in enumerate(SCENARIOS):
        whole = cases.make(scenario, dtype)
        truth, part = cases.truth(scenario, dtype, temperature), cut(group, cases.V, way)
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


@case
def long_rows(group: dist.ProcessGroup) -> dict[str, Any]:
    worst = 0.0
    for way, (spread, sharp) in enumerate([(1e-3, 1), (0.3, 2), (2, 3), (8, 1), (0.5, 12)]):
        generator = torch.Generator().manual_seed(way)
        base = sharp * torch.randn(4, 30011, generator=generator)
        whole = base, base + spread * torch.randn(4, 30011, generator=generator)
        part = cut(group, 30011, way)
        for kind in KINDS:
            mine = [leaf(t, part) for t in whole]
            expected, gradients = whole_rows(*whole, kind, 1.5)
            value = fusedkl.divergence(mine[0], mine[1], kind, temperature=1.5, group=group)
            value.sum().backward()
            close(value, expected, torch.float32, f"{kind} {spread} {sharp}")
            for t, gradient in zip(mine, gradients, strict=True):
                error = grad_error(t, gradient, part)
                assert error <= 3e-6, f"{kind} {spread} {sharp}: gradient off by {error}"
                worst = max(worst, error)
    return {"worst": worst}


@case
def one_distribution(group: dist.ProcessGroup) -> None:
    for way, (scenario, dtype, temperature) in enumerate(SCENARIOS):
        whole, _ = cases.make(scenario, dtype)
        truth, part = cases.truth(scenario, dtype, temperature), cut(group, cases.V, way)
        for name, function in (("entropy", fusedkl.entropy), ("logsumexp", fusedkl.logsumexp)):
            mine = leaf(whole, part)
            value = function(mine, temperature=cases.TEMPERATURES[temperature], group=group)
            value.sum().backward()
            close(value, truth[name], dtype, f"{name} {scenario}")
            error = grad_error(mine, truth[f"d_{name}"], part)
            assert error <= GRADIENT[dtype], f"{name} {scenario} {dtype}: off by {error}"


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
        assert t.grad.isnan().all(-1).tolist() == [False, True, False]
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
        address = x.data_ptr()
        value = fusedkl.jeffreys(
            x, whole[1][:, :-1, part], group=group, inplace_grad=inplace
        )
        close(value, expected, torch.float32, "strided")
        value.sum().backward()
        assert grad_error(x, full.grad, part) <= 3e-6
        assert (x.grad.data_ptr() == address) == inplace or x.numel() == 0


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


@case
def traffic(group: dist.ProcessGroup) -> dict[str, Any]:
    # one collective forward, none backward, 6 floats a token
    sent: list[int] = []
    original = torch.ops._c10d_functional.all_gather_into_tensor.default
    x, y = torch.randn(10, 16, requires_grad=True), torch.randn(10, 16)
    for kind, floats in (("forward_kl", 6), ("reverse_kl", 6), ("jeffreys", 8)):
        with CommDebugMode() as forward:
            value = fusedkl.divergence(x, y, kind, group=group)
        with CommDebugMode() as backward:
            value.sum().backward()
        assert dict(forward.get_comm_counts()) == {original._overloadpacket: 1}
        assert backward.get_total_counts() == 0
        payload = fusedkl.distributed.payload_bytes(kind, torch.float32)
        assert payload == 4 * floats
        sent.append(payload)
    return {"bytes per token": sent}


@case
def disagreements(group: dist.ProcessGroup) -> None:
    odd = group.rank() == 1
    x, y = torch.randn(10, 16), torch.randn(10, 16)
    calls: dict[str, Callable[[], Tensor]] = {
        "rows": lambda: fusedkl.forward_kl(x[: 10 - odd], y[: 10 - odd], group=group),
        "dtype": lambda: fusedkl.forward_kl(x.bfloat16() if odd else x, y, group=group),
        "kind": lambda: fusedkl.divergence(x, y, KINDS[odd], group=group, temperature=3.0),
        "temperature": lambda: fusedkl.forward_kl(x, y, group=group, temperature=1.0 + odd / 2),
    }
    for name, call in calls.items():
        try:
            call()
        except ValueError as error:
            assert name in str(error) and "rank 1" in str(error), f"{name}: {error}"
        else:
            raise AssertionError(f"{name}: no error")
    fusedkl.forward_kl(x, y, group=group)  # the group is as good as before


@case
def not_supported(group: dist.ProcessGroup) -> None:
    x, y = torch.randn(2, 9, requires_grad=True), torch.randn(2, 9)
    value = fusedkl.forward_kl(x, y, group=group).sum()
    try:
        torch.autograd.grad(value, x, create_graph=True)
    except RuntimeError as error:
        assert "double backward" in str(error)
    else:
        raise AssertionError("double backward went through")
    for wrong in ("world", 3, dist.GroupMember.NON_GROUP_MEMBER):
        try:
            fusedkl.forward_kl(x, y, group=wrong)
        except TypeError as error:
            assert "ProcessGroup" in str(error)
        else:
            raise AssertionError(f"group={wrong!r} went through")
