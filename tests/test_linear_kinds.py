"""What linear_divergence takes besides KLs: the family, labels; and linear_token_stats."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from family_oracle import FAMILY
from linear_cases import TILE, H, Heads, T, V, heads
from torch import Tensor

import fusedkl

GRADIENT = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float64: 1e-8}
NAMES = ("hidden", "weight", "ref_hidden", "ref_weight")
LINEAR_FAMILY = ["jsd 0.1", "skew_kl 0.7", "renyi 2", "tvd", "hellinger"]


def check(h: Heads, found: Tensor, exact: Heads, wanted: Tensor) -> None:
    """A token's value and all gradients for one upstream."""
    assert oracle.relative_error(found.detach(), wanted.detach()) <= 1e-5
    upstream = torch.rand(found.shape, dtype=torch.float64)
    leaves, true_leaves = [h.tensors[n] for n in NAMES], [exact.tensors[n] for n in NAMES]
    slopes = torch.autograd.grad(found, leaves, upstream.to(found.dtype))
    truth = torch.autograd.grad(wanted, true_leaves, upstream)
    for name, slope, true in zip(NAMES, slopes, truth, strict=True):
        assert slope.dtype == h.tensors[name].dtype
        assert oracle.relative_l2(slope, true) <= GRADIENT[slope.dtype], name


def pair(dtype: torch.dtype, **options: Any) -> tuple[Heads, Heads]:
    h = heads(dtype)
    h.options.update(options)
    exact = h.double()
    h.leaves(*NAMES)
    exact.leaves(*NAMES)
    return h, exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LINEAR_FAMILY)
def test_the_family(name: str, dtype: torch.dtype, backend: str) -> None:
    """With a bias that masks, a temperature, caps: tiles add up to the divergence of whole rows."""
    kind, parameter = FAMILY[name]
    h, exact = pair(dtype, softcap=9.0, ref_logit_scale=0.8)
    temperature = torch.rand(T, dtype=torch.float64) + 0.5
    found = fusedkl.linear_divergence(
        **h.tensors, kind=kind, **parameter, **h.options, temperature=temperature.float(),
        tile=TILE, backend=backend,
    )  # fmt: skip
    wanted = fusedkl.divergence(
        exact.logits(""), exact.logits("ref_"), kind, **parameter,
        temperature=temperature.float(), backend="reference",
    )  # fmt: skip
    check(h, found, exact, wanted)


@pytest.mark.parametrize("name", LINEAR_FAMILY)
def test_tokens_that_are_masked_in_one_head_or_bad(name: str, backend: str) -> None:
    kind, parameter = FAMILY[name]
    h = heads(torch.float32)
    h.tensors["bias"], h.tensors["ref_bias"] = torch.zeros(2, V)
    h.tensors["bias"][7:50] = -torch.inf  # more than a tile
    h.tensors["ref_bias"][::3] = -torch.inf
    h.tensors["hidden"][3] = torch.nan
    call = {"kind": kind, **parameter, "backend": backend}
    found = fusedkl.linear_divergence(**h.tensors, **call, tile=TILE)
    x, y = h.double().logits(""), h.double().logits("ref_")
    wanted = fusedkl.divergence(x, y, kind, **parameter, backend="reference")
    torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=0, equal_nan=True)
    assert bool(found[3].isnan()) and int(found.isnan().sum()) == 1


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_labels_in_the_loss(kind: str, backend: str) -> None:
    h, exact = pair(torch.float32)
    labels = torch.randint(0, V, (T,))
    labels[::5] = -100
    options = {"kind": kind, "temperature": 2.0, "labels": labels, "tile": TILE}
    found = fusedkl.linear_divergence(**h.tensors, **options, ce_weight=0.3, backend=backend)
    x, y = exact.logits(""), exact.logits("ref_")
    soft = fusedkl.divergence(x, y, kind, temperature=2.0, backend="reference")
    hard = F.cross_entropy(x, labels, reduction="none")
    counted = labels != -100
    check(h, found, exact, torch.where(counted, 0.7 * soft + 0.3 * hard, 0))
    mean = fusedkl.linear_divergence(
        **h.tensors, **options, ce_weight=0.3, reduction="mean", backend=backend
    )
    torch.testing.assert_close(mean, found.sum() / counted.sum())


@pytest.mark.parametrize("per_row", [None, 3])
def test_token_stats(per_row: int | None, backend: str) -> None:
    h, exact = pair(torch.float32, logit_scale=1.5)
    ids = torch.randint(0, V, (T,) if per_row is None else (T, per_row))
    mask = torch.rand(T) < 0.8
    ids[~mask] = 10**6  # of a token that is masked may be anything
    options = {"mask": mask, "temperature": 0.7}
    found = fusedkl.linear_token_stats(
        **h.tensors, token_ids=ids, **h.options, **options, tile=TILE, backend=backend
    )
    x, y = exact.logits(""), exact.logits("ref_")
    wanted = fusedkl.token_stats(x, y, ids, **options, backend="reference")
    for name, a, b in zip(found._fields, found, wanted, strict=True):
        assert a is not None and b is not None
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6, msg=name)
    weights = [torch.rand(a.shape, dtype=torch.float64) for a in wanted if a is not None]
    total = sum((a * w).sum() for a, w in zip(found, weights, strict=True))
    truth = sum((a * w).sum() for a, w in zip(wanted, weights, strict=True))
    slopes = torch.autograd.grad(total, [h.tensors[n] for n in NAMES])
    trues = torch.autograd.grad(truth, [exact.tensors[n] for n in NAMES])
    for name, slope, true in zip(NAMES, slopes, trues, strict=True):
        # products in float32, of logits that scale and temperature have doubled
        assert oracle.relative_l2(slope, true) <= 3e-5, name


def test_the_policys_half(backend: str) -> None:
    hidden, weight = torch.randn(5, H), torch.randn(60, H)
    ids = torch.randint(0, 60, (5,))
    found = fusedkl.linear_token_stats(
        hidden, weight, token_ids=ids, fields=("entropy", "logprob"), tile=(2, 16), backend=backend
    )
    log_p = (hidden.double() @ weight.double().t()).log_softmax(-1)
    assert found.entropy is not None and found.logprob is not None and found.logsumexp is None
    torch.testing.assert_close(
        found.entropy.double(), -(log_p.exp() * log_p).sum(-1), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        found.logprob.double(), log_p.gather(-1, ids[:, None])[:, 0], rtol=1e-5, atol=1e-6
    )


def test_bad_input() -> None:
    h = heads(torch.float32)
    ids = torch.zeros(T, dtype=torch.int64)
    for error, said, options in (
        (ValueError, "beta=0.5 has no effect on kind='forward_kl'", {"beta": 0.5}),
        (ValueError, "kind='renyi' needs alpha", {"kind": "renyi"}),
        (TypeError, "ce_weight needs labels", {"ce_weight": 0.5}),
        (TypeError, "got torch.int32", {"ce_weight": 0.5, "labels": ids.int()}),
        (ValueError, "ce_weight must be from 0 to 1; got 2", {"ce_weight": 2, "labels": ids}),
        (ValueError, f"to {V - 1}, or ignore_index", {"ce_weight": 0.5, "labels": ids + V}),
    ):
        with pytest.raises(error, match=said):
            fusedkl.linear_divergence(**h.tensors, **options)
    for error, said, extra in (
        (ValueError, f"token_ids must be from 0 to {V - 1}; got {V}", {"token_ids": ids + V}),
        (ValueError, "fields: logprob needs token_ids", {"fields": ["logprob"]}),
        (TypeError, "token_ids must be an int64 tensor", {"token_ids": ids.int()}),
    ):
        with pytest.raises(error, match=said):
            fusedkl.linear_token_stats(**h.tensors, **extra)
