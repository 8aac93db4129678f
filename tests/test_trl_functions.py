"""What stands in for TRL's functions, against float64 and against TRL's own where it is there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedkl import linear_plan, linear_tiles
from fusedkl.integrations import trl_functions as ours

pytestmark = pytest.mark.filterwarnings("ignore")

N, V, H, TEACHER_H = 23, 517, 24, 40
KINDS = {"plain": (1.0, None), "scaled": (0.25, None), "capped": (1.5, 20.0)}


def head(width: int, dtype: torch.dtype, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    hidden = torch.randn(N, width, dtype=torch.float64)
    weight = torch.randn(V, width, dtype=torch.float64)
    return (
        hidden.to(dtype).requires_grad_(),
        weight.to(dtype).requires_grad_(),
        torch.randn(V, dtype=torch.float64).to(dtype).requires_grad_() if bias else None,
    )


def logits64(parts: Any, scale: float, softcap: float | None, temperature: float) -> Tensor:
    hidden, weight, bias = (None if t is None else t.double() for t in parts)
    z = hidden @ weight.t() + (0 if bias is None else bias)
    z = z * scale
    return (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature


def gradients(loss: Tensor, parts: Any) -> list[Tensor]:
    given = [t for t in parts if t is not None]
    return [g.double() for g in torch.autograd.grad(loss, given, retain_graph=True)]


def agree(found: list[Tensor], wanted: list[Tensor], limit: float) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).norm() <= limit * b.norm(), float((a - b).norm() / b.norm())


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_log_probabilities(dtype: torch.dtype, kind: str, bias: bool) -> None:
    scale, softcap = KINDS[kind]
    parts, targets = head(H, dtype, bias), torch.randint(V, (N,))
    found = ours.ChunkedLogProb.apply(*parts, targets, 0.7, 64, softcap, scale)
    z = logits64(parts, scale, softcap, 0.7)
    log_p = z.log_softmax(-1)
    wanted = {
        "log_probs": log_p.gather(-1, targets[:, None])[:, 0],
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "log_sum_sq_probs": (2 * log_p).logsumexp(-1),
        "mean_logits": z.mean(-1),
    }
    for value, got in zip(wanted.values(), found, strict=False):
        torch.testing.assert_close(got.double(), value, rtol=1e-5, atol=2e-5)
    assert torch.equal(found[4], z.argmax(-1) == targets)
    assert [t.requires_grad for t in found] == [True, True, False, False, False]
    limit = 2e-5 if dtype == torch.float32 else 4e-3
    for weights in ((1.0, 0.0), (0.0, 1.0), (0.5, -2.0)):
        towards = torch.linspace(-1, 2, N)
        loss = sum(w * (t * towards).sum() for w, t in zip(weights, found, strict=False))
        reference = weights[0] * (wanted["log_probs"] * towards).sum()
        reference = reference + weights[1] * (wanted["entropy"] * towards).sum()
        agree(gradients(loss, parts), gradients(reference, parts), limit)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_many_tiles(beta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 8 tokens and 64 entries, of which the last ones are smaller."""
    student, teacher = head(H, torch.float32), head(TEACHER_H, torch.float32)
    targets = torch.randint(V, (N,))

    def step() -> tuple[Tensor, ...]:
        found = ours.ChunkedLogProb.apply(*student, targets, 0.7, 64)
        divergence, entropy = ours.ChunkedDivergence.apply(*student, *teacher, beta, 1.3)
        loss = found[0].sum() + found[1].square().sum() + divergence.square().sum()
        values = (*found[:4], found[4].float(), divergence, entropy)
        return *(t.detach() for t in values), *torch.autograd.grad(loss, student)

    once = step()
    tiles = linear_plan.tiles

    def small(n: int, v: int, itemsize: int, device: str, tile: Any = None) -> Any:
        return tiles(n, v, itemsize, device, (8, 64))

    monkeypatch.setattr(linear_tiles, "tiles", small)
    agree([t.double() for t in step()], [t.double() for t in once], 1e-5)


def test_only_what_was_asked() -> None:
    parts, targets = head(H, torch.float32), torch.randint(V, (N,))
    found = ours.ChunkedLogProb.apply(*parts, targets, 1.0, 64, None, 1.0, ("log_probs",))
    assert [t is None for t in found] == [False, True, True, True, True]
    found = ours.ChunkedLogProb.apply(*parts, targets, 1.0, 64, outputs=("is_top1",))
    assert [t is None for t in found] == [False, True, True, True, False]


def test_first_of_equal_logits_is_top() -> None:
    hidden, weight = torch.ones(4, 1), torch.zeros(9000, 1)
    weight[[5, 800, 7000]] = 1.0
    targets = torch.tensor([5, 800, 7000, 6])
    top = ours.ChunkedLogProb.apply(hidden, weight, None, targets, 1.0, 64)[4]
    assert top.tolist() == [True, False, False, False]


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_divergence(dtype: torch.dtype, kind: str, beta: float) -> None:
    scale, softcap = KINDS[kind]
    student, teacher = head(H, dtype), head(TEACHER_H, dtype)
    options = (1.3, scale, softcap, 0.8, 15.0)
    divergence, entropy = ours.ChunkedDivergence.apply(*student, *teacher, beta, *options)
    log_p = logits64(student, scale, softcap, 1.3).log_softmax(-1)
    log_q = logits64(teacher, 0.8, 15.0, 1.3).log_softmax(-1).detach()
    wanted = generalized(log_p, log_q, beta).sum(-1)
    torch.testing.assert_close(divergence.double(), wanted, rtol=2e-5, atol=0)
    torch.testing.assert_close(
        entropy.double(), -(log_p.exp() * log_p).sum(-1), rtol=2e-5, atol=1e-6
    )
    assert not entropy.requires_grad
    limit = 2e-5 if dtype == torch.float32 else 4e-3
    weights = torch.linspace(-1, 2, N)
    found = gradients((divergence * weights).sum(), student)
    agree(found, gradients((wanted * weights).sum(), student), limit)
    assert all(
        g is None
        for g in torch.autograd.grad((divergence * weights).sum(), teacher, allow_unused=True)
    )


def generalized(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """The generalized JSD, term by term."""
    if beta == 0:
        return log_q.exp() * (log_q - log_p)
    if beta == 1:
        return log_p.exp() * (log_p - log_q)
    log_m = torch.log((1 - beta) * log_p.exp() + beta * log_q.exp())
    to_teacher, to_student = log_q.exp() * (log_q - log_m), log_p.exp() * (log_p - log_m)
    return beta * to_teacher + (1 - beta) * to_student


def test_no_token_at_all() -> None:
    student, teacher = head(H, torch.float32), head(TEACHER_H, torch.float32)
    empty = (student[0][:0], *student[1:])
    divergence, entropy = ours.ChunkedDivergence.apply(*empty, teacher[0][:0], *teacher[1:], 0.0)
    assert divergence.shape == entropy.shape == (0,)
    divergence.sum().backward()
    for t in student:
        assert t is not None and torch.equal(t.grad, torch.zeros_like(t))


@pytest.mark.parametrize("items", [None, 40, torch.tensor(40)], ids=["own", "int", "tensor"])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean"])
@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "no labels"])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_jsd_of_logits(beta: float, labelled: bool, reduction: str, items: Any) -> None:
    student, teacher = (torch.randn(3, 7, 91).mul(2).requires_grad_() for _ in range(2))
    labels = torch.randint(91, (3, 7)) if labelled else None
    if labels is not None:
        labels[0, :4] = labels[2] = -100
    options = dict(beta=beta, temperature=1.7, reduction=reduction, num_items_in_batch=items)
    found = ours.generalized_jsd_loss(student, teacher, labels, **options)
    log_p, log_q = (F.log_softmax(t.double() / 1.7, -1) for t in (student, teacher))
    terms = generalized(log_p, log_q, beta)
    kept = terms if labels is None else terms[labels != -100]
    if items is not None:
        wanted = kept.sum() / 40
    elif reduction == "batchmean":
        wanted = kept.sum() / (3 if labels is None else len(kept))
    else:
        wanted = kept.sum() if reduction == "sum" else kept.mean()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0)
    agree(gradients(found, [student]), gradients(wanted, [student]), 1e-5)


def test_nothing_labelled_is_zero() -> None:
    student = torch.randn(2, 3, 20, requires_grad=True)
    labels = torch.full((2, 3), -100)
    loss = ours.generalized_jsd_loss(student, torch.randn(2, 3, 20), labels, beta=0.0)
    loss.backward()
    assert loss.item() == 0 and torch.equal(student.grad, torch.zeros_like(student))


def test_logits_of_older_trainers() -> None:
    logits = torch.randn(3, 5, 91, requires_grad=True)
    index = torch.randint(91, (3, 5))
    mask = torch.rand(3, 5) < 0.6
    spoiled = torch.where(mask[..., None], logits, torch.nan)
    found = ours.selective_log_softmax(spoiled, torch.where(mask, index, -100), 0.5, mask.int())
    log_p = (logits.double() / 0.5).log_softmax(-1)
    wanted = torch.where(mask, log_p.gather(-1, index[..., None])[..., 0], 0)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)
    agree(gradients(found.sum(), [logits]), gradients(wanted.sum(), [logits]), 1e-5)
    both = ours.selective_log_softmax_and_entropy(spoiled, index, False, 0.5, mask)
    torch.testing.assert_close(both[0], found, rtol=1e-6, atol=0)
    wanted_entropy = torch.where(mask, -(log_p.exp() * log_p).sum(-1), 0)
    torch.testing.assert_close(both[1].double(), wanted_entropy, rtol=1e-6, atol=0)
    assert both[0].requires_grad and not both[1].requires_grad
    many = torch.randint(91, (3, 5, 4))
    kept = mask[..., None] & (torch.rand(3, 5, 4) < 0.7)
    torch.testing.assert_close(
        ours.selective_log_softmax(spoiled, many, row_mask=kept),
        torch.where(kept, logits.log_softmax(-1).gather(-1, many), 0),
        rtol=1e-6,
        atol=1e-6,
    )
    torch.testing.assert_close(
        ours.selective_log_softmax(logits, many),
        logits.log_softmax(-1).gather(-1, many),
        rtol=1e-6,
        atol=1e-6,
    )
    entropy = ours.entropy_from_logits(logits, chunk_size=3)
    plain = logits.double().log_softmax(-1)
    torch.testing.assert_close(entropy.double(), -(plain.exp() * plain).sum(-1), rtol=1e-6, atol=0)


def test_mistakes_are_named() -> None:
    logits = torch.randn(2, 3, 20)
    with pytest.raises(
        ValueError, match=r"reduction must be one of batchmean, sum, mean; got .none"
    ):
        ours.generalized_jsd_loss(logits, logits, reduction="none")
    partitioned = torch.nn.Parameter(torch.randn(V, H))
    partitioned.ds_id = 3  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="ZeRO-3's parameters, which are partitioned"):
        ours.ChunkedLogProb.apply(
            torch.randn(4, H), partitioned, None, torch.zeros(4, dtype=torch.long), 1.0, 64
        )
