"""linear_divergence of every kind: bad tokens, small sizes, sides of two dtypes."""

from __future__ import annotations

import math
from typing import Any

import oracle
import pytest
import torch
from linear_cases import TILE, H, Heads, T, V, heads
from torch import Tensor

import fusedkl

KINDS: dict[str, dict[str, Any]] = {
    "forward_kl": {},
    "reverse_kl": {},
    "jeffreys": {},
    "jsd": {"beta": 0.3},
    "skew_kl": {"alpha": 0.3},
    "renyi": {"alpha": 0.7},
    "tvd": {},
    "hellinger": {},
}
NAMES = ("hidden", "weight", "ref_hidden", "ref_weight")


def call(h: Heads, kind: str, **options: Any) -> Tensor:
    return fusedkl.linear_divergence(**h.tensors, kind=kind, **KINDS[kind], **options)


def per_token(h: Heads, kind: str, names: list[str], **options: Any) -> list[Tensor]:
    """Values, and gradients to what has a row for each token."""
    leaves = [h.tensors[name].clone().requires_grad_() for name in names]
    found = call(Heads(h.tensors | dict(zip(names, leaves, strict=True))), kind, **options)
    return [found.detach(), *torch.autograd.grad(found.sum(), leaves)]


@pytest.mark.slow
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["hidden", "ref_hidden", "ref_logits"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_token_stays_alone(kind: str, where: str, bad: float, backend: str) -> None:
    """The others have the bits that they have beside a good one."""
    h = heads(torch.float32)
    if where == "ref_logits":
        given = {"ref_logits": torch.randn(T, V)}
        h = Heads({name: h.tensors[name] for name in ("hidden", "weight")} | given)
    names = [name for name in ("hidden", "ref_hidden", "ref_logits") if name in h.tensors]
    clean = per_token(h, kind, names, tile=TILE, backend=backend)
    assert all(bool(t.isfinite().all()) for t in clean)
    token = 17
    h.tensors[where] = h.tensors[where].clone()
    h.tensors[where][token, 3] = bad
    found = per_token(h, kind, names, tile=TILE, backend=backend)
    # a logit of -inf is an absent token, not a bad row
    is_bad = where != "ref_logits" or bad != -math.inf
    assert bool(found[0][token].isnan()) == is_bad
    others = torch.arange(T) != token
    for name, ours, theirs in zip(["values", *names], found, clean, strict=True):
        assert torch.equal(ours[others], theirs[others]), name


def compare(h: Heads, kind: str, gradient: dict[torch.dtype, float], **options: Any) -> None:
    """With the divergence of whole rows in float64."""
    exact = h.double()
    leaves, true_leaves = h.leaves(*NAMES), exact.leaves(*NAMES)
    found = call(h, kind, **options)
    wanted = fusedkl.divergence(
        exact.logits(""), exact.logits("ref_"), kind, **KINDS[kind], backend="reference"
    )
    assert oracle.relative_error(found.detach(), wanted.detach(), 1e-3) < 1e-5
    upstream = torch.rand(found.shape, dtype=torch.float64) + 0.5
    slopes = torch.autograd.grad(found, leaves, upstream.to(found.dtype))
    truth = torch.autograd.grad(wanted, true_leaves, upstream)
    for name, leaf, slope, true in zip(NAMES, leaves, slopes, truth, strict=True):
        assert slope.dtype == leaf.dtype and slope.shape == leaf.shape, name
        off = oracle.relative_l2(slope.reshape(1, -1), true.reshape(1, -1))
        assert off < gradient[leaf.dtype], f"{name} off by {off}"


@pytest.mark.parametrize("sizes", [{"t": 1}, {"v": 5}, {"t": 1, "v": 2}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_one_token_and_less_than_a_tile(kind: str, sizes: dict[str, int], backend: str) -> None:
    h = heads(torch.float32, **sizes)
    compare(h, kind, {torch.float32: 1e-5}, tile=TILE, backend=backend)


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.float64),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_two_dtypes(kind: str, dtypes: tuple[torch.dtype, torch.dtype], backend: str) -> None:
    """Each head has that of its own weight; values are float64 if one of the two is."""
    h = heads(torch.float32)
    for name, t in h.tensors.items():
        h.tensors[name] = t.to(dtypes[name.startswith("ref_")])
    allowed = {
        torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 1e-5, torch.float64: 1e-5,
    }  # fmt: skip
    found = call(h, kind, tile=TILE, backend=backend)
    assert found.dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)
    compare(h, kind, allowed, tile=TILE, backend=backend)


def test_a_weight_for_two_dtypes() -> None:
    hidden, weight = torch.randn(4, H), torch.randn(9, H)
    with pytest.raises(TypeError, match="ref_weight must have the dtype of ref_hidden"):
        fusedkl.linear_divergence(hidden, weight, hidden.bfloat16())
