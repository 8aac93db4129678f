"""The pass rewrites what people write, keeps the numbers, and says what it left alone and why."""

from __future__ import annotations

import dataclasses
import math
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from inductor_cases import FORMS, MARKS, N, V, Written, compiled, gradients, inputs, product
from patch_cases import padded
from torch import Tensor

import fusedkl
from fusedkl import autograd
from fusedkl.backends import BACKENDS
from fusedkl.inductor.reader import Reader

pytestmark = MARKS
ALL = list(product())


@pytest.fixture(autouse=True)
def nothing_reported() -> None:
    fusedkl.inductor.report(clear=True)


def agree(
    function: Callable[..., Tensor], given: tuple[Tensor, ...], tolerance: float | None = None
) -> fusedkl.inductor.Report:
    """Holds the rewritten function to float64 of the plain one; returns the report."""
    tolerance = tolerance or (1e-5 if given[0].dtype == torch.float32 else 4e-3)
    wide = [t.double() if t.is_floating_point() else t for t in given]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # kl_div's, of "mean"
        plain_dtype = function(*given).dtype
        wanted, grads = gradients(function, *wide)
        found, found_grads = gradients(compiled(function), *given)
    assert found.dtype == plain_dtype
    # A half-precision result is rounded by the code's own operations after the sum.
    half = plain_dtype in (torch.bfloat16, torch.float16)
    result_tolerance = 1.2e-2 if half else tolerance
    torch.testing.assert_close(found.double(), wanted.double(), rtol=result_tolerance, atol=1e-7)
    for g, f, t in zip(grads, found_grads, given, strict=True):
        assert (g is None) == (f is None)
        if g is not None and f is not None:
            assert (
                f.dtype == t.dtype and (f - g).norm() <= max(tolerance, result_tolerance) * g.norm()
            )
    return fusedkl.inductor.report(clear=True)


def check(written: Written) -> bool:
    """Whether it was rewritten. It is equal in any case."""
    torch.compiler.reset()
    report = agree(written.loss, inputs(written.dtype))
    assert report.rewritten or report.missed, "neither rewritten nor reported"
    return bool(report.rewritten)


def rate(cases: list[Written]) -> float:
    return sum(map(check, cases)) / len(cases)


@pytest.mark.sample
@pytest.mark.slow
def test_a_sample_of_the_product() -> None:
    assert rate(random.Random(0).sample(ALL, 60)) >= 0.9


@pytest.mark.full
@pytest.mark.parametrize("reference", FORMS)
@pytest.mark.parametrize("policy", FORMS)
def test_the_product(policy: str, reference: str) -> None:
    cases = [w for w in ALL if (w.policy, w.reference) == (policy, reference)]
    assert rate(random.Random(policy + reference).sample(cases, len(cases) // 2)) >= 0.9


def row_loss(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(x, -1), F.softmax(y, -1), reduction="none").sum(-1)


def both_directions_and_entropy(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    p, q = F.log_softmax(x / 2, -1), F.log_softmax(y / 2, -1)
    forward = F.kl_div(p, q, reduction="none", log_target=True).sum(-1)
    return forward + (p.exp() * (p - q)).sum(-1) + 0.1 * (p.exp() * p).sum(-1)


def teacher_without_grad(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    with torch.no_grad():
        q = F.softmax(y * 1, -1)
    return F.kl_div(F.log_softmax(x, -1), q, reduction="batchmean") + y.sum()


def detached(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    p, q = F.log_softmax(x, -1), F.log_softmax(y.detach(), -1)
    return (p.exp() * (p - q)).sum() + y.sum()


def metric_under_no_grad(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    p, q = F.log_softmax(x, -1), F.log_softmax(y, -1)
    with torch.no_grad():
        metric = (p.exp() * (p - q)).sum()
    return F.kl_div(p, q, log_target=True, reduction="sum") * metric


def selective(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    index = (mask * 7).long()
    p = F.log_softmax(x / 0.7, -1)
    chosen = p.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    return chosen - (p.exp() * p).sum(-1)


def selective_by_logsumexp(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    index = (mask * 7).long()
    lse = torch.logsumexp(x, -1)
    chosen = torch.gather(x, dim=-1, index=index.unsqueeze(-1)).squeeze(-1) - lse
    return chosen + (lse - (F.softmax(x, -1) * x).sum(-1))


def selective_by_a_loop(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """As TRL writes it, with the entropy beside it; x [..., N, V] in a loop over its first dim."""
    x = x.reshape(1, *x.shape).expand(2, -1, -1) / 0.7
    index = (mask * 7).long().unsqueeze(0).expand(2, -1).unsqueeze(-1)
    lse = torch.stack([torch.logsumexp(part, dim=-1) for part in x])
    chosen = (torch.gather(x, dim=-1, index=index) - lse.unsqueeze(-1)).squeeze(-1)
    log_p = F.log_softmax(x, dim=-1)
    return chosen[0] - (torch.exp(log_p) * log_p).sum(-1)[1]


def logsumexp_with_a_new_dim(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    p, q = x - x.logsumexp(-1)[..., None], y - y.logsumexp(-1)[:, None]
    index = (mask * 7).long()[:, None]
    x = x[None]
    chosen = x.gather(-1, index[None]) - x.logsumexp(-1)[:, :, None]
    return (q.exp() * (q - p)).sum(-1) + chosen[0, :, 0]


def metrics_without_grad(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """The entropy is only watched, the log-probability trained."""
    index = (mask * 7).long().unsqueeze(-1)
    log_p = F.log_softmax(x, -1)
    with torch.no_grad():
        watched = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(-1, index).squeeze(-1) * watched


def many_tokens(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    index = torch.arange(4).expand(x.shape[0], 4)
    return x.log_softmax(-1).gather(-1, index)


def kept(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    p = F.log_softmax(x, -1)
    kl = F.kl_div(p, F.softmax(y, -1), reduction="none")
    return kl.sum(-1) + p.max(-1).values + kl.square().sum(-1)


def masked_elements(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    kl = F.kl_div(F.log_softmax(x, -1), F.softmax(y, -1), reduction="none")
    column = mask.unsqueeze(-1)
    total = (kl * column).sum() + kl.masked_fill(column, 0).sum(-1, keepdim=True).sum()
    return total + torch.where(column, kl, 0.0).sum(dim=(0, 1)) / mask.sum()


def summed_over_no_dim(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    """To torch that is all of them."""
    kl = F.kl_div(F.log_softmax(x, -1), F.softmax(y, -1), reduction="none")
    return kl.sum(dim=()) + kl.sum([]) + kl.mean(dim=())


def selected_rows(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    kl = F.kl_div(F.log_softmax(x, -1), F.softmax(y, -1), reduction="none")
    return kl[mask].sum(-1).mean() + kl[mask].mean() + kl[mask].sum((0, 1))


def cross_entropy_with_a_teacher(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    return -(F.softmax(y, -1) * F.log_softmax(x, -1)).sum(-1)


def scaled_down(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    """The mean over elements of a batch and a vocabulary of models, in float32."""
    return -(F.softmax(y, -1) * F.log_softmax(x, -1) / (8192 * 151936)).sum() * 1e9


def scaled_further_down(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    log_p, log_q = F.log_softmax(x, -1), F.log_softmax(y, -1)
    return (1e-20 * (log_p.exp() * log_p) - 1e-20 * (log_q.exp() * log_p)).sum(-1) * 1e20


def entropies_that_cancel(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    log_p, log_q = F.log_softmax(x, -1), F.log_softmax(y, -1)
    terms = 1e6 * (log_q.exp() * log_q) - 1e5 * (log_q.exp() * log_p)
    return (terms - 3e5 * (log_q.exp() * log_p) - 6e5 * (log_q.exp() * log_p)).sum(-1) / 1e6


def two_temperatures(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(x / 2, -1), F.softmax(y / 3, -1), reduction="sum")


def temperature_per_row(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    t = (1 + mask.to(x.dtype)).unsqueeze(-1)
    return F.kl_div(F.log_softmax(x / t, -1), F.softmax(y / t, -1), reduction="none").sum(-1)


def temperature_below_zero(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    t = (1 - 3 * mask.to(x.dtype)).unsqueeze(-1)
    return F.kl_div(F.log_softmax(x / t, -1), F.softmax(y / t, -1), reduction="none").sum(-1)


def temperature_of_zero_in_a_masked_row(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    t = mask.to(x.dtype).unsqueeze(-1)
    return F.kl_div(F.log_softmax(x / t, -1), F.softmax(y / t, -1), reduction="none").sum(-1)[mask]


def temperature_in_a_tensor(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    t = mask.sum().to(x.dtype) - 6  # -3
    return F.kl_div(F.log_softmax(x / t, -1), F.softmax(y / t, -1), reduction="none").sum(-1)


def mixed(x: Tensor, y: Tensor, beta: float, weight: float) -> Tensor:
    """A Jensen-Shannon divergence about (1 - beta) p + beta q, if weight is beta."""
    log_p, log_q = F.log_softmax(x, -1), F.log_softmax(y, -1)
    parts = torch.stack([log_p + math.log1p(-beta), log_q + math.log(beta)])
    log_m = torch.logsumexp(parts, 0)
    of_q, of_p = (F.kl_div(log_m, row, reduction="none", log_target=True) for row in (log_q, log_p))
    return (weight * of_q + (1 - weight) * of_p).sum() / x.shape[0]


def jensen_shannon(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    return mixed(x, y, 0.5, 0.5)


def generalized_jensen_shannon(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    return mixed(x / 0.9, y / 0.9, 0.1, 0.1)


def mixture_of_other_weights(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    return mixed(x, y, 0.1, 0.3)


def sums_with_a_dtype_of_none(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    log_p, q = F.log_softmax(x, dim=-1, dtype=None), F.softmax(y, dim=-1)
    each = F.kl_div(log_p, q, reduction="none")
    return torch.mean(torch.sum(each, dim=-1, dtype=None), dtype=None)


REWRITTEN: dict[Callable[..., Tensor], tuple[str, ...]] = {
    sums_with_a_dtype_of_none: ("forward_kl",),
    jensen_shannon: ("jsd",),
    generalized_jensen_shannon: ("jsd",),
    row_loss: ("forward_kl",),
    both_directions_and_entropy: ("forward_kl", "reverse_kl", "entropy"),
    teacher_without_grad: ("forward_kl",),
    detached: ("reverse_kl",),
    metric_under_no_grad: ("forward_kl", "forward_kl"),
    selective: ("logprob", "entropy"),
    selective_by_logsumexp: ("logprob", "entropy"),
    selective_by_a_loop: ("logprob", "entropy"),
    logsumexp_with_a_new_dim: ("logprob", "forward_kl"),
    metrics_without_grad: ("entropy", "logprob"),
    many_tokens: ("logprob",),
    kept: ("forward_kl",),
    masked_elements: ("forward_kl",) * 3,
    summed_over_no_dim: ("forward_kl",) * 3,
    selected_rows: ("forward_kl",) * 3,
    cross_entropy_with_a_teacher: ("forward_kl + entropy",),
    scaled_down: ("forward_kl + entropy",),
    scaled_further_down: ("forward_kl + entropy",),
    entropies_that_cancel: ("forward_kl",),
    two_temperatures: ("forward_kl",),
    temperature_per_row: ("forward_kl",),
    temperature_below_zero: ("forward_kl",),
    temperature_in_a_tensor: ("forward_kl",),
}


@pytest.mark.slow
@pytest.mark.parametrize("function", REWRITTEN, ids=lambda f: f.__name__)
def test_rewritten_and_equal(function: Callable[..., Tensor]) -> None:
    report = agree(function, inputs())
    assert tuple(r.kinds for r in report.rewritten) == REWRITTEN[function]
    assert report.missed == () or function is kept
    x, y, mask = inputs()
    torch.compiler.reset()
    report = agree(function, (x, y.requires_grad_(), mask))
    assert len(report.rewritten) == len(REWRITTEN[function])


@pytest.mark.parametrize("numbers", [(2.0, 2.5, 4.0, -1.5, -3.0), (2, 3, 5, -2, -3)])
def test_a_number_that_changes(numbers: tuple[float, ...]) -> None:
    """A symbol, after the first value."""

    def loss(x: Tensor, y: Tensor, t: float) -> Tensor:
        return F.kl_div(F.log_softmax(x / t, -1), F.softmax(y / t, -1), reduction="sum")

    x, y, _ = inputs()
    found = compiled(loss)
    for t in numbers:
        wanted = loss(x.double(), y.double(), t)
        torch.testing.assert_close(found(x, y, t).double(), wanted, rtol=1e-5, atol=0)
    report = fusedkl.inductor.report()
    assert report.graphs == len(report.rewritten) == 2


def test_a_temperature_read_from_a_tensor() -> None:
    """A number that nobody can know the sign of while compiling."""

    def loss(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
        number = t.item()
        return F.kl_div(F.log_softmax(x / number, -1), F.softmax(y / number, -1), reduction="sum")

    for t in (torch.tensor(2.0), torch.tensor(-2.0)):
        with torch._dynamo.config.patch(capture_scalar_outputs=True):
            assert len(agree(loss, (*inputs()[:2], t)).rewritten) == 1


def test_a_temperature_on_the_host() -> None:
    """torch divides logits on a GPU by a 0-d tensor on the host."""

    def loss(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
        return F.kl_div(F.log_softmax(x / t, -1), F.softmax(y / t, -1), reduction="sum")

    x = torch.empty(N, V, device="meta")
    assert compiled(loss)(x, x + 1, torch.tensor(2.0)).device == x.device
    assert len(fusedkl.inductor.report().rewritten) == 1


def test_rows_masked_for_their_temperature() -> None:
    x, y, mask = inputs()
    x.requires_grad_(False)  # 0 / 0 in the masked rows' gradients, in torch too
    wanted = temperature_of_zero_in_a_masked_row(x.double(), y.double(), mask)
    found = compiled(temperature_of_zero_in_a_masked_row)(x, y, mask)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0)
    assert len(fusedkl.inductor.report().rewritten) == 1


def test_tokens_that_neither_row_has() -> None:
    """NaN in torch (0 times inf - inf); rewritten, that of the tokens that there are."""
    x, y, mask = inputs()
    wanted = row_loss(x.detach().double(), y.double(), mask)
    given = padded(x, y)
    found, (gradient, _, _) = gradients(compiled(row_loss), *given, mask)
    assert row_loss(*given, mask).isnan().all()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0)
    assert gradient is not None and gradient.isfinite().all() and not gradient[:, V:].any()


def over_another_dim(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(x, 0), F.softmax(y, 0), reduction="sum")


def not_summed(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(x, -1), F.softmax(y, -1), reduction="none")


def summed_over_tokens(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    return not_summed(x, y, _).sum(0)


def written_in_between(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    z = y * 1
    q = F.softmax(z, -1)
    z.add_(torch.arange(V))
    return F.kl_div(F.log_softmax(x, -1), q, reduction="sum") + z.sum()


def broadcast(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(x, -1), F.softmax(y[:1], -1), reduction="sum")


def unnormalised(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(x, -1), y.exp(), reduction="sum")


def picked_by_indexing(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    return F.log_softmax(x, -1)[torch.arange(N), (mask * 7).long()]


def picked_from_some_rows(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    return F.log_softmax(x, -1).gather(-1, (mask * 7).long().unsqueeze(-1)[1:]).squeeze(-1)


def picked_over_tokens(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    return F.log_softmax(x, 0).gather(-1, (mask * 7).long().unsqueeze(-1)).squeeze(-1)


def picked_at_another_temperature(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    chosen = x.gather(-1, (mask * 7).long().unsqueeze(-1)).squeeze(-1)
    return chosen - torch.logsumexp(x / 2, -1)


def picked_and_broadcast(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """[N] less [N, 1]."""
    x = x.unsqueeze(1)
    index = (mask * 7).long().view(-1, 1, 1)
    chosen = x.gather(-1, index).squeeze(-1)
    return chosen - x.logsumexp(-1, keepdim=True).squeeze(-1).squeeze(-1)


def picked_with_a_keyword(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    index = (mask * 7).long().unsqueeze(-1)
    return torch.gather(F.log_softmax(x, -1), -1, index, sparse_grad=False)


def logsumexp_of_another_row(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    p = x - torch.logsumexp(x / 2, -1, keepdim=True)
    return (p.exp() * p).sum(-1)


def logsumexp_along_another_dim(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    """[1, N, V] less [1, 1, N]: a new dim that is not the last one."""
    x = x[None, :, :N]
    p = x - x.logsumexp(-1)[:, None]
    return (p.exp() * p).sum(-1)


def log_probabilities_from_elsewhere(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    p = F.log_softmax(x, -1)
    return (p.exp() * (p - y)).sum(-1)


def jeffreys(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    p, q = F.log_softmax(x, -1), F.log_softmax(y, -1)
    return ((p.exp() - q.exp()) * (p - q)).sum(-1)


def entropy_with_an_epsilon(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    p = F.softmax(x, -1)
    return -(p * torch.log(p + 1e-8)).sum(-1)


def clamped_probabilities(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    p = F.softmax(x, -1).clamp(min=1e-8)
    return F.kl_div(p.log(), F.softmax(y, -1), reduction="sum")


def clamped_below(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    return (F.softmax(y, -1) * F.softmax(x, -1).clamp_min(1e-8).log()).sum(-1)


def mixture_of_probabilities(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    p, q = F.softmax(x, -1), F.softmax(y, -1)
    m = 0.5 * (p + q)
    return (p * (p.log() - m.log())).sum(-1)


def differentiated_forward(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    value, tangent = torch.func.jvp(lambda z: row_loss(z, y, mask), (x,), (y,))
    return value + tangent


def narrowed(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    p = F.log_softmax(x, -1, dtype=torch.float64)
    return F.kl_div(p, F.softmax(y, -1), reduction="sum").float()


LEFT_ALONE = {
    over_another_dim: "over dim 0 of 2",
    not_summed: "something else than its sum",
    summed_over_tokens: "something else than its sum",
    written_in_between: "changed in place between",
    broadcast: "broadcast",
    unnormalised: "kl_div: target is exp",
    picked_by_indexing: "by indexing; gather(-1, tokens) is known",
    picked_from_some_rows: "an index (4, 1) that does not have their rows (5,)",
    picked_over_tokens: "over dim 0 of 2",
    picked_at_another_temperature: "not of the same row at one temperature",
    logsumexp_of_another_row: "logits less a logsumexp that is not of the same row",
    log_probabilities_from_elsewhere: "is of log-probabilities and l_y_, which is no log",
    picked_with_a_keyword: "gather: sparse_grad is not read",
    jeffreys: "mul: one side sub, which is arithmetic on softmaxes",
    entropy_with_an_epsilon: "log of add, which is arithmetic on softmaxes",
    clamped_probabilities: "log of p, which is arithmetic on softmaxes",
    clamped_below: "log of clamp_min, which is arithmetic on softmaxes",
    mixture_of_probabilities: "log of m, which is arithmetic on softmaxes",
    differentiated_forward: "forward-mode AD",
    narrowed: "turns torch.float32 into torch.float64",
    mixture_of_other_weights: "not weighted as its mixture is",
}


@pytest.mark.parametrize("function", LEFT_ALONE, ids=lambda f: f.__name__)
def test_near_misses_are_left_alone_and_reported(function: Callable[..., Tensor]) -> None:
    report = agree(function, inputs())
    assert report.rewritten == () and len(report.missed) == 1
    assert LEFT_ALONE[function] in report.missed[0].reason
    assert "test_inductor_pass.py:" in report.missed[0].where
    assert LEFT_ALONE[function] in str(report)


def test_token_statistics_are_one_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probabilities and the entropy of the same rows come from one call of the operator."""
    asked = []
    stats = autograd.row_stats

    def counting(x: Tensor, y: Tensor | None, ids: Tensor | None, fields: Any, *a: Any, **k: Any):  # type: ignore[no-untyped-def]
        asked.append(tuple(fields))
        return stats(x, y, ids, fields, *a, **k)

    monkeypatch.setattr(autograd, "row_stats", counting)
    for function in (selective, selective_by_logsumexp, selective_by_a_loop):
        torch.compiler.reset()
        asked.clear()
        compiled(function)(*inputs())
        assert len(asked) == 1 and sorted(asked[0]) == ["entropy", "logprob"], function


@pytest.mark.parametrize("function", [picked_and_broadcast, logsumexp_along_another_dim])
def test_a_shape_that_is_not_ours(function: Callable[..., Tensor]) -> None:
    assert agree(function, inputs()).rewritten == ()


def test_arithmetic_on_softmaxes_that_is_no_divergence() -> None:
    def gates(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
        p = F.softmax(x, -1)
        return (p * (1 - p) + (p + 1e-8) / 2).clamp(0, 1).sum(-1) + torch.log(y.exp() + 1).sum(-1)

    report = agree(gates, inputs())
    assert (report.rewritten, report.missed) == ((), ())


def test_a_graph_that_cannot_be_read_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise IndexError("tuple index out of range")

    monkeypatch.setattr(Reader, "_sum", broken)
    x, y, mask = inputs()
    with pytest.warns(RuntimeWarning, match="could not read a graph.*IndexError: tuple"):
        found = compiled(row_loss)(x, y, mask)
    assert torch.equal(found, row_loss(x, y, mask))
    report = fusedkl.inductor.report()
    assert (report.graphs, report.rewritten, len(report.missed)) == (1, (), 1)
    assert "IndexError: tuple index out of range" in report.missed[0].reason


def half_detached(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    p, q = F.log_softmax(x, -1), F.log_softmax(y, -1)
    return (p.exp() * (p.detach() - q)).sum(-1) * 2 + (q.exp().detach() * (q - p)).sum(-1)


def test_detached_factors_keep_their_gradients() -> None:
    x, y, mask = inputs()
    agree(half_detached, (x, y.requires_grad_(), mask))


def rows_in_another_order(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    x = x.reshape(1, *x.shape).expand(2, -1, -1) * torch.tensor([1.0, 2.0]).view(2, 1, 1)
    index = (mask * 7).long().unsqueeze(0).expand(2, -1).unsqueeze(-1)
    lse = torch.stack([torch.logsumexp(x[i], dim=-1) for i in (1, 0)])
    return (torch.gather(x, dim=-1, index=index) - lse.unsqueeze(-1)).squeeze(-1)


def test_a_loop_in_another_order_is_not_the_whole() -> None:
    assert agree(rows_in_another_order, inputs()).rewritten == ()


def test_other_graphs_are_not_touched() -> None:
    def attention(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
        return F.cross_entropy(F.softmax(x @ y.T, -1) @ y, y.argmax(-1))

    report = agree(attention, inputs())
    assert (report.graphs, report.rewritten, report.missed) == (1, (), ())


def test_autocast() -> None:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.kl_div(F.log_softmax(x, -1), F.softmax(y, -1), reduction="batchmean")

    x, y, _ = inputs(torch.bfloat16)
    found = compiled(loss)(x, y)
    assert found.dtype == loss(x, y).dtype == torch.float32
    wanted = fusedkl.forward_kl(x, y, reduction="mean")
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    assert len(fusedkl.inductor.report().rewritten) == 1


def test_what_the_kernels_do_not_take_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton has no float64: where it is the only one, such logits stay torch's."""
    limited = dataclasses.replace(BACKENDS["cpu"], takes=BACKENDS["triton"].takes)
    monkeypatch.setitem(BACKENDS, "cpu", limited)
    x, y, _ = inputs()
    for given in ((x.double().detach(), y.double()), (x.detach(), y.double())):
        torch.compiler.reset()
        found = compiled(row_loss)(*given, y)
        torch.testing.assert_close(found, row_loss(*given, y), rtol=1e-6, atol=0)
        report = fusedkl.inductor.report(clear=True)
        assert report.rewritten == () and len(report.missed) == 1
        assert "no compiled kernel for torch.float" in report.missed[0].reason
        assert "torch.float64 on cpu" in report.missed[0].reason
    assert len(agree(row_loss, inputs()).rewritten) == 1
