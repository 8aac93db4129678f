"""A loss under torch.compile, in float32 whatever the logits are."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from toy import train


def loss(student: Tensor, teacher: Tensor) -> Tensor:
    log_p = F.log_softmax(student.float(), dim=-1)
    log_q = F.log_softmax(teacher.float(), dim=-1)
    return F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")


def main(**options: Any) -> list[float]:
    return train(torch.compile(loss, fullgraph=True), **options)


if __name__ == "__main__":
    print(main())
