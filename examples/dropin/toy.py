"""What the six scripts of this folder share: student, teacher, and the training loop."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def train(
    loss: Callable[[Tensor, Tensor], Tensor],
    steps: int = 4,
    rows: int = 8,
    vocabulary: int = 4096,
    dtype: torch.dtype = torch.float32,
) -> list[float]:
    """The losses of a few steps; `loss` takes the student's and the teacher's logits."""
    torch.manual_seed(0)
    student, teacher = (nn.Linear(16, vocabulary).to(dtype) for _ in range(2))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    losses = []
    for _ in range(steps):
        hidden = torch.randn(rows, 16, dtype=dtype)
        with torch.no_grad():
            teacher_logits = teacher(hidden)
        value = loss(student(hidden), teacher_logits)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses
