"""The loss function for transformers' Trainer: its numbers, and a training run with it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedkl.integrations.transformers import distillation_loss_func

V = 50


class Tiny(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(V, 8)
        self.head = torch.nn.Linear(8, V)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        assert labels is None
        return SimpleNamespace(logits=self.head(self.embedding(input_ids)))


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(V, (3, 7))
    labels = ids.clone()
    labels[:, :3] = -100
    return ids, labels


def composed(student: Any, teacher: Any, ids: Tensor, labels: Tensor, t: float) -> Tensor:
    """Per-token forward KL, 0 where the label does not count."""
    with torch.no_grad():
        q = F.log_softmax(teacher(ids).logits[:, :-1] / t, -1)
    p = F.log_softmax(student(ids).logits[:, :-1] / t, -1)
    return F.kl_div(p, q, reduction="none", log_target=True).sum(-1) * (labels[:, 1:] != -100)


@pytest.mark.parametrize("items", [None, 40, torch.tensor(40)], ids=["own", "int", "tensor"])
def test_divergence_over_the_right_tokens(items: Any) -> None:
    student, teacher = Tiny(), Tiny()
    loss = distillation_loss_func(student, teacher, temperature=2.0)
    ids, labels = batch()
    found = loss(student(input_ids=ids), labels, num_items_in_batch=items)
    found.backward()
    grads = [p.grad.clone() for p in student.parameters() if p.grad is not None]
    student.zero_grad()
    wanted = composed(student, teacher, ids, labels, 2.0).sum() / (12 if items is None else 40)
    wanted.backward()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(grads, [p.grad for p in student.parameters()], rtol=1e-4, atol=1e-7)
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_cross_entropy_and_t2() -> None:
    student, teacher = Tiny(), Tiny()
    loss = distillation_loss_func(student, teacher, temperature=3.0, scale_t2=True, ce_weight=0.25)
    ids, labels = batch()
    outputs = student(ids)
    kl = composed(student, teacher, ids, labels, 3.0).sum() / 12
    ce = F.cross_entropy(outputs.logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1))
    student(ids)
    found = loss({"logits": outputs.logits}, labels)
    torch.testing.assert_close(found, 0.75 * 9 * kl + 0.25 * ce, rtol=1e-5, atol=0)


def test_all_cross_entropy_runs_no_teacher() -> None:
    """Nor is the loss NaN where the divergence, of which it takes nothing, is infinite."""
    student = Tiny()

    class Infinite(Tiny):
        called = 0

        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
            Infinite.called += 1
            return super().forward(input_ids)

    loss = distillation_loss_func(student, Infinite(), kind="reverse_kl", ce_weight=1.0)
    with torch.no_grad():
        loss.teacher.head.bias[3] = -torch.inf  # type: ignore[union-attr, operator]
    ids, labels = batch()
    outputs = student(ids)
    found = loss(outputs, labels)
    wanted = F.cross_entropy(outputs.logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    assert Infinite.called == 0
    with pytest.raises(RuntimeError, match="has not been called since"):
        loss(outputs, labels)


def test_labels_of_a_narrow_type() -> None:
    """300 is no number of theirs: none is left out, where 300 - 256 would leave out some."""
    student, teacher = Tiny(), Tiny()
    ids = torch.full((3, 7), 300 - 256)
    loss = distillation_loss_func(student, teacher, ignore_index=300)
    found = loss(student(ids), ids.to(torch.uint8))
    student(ids)
    torch.testing.assert_close(found, loss(student(ids), ids), rtol=0, atol=0)
    assert found > 0


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_both_terms_have_the_same_logits(temperature: float) -> None:
    """Padding, caps, scales and an own backend: the cross-entropy's too."""
    student, teacher = Tiny(), Tiny()
    ids, labels = batch()
    valid, cap, scale = V - 9, 0.5, 1.5
    ids, labels = ids % valid, torch.where(labels < 0, labels, labels % valid)
    loss = distillation_loss_func(
        student,
        teacher,
        temperature=temperature,
        ce_weight=0.25,
        valid_vocab=valid,
        softcap=cap,
        logit_scale=scale,
        backend="reference",
    )
    outputs = student(ids)
    found = loss(outputs, labels)

    def shaped(logits: Tensor) -> Tensor:
        return cap * torch.tanh(logits[:, :-1, :valid].double() * scale / cap)

    p = shaped(outputs.logits)
    log_q = F.log_softmax(shaped(teacher(ids).logits) / temperature, -1)
    log_p = F.log_softmax(p / temperature, -1)
    kl = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    counted = labels[:, 1:] != -100
    ce = F.cross_entropy(p.reshape(-1, valid), labels[:, 1:].reshape(-1))
    wanted = 0.75 * kl[counted].mean() + 0.25 * ce
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0)
    leaves = list(student.parameters())
    grads, wanted_grads = (
        torch.autograd.grad(t, leaves, retain_graph=True) for t in (found, wanted)
    )
    torch.testing.assert_close(grads, wanted_grads, rtol=1e-4, atol=1e-7)


def test_mistakes_are_named() -> None:
    student = Tiny()
    with pytest.raises(TypeError, match=r"teacher must be a torch.nn.Module; got str"):
        distillation_loss_func(student, "teacher")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"ce_weight must be from 0 to 1; got 2"):
        distillation_loss_func(student, Tiny(), ce_weight=2)
    with pytest.raises(TypeError, match="unknown options mask, tempreature"):
        distillation_loss_func(student, Tiny(), tempreature=2, mask=None)
    loss = distillation_loss_func(student, Tiny())
    ids, labels = batch()
    outputs = student(ids)
    loss(outputs, labels)
    with pytest.raises(RuntimeError, match="has not been called since"):
        loss(outputs, labels)
    student(ids)
    with pytest.raises(ValueError, match=r"labels must be in the batch.*got None"):
        loss(outputs, None)  # type: ignore[arg-type]
    loss.remove()
    student(ids)
    with pytest.raises(RuntimeError, match="has not been called since"):
        loss(outputs, labels)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
def test_trainer(tmp_path: Path) -> None:
    """Gradient accumulation: the Trainer's count makes two micro-batches one batch."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    def model(seed: int) -> Any:
        torch.manual_seed(seed)
        config = transformers.GPT2Config(
            vocab_size=V,
            n_positions=16,
            n_embd=16,
            n_layer=1,
            n_head=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        return transformers.GPT2LMHeadModel(config)

    rows = [batch() for _ in range(4)]
    rows[0][1][:, :5] = -100  # micro-batches of different numbers of tokens
    data = [{"input_ids": ids[i], "labels": labels[i]} for ids, labels in rows for i in range(2)]
    weights = []
    for size, accumulate in ((2, 2), (4, 1)):
        student, teacher = model(0), model(1)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=size,
            max_steps=4,
            gradient_accumulation_steps=accumulate,
            learning_rate=1e-2,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            seed=0,
            optim="sgd",
        )
        transformers.Trainer(
            model=student,
            args=arguments,
            train_dataset=data,
            compute_loss_func=distillation_loss_func(student, teacher, temperature=2.0),
        ).train()
        weights.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
        start = torch.cat([p.detach().flatten() for p in model(0).parameters()])
        assert (weights[-1] - start).norm() > 1e-4
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)
