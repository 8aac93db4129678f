"""linear_divergence at the ends of ce_weight, ids of no token, and no tokens at all."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fusedkl
from fusedkl import linear_ops, validation

N, H, V = 5, 8, 37


def heads() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(2, N, H, generator=generator)
    w, u = torch.randn(2, V, H, generator=generator)
    return x, w, y, u


def test_labels_alone_read_no_reference(backend: str) -> None:
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    other = torch.full((5, 8), math.nan, requires_grad=True)
    labels = torch.arange(5)
    options = {"labels": labels, "ce_weight": 1.0, "tile": (2, 7), "backend": backend}
    loss = fusedkl.linear_divergence(hidden, weight, other, reduction="mean", **options)
    found = torch.autograd.grad(loss, (hidden, weight, other), allow_unused=True)
    wanted = torch.nn.functional.cross_entropy(hidden @ weight.t(), labels)
    torch.testing.assert_close(loss, wanted)
    truth = torch.autograd.grad(wanted, (hidden, weight))
    torch.testing.assert_close(found[:2], truth, rtol=1e-5, atol=1e-6)
    assert found[2] is None


@pytest.mark.parametrize("ce_weight", [0.0, 1.0])
def test_a_term_that_does_not_count_may_be_infinite(ce_weight: float, backend: str) -> None:
    x, w, y, u = heads()
    labels, bias = torch.arange(N), torch.zeros(V)
    # no policy on the label of row 0: an infinite cross-entropy; and on token 9: an infinite KL
    bias[0 if ce_weight == 0 else 9] = -math.inf
    ref_bias = bias.clone()
    if ce_weight == 1:
        ref_bias[9] = 0
    x.requires_grad_()
    found = fusedkl.linear_divergence(
        x, w, y, u, bias=bias, ref_bias=ref_bias, labels=labels, ce_weight=ce_weight,
        backend=backend,
    )  # fmt: skip
    logits, other = (x @ w.t() + bias).double(), (y @ u.t() + ref_bias).double()
    log_p, log_q = logits.log_softmax(-1), other.log_softmax(-1)
    terms = torch.where(log_q > -math.inf, log_q.exp() * (log_q - log_p), 0).sum(-1)
    wanted = -log_p[torch.arange(N), labels] if ce_weight == 1 else terms
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    (slope,) = torch.autograd.grad(found.sum(), x)
    assert bool(slope.isfinite().all())


def test_an_id_of_no_token_is_nan_where_nobody_may_look(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, whose contents the host does not wait for."""
    if backend == "reference":
        pytest.skip("it looks at all contents")
    monkeypatch.setattr(validation, "token_range", lambda *_: None)
    x, w, y, u = heads()
    ids = torch.tensor([0, -1, V - 1, V, 4])
    stats = fusedkl.linear_token_stats(
        x, w, ref_hidden=y, ref_weight=u, token_ids=ids, backend=backend
    )
    for name in ("logprob", "ref_logprob", "k3"):
        assert getattr(stats, name).isnan().tolist() == [False, True, False, True, False], name
    assert stats.entropy is not None and bool(stats.entropy.isfinite().all())
    loss = fusedkl.linear_divergence(
        x, w, y, u, labels=ids, ignore_index=-100, ce_weight=0.5, backend=backend
    )
    assert loss.isnan().tolist() == [False, True, False, True, False]


def test_labels_of_distillation_are_no_other_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "token_range", lambda *_: None)
    x, y = torch.randn(2, 3, V)
    with pytest.raises(ValueError, match="-1"):
        fusedkl.distillation_loss(x, y, torch.tensor([0, -1, 2]), ce_weight=1.0)


def test_no_tokens_with_ids(backend: str) -> None:
    _, w, _, u = heads()
    none = torch.empty(0, H)
    for ids in (torch.empty(0, dtype=torch.int64), torch.empty(0, 3, dtype=torch.int64)):
        stats = fusedkl.linear_token_stats(
            none, w, ref_hidden=none, ref_weight=u, token_ids=ids, backend=backend
        )
        assert stats.logprob is not None and stats.logprob.shape == ids.shape


@pytest.mark.parametrize("given", ["ref_hidden", "ref_logits", "labels", "top-k"])
def test_a_bad_token_whose_gradient_is_0_under_create_graph(given: str, backend: str) -> None:
    """It does not reach the weights; the share that it has still has its gradient elsewhere."""
    x, w, y, u = heads()
    bad = 2
    x[bad, 1] = math.nan
    other = y @ u.t()
    other[0, 3] = -math.inf  # of a token that counts: no reason to leave it out
    options = {
        "ref_hidden": {"ref_hidden": y, "ref_weight": u},
        "ref_logits": {"ref_logits": other},
        "labels": {"ref_hidden": y, "ref_weight": u, "labels": torch.arange(N), "ce_weight": 0.3},
        "top-k": {"ref_topk": (torch.arange(3).expand(N, 3), torch.full((N, 3), -2.0))},
    }[given]
    leaves = [x.requires_grad_(), w.requires_grad_()]
    leaves += [t.requires_grad_() for t in (options.get("ref_weight"),) if t is not None]
    share = torch.ones(N)
    share[bad] = share[0] = 0
    share.requires_grad_()
    for weight in (None, share):
        found = fusedkl.linear_divergence(x, w, token_weight=weight, backend=backend, **options)
        loss = found[torch.arange(N) != bad].sum()
        if weight is not None:
            loss = found.sum()
        plain = torch.autograd.grad(loss, leaves, retain_graph=True)
        once = torch.autograd.grad(loss, leaves, create_graph=True)
        for slope, wanted in zip(once, plain, strict=True):
            assert bool(slope.isfinite().all())
            torch.testing.assert_close(slope, wanted, rtol=1e-4, atol=1e-5)
    (again,) = torch.autograd.grad(once[1].square().sum() + once[1].sum(), share)
    # row 0 has weight 0 and a divergence that is a number: its gradient is not left out
    assert float(again[bad]) == 0 and float(again[0]) != 0 and bool(again.isfinite().all())


def test_statistics_of_one_side_have_derivatives_by_both(backend: str) -> None:
    x, w, y, u = (t.requires_grad_() for t in heads())
    ids = torch.arange(N)
    for frozen in (False, True):
        given = (y.detach(), u.detach()) if frozen else (y, u)
        stats = fusedkl.linear_token_stats(
            x, w, *given, ids, fields=["ref_entropy"], backend=backend
        )
        assert stats.ref_entropy is not None
        leaves = (x, w) if frozen else (x, w, y, u)
        for again in (False, True):
            found = torch.autograd.grad(
                stats.ref_entropy.sum(), leaves, create_graph=again, retain_graph=True
            )
            assert not bool(found[0].any()) and not bool(found[1].any())
            if not frozen:
                exact = [t.detach().double().requires_grad_() for t in (y, u)]
                log_q = (exact[0] @ exact[1].t()).log_softmax(-1)
                truth = torch.autograd.grad(-(log_q.exp() * log_q).sum(), exact)
                torch.testing.assert_close(found[2].double(), truth[0], rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(found[3].double(), truth[1], rtol=1e-5, atol=1e-6)


def test_temperatures_are_looked_at_whoever_reads_them(backend: str) -> None:
    x, w, y, u = heads()
    temperature, mask = torch.tensor([1.0, 2.0, -2.0, 1.0, 1.0]), torch.arange(N) != 2
    labels = torch.arange(N)
    for wrong in (-2.0, 0.0, math.nan, math.inf):
        temperature[2] = wrong
        options = {"temperature": temperature, "backend": backend}
        for more in ({}, {"labels": labels, "ce_weight": 1.0}):
            with pytest.raises(ValueError, match="temperature must be positive and finite; got"):
                fusedkl.linear_divergence(x, w, y, u, **options, **more)
            found = fusedkl.linear_divergence(x, w, y, u, mask=mask, **options, **more)
            assert bool(found.isfinite().all())
        with pytest.raises(ValueError, match="temperature must be positive and finite; got"):
            fusedkl.linear_token_stats(x, w, token_ids=labels, **options)


def test_given_logits_of_nan_that_are_masked_and_capped(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read as on a GPU, where tokens are not dropped, for an upstream gradient of 0."""
    x, w, y, u = heads()
    mask, other = torch.arange(N) != 2, y @ u.t()
    leaves = [t.requires_grad_() for t in (x, w, other)]
    call = {"mask": mask, "ref_softcap": 2.0, "reduction": "sum", "backend": backend}
    truth = torch.autograd.grad(fusedkl.linear_divergence(x, w, ref_logits=other, **call), leaves)
    with torch.no_grad():
        other[2] = math.nan
    monkeypatch.setattr(linear_ops, "_places", lambda counted: None)
    loss = fusedkl.linear_divergence(x, w, ref_logits=other, **call)
    for slope, wanted in zip(torch.autograd.grad(loss, leaves), truth, strict=True):
        torch.testing.assert_close(slope, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("given", ["ref_hidden", "ref_logits"])
def test_a_masked_token_of_nan_under_create_graph(given: str, backend: str) -> None:
    x, w, y, u = heads()
    mask = torch.arange(N) != 2
    other = y @ u.t() if given == "ref_logits" else y
    x[2], other[2] = math.nan, math.nan
    x.requires_grad_()
    w.requires_grad_()
    reference = {"ref_logits": other} if given == "ref_logits" else {given: other, "ref_weight": u}
    loss = fusedkl.linear_divergence(
        x, w, mask=mask, reduction="sum", backend=backend, **reference
    )  # fmt: skip
    once = torch.autograd.grad(loss, (x, w), create_graph=True)
    plain = torch.autograd.grad(loss, (x, w))
    for found, wanted in zip(once, plain, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert bool(found.isfinite().all())
    (again,) = torch.autograd.grad(sum(g.square().sum() for g in once), w)
    assert bool(again.isfinite().all()) and bool(again.any())
