"""What every rank of a world checks: lm_heads of which each rank has the rows of its slice."""

from __future__ import annotations

import math
from typing import Any

import oracle
import torch
import torch.distributed as dist
import torch.nn.functional as F
from linear_cases import Heads, heads
from sharding_tools import EVERY_KIND, case, cut, same_everywhere
from torch import Tensor

import fusedkl

V, N = 301, 7
TILE = (4, 40)
# What a rank holds a slice of, and along which dim.
SLICED = {"weight": 0, "ref_weight": 0, "bias": 0, "ref_bias": 0, "ref_logits": -1}
GRADIENT = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float64: 1e-8}
LABELS = torch.tensor([0, 300, 41, -100, 150, 7, 299])


def two_heads(dtype: torch.dtype = torch.float32, **options: Any) -> Heads:
    h = heads(dtype, t=N, v=V)
    h.tensors |= {name: torch.randn(V).to(dtype) for name in ("bias", "ref_bias")}
    h.options |= options
    return h


def sliced(name: str, t: Tensor, part: slice) -> Tensor:
    if name not in SLICED:
        return t
    return t[part] if SLICED[name] == 0 else t[..., part]


def composed(h: Heads, kind: str, **options: Any) -> Tensor:
    """Per token, in float64, from whole logits."""
    ce, labels = options.pop("ce_weight", None), options.pop("labels", None)
    x, y = h.logits(""), h.logits("ref_")
    value = fusedkl.divergence(x, y, kind, backend="reference", **options)
    if ce is None:
        return value
    hard = F.cross_entropy(x, labels, reduction="none")
    return torch.where(labels == -100, 0, (1 - ce) * value + ce * hard)


def check(
    group: dist.ProcessGroup, h: Heads, part: slice, call: dict[str, Any], what: str
) -> Tensor:
    """Values and gradients over the group against the composition; returns the values."""
    exact = h.double()
    dtype = h.tensors["hidden"].dtype
    mine = {
        name: sliced(name, t, part).detach().clone().requires_grad_()
        for name, t in h.tensors.items()
    }
    full = dict(zip(exact.tensors, exact.leaves(*exact.tensors), strict=True))
    value = fusedkl.linear_divergence(**mine, **call, **h.options, tile=TILE, group=group)
    truth = composed(exact, **call)
    same_everywhere(value, group)
    error = oracle.relative_error(value.detach(), truth.detach(), 1e-3)
    assert error <= 1e-5, f"{what}: values off by {error}"
    upstream = torch.rand(value.shape, dtype=torch.float64)
    found = torch.autograd.grad(
        value, list(mine.values()), upstream.to(value.dtype), allow_unused=True
    )
    slopes = torch.autograd.grad(truth, list(full.values()), upstream, allow_unused=True)
    for name, a, e in zip(mine, found, slopes, strict=True):
        if a is None or e is None or not e.any():
            assert a is None or not a.any(), f"{what}: {name}"
            assert e is None or not e.any(), f"{what}: {name}"
            continue
        assert a.dtype == mine[name].dtype and a.shape == mine[name].shape
        off = float((a - sliced(name, e, part)).norm() / e.norm())
        assert off <= GRADIENT[dtype], f"{what}: {name} off by {off}"
    return value


@case
def linear(group: dist.ProcessGroup) -> None:
    """Every kind: masks, temperatures of tokens, caps; slices of several tiles, of none."""
    mask, temperature = torch.arange(N) != 2, torch.rand(N) + 0.5
    for way, (kind, parameter) in enumerate(EVERY_KIND.items()):
        h = two_heads(softcap=9.0, ref_logit_scale=0.8)
        call = {"kind": kind, "mask": mask, "temperature": temperature, **parameter}
        h.tensors["hidden"][2] = math.nan  # not read
        clean = Heads({n: t.nan_to_num(0) for n, t in h.tensors.items()}, h.options)
        part = cut(group, V, way)
        value = check(group, clean, part, call, kind)
        mine = {name: sliced(name, t, part) for name, t in h.tensors.items()}
        got = fusedkl.linear_divergence(**mine, **call, **h.options, tile=TILE, group=group)
        assert torch.equal(got, value), kind


@case
def linear_dtypes(group: dist.ProcessGroup) -> None:
    for way, dtype in enumerate((torch.bfloat16, torch.float16, torch.float64)):
        for kind, parameter in (("forward_kl", {}), ("jsd", {"beta": 0.3}), ("tvd", {})):
            call = {"kind": kind, **parameter, "labels": LABELS, "ce_weight": 0.3}
            check(group, two_heads(dtype), cut(group, V, way), call, f"{kind} {dtype}")


@case
def linear_labels(group: dist.ProcessGroup) -> None:
    """Cross-entropy of labels that some rank has; at its ends and at another temperature."""
    calls = [("forward_kl", 1.0), ("jeffreys", 2.0), ("jsd", 1.0), ("hellinger", 3.0)]
    for way, (kind, temperature) in enumerate(calls):
        for ce_weight in (0.0, 0.4, 1.0):
            call = {"kind": kind, "temperature": temperature, "labels": LABELS}
            call |= {"ce_weight": ce_weight, "mask": LABELS >= 0}
            part = cut(group, V, way)
            check(group, two_heads(), part, call, f"{kind} {temperature} {ce_weight}")
    h, part = two_heads(), cut(group, V, 0)
    mine = {name: sliced(name, t, part) for name, t in h.tensors.items()}
    try:
        fusedkl.linear_divergence(**mine, labels=LABELS + 2, ce_weight=0.5, group=group)
    except ValueError as error:
        assert "labels" in str(error) and f"from 0 to {V - 1}; got" in str(error)
    else:
        raise AssertionError("labels beyond the vocabulary went through")


@case
def linear_of_16_bits(group: dist.ProcessGroup) -> None:
    """What all weights share cancels in the sum over slices, and is large in each of them."""
    made = torch.randn(7, 12), torch.randn(7, 12), torch.randn(90, 12) + 30, torch.randn(90, 12)
    hidden, other, weight, moved = (t.to(torch.bfloat16) for t in made)
    part = cut(group, 90, 0)

    def error(rows: slice, g: dist.ProcessGroup | None) -> float:
        leaves = [t.clone().requires_grad_() for t in (hidden, other)]
        heads = [t[rows] for t in (weight, weight + moved)]
        value = fusedkl.linear_divergence(leaves[0], heads[0], leaves[1], heads[1], group=g)
        found = torch.autograd.grad(value.sum(), leaves)
        wide = [t.double().requires_grad_() for t in (hidden, other)]
        x, y = wide[0] @ weight.double().t(), wide[1] @ (weight + moved).double().t()
        truth = torch.autograd.grad(fusedkl.forward_kl(x, y).sum(), wide)
        assert all(t.dtype == torch.bfloat16 for t in found)
        return max(float((a - e).norm() / e.norm()) for a, e in zip(found, truth, strict=True))

    sharded, whole = error(part, group), error(slice(None), None)
    assert sharded <= 1.5 * whole, f"off by {sharded}, on one rank by {whole}"


@case
def linear_references(group: dist.ProcessGroup) -> None:
    """Given as logits, also where a rank holds none of them; one weight for both; no tokens."""
    for way, kind in enumerate(("jeffreys", "skew_kl", "renyi")):
        call: dict[str, Any] = {"kind": kind, **EVERY_KIND[kind]}
        part = cut(group, V, way)
        logits, shared = two_heads(), two_heads()
        for name in ("ref_hidden", "ref_weight", "ref_bias"):
            del logits.tensors[name]
        logits.tensors["ref_logits"] = 2 * torch.randn(N, V)
        del shared.tensors["ref_weight"]
        shared.tensors["ref_hidden"] = torch.randn(N, shared.tensors["hidden"].shape[1])
        for what, h in (("ref_logits", logits), ("one weight", shared)):
            check(group, h, part, call, f"{kind}, {what}")
            none = {"hidden", "ref_hidden", "ref_logits"}
            h.tensors = {n: t[:0] if n in none else t for n, t in h.tensors.items()}
            mine = {n: sliced(n, t, part).clone().requires_grad_() for n, t in h.tensors.items()}
            value = fusedkl.linear_divergence(**mine, **call, group=group, reduction="mean")
            value.backward()
            assert value == 0 and all(not t.grad.any() for t in mine.values()), what


@case
def linear_edges(group: dist.ProcessGroup) -> None:
    """Tokens that a head does not have, in all of a slice too; a token that is NaN."""
    for way, (kind, parameter) in enumerate(EVERY_KIND.items()):
        h = two_heads()
        h.tensors["bias"][10:60] = -math.inf  # a slice, and parts of others
        h.tensors["ref_bias"][::3] = -math.inf
        h.tensors["hidden"][3] = math.nan
        for i, lone in enumerate(("bias", "ref_bias")):  # rows of one rank alone
            if way % 2 == i:
                h.tensors[lone][:-8] = -math.inf
        part = cut(group, V, way)
        mine = {name: sliced(name, t, part) for name, t in h.tensors.items()}
        mine["hidden"].requires_grad_()
        value = fusedkl.linear_divergence(**mine, kind=kind, **parameter, tile=TILE, group=group)
        wanted = composed(h.double(), kind, **parameter)
        assert bool(value[3].isnan()) and int(value.isnan().sum()) == 1, kind
        torch.testing.assert_close(
            value.double(), wanted, rtol=2e-5, atol=0, equal_nan=True, check_dtype=False
        )
        same_everywhere(value, group)
        value.sum().backward()
        rows = mine["hidden"].grad.isfinite().all(1)
        assert not rows[3] and int(rows.sum()) == N - 1, f"{kind}: {rows}"
