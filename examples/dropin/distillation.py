"""Distillation as Hinton et al. write it: soft targets at a temperature, times T squared."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from toy import train

T = 2.0


def loss(student: Tensor, teacher: Tensor) -> Tensor:
    return (
        F.kl_div(
            F.log_softmax(student / T, dim=-1),
            F.softmax(teacher / T, dim=-1),
            reduction="batchmean",
        )
        * T**2
    )


def main(**options: Any) -> list[float]:
    return train(loss, **options)


if __name__ == "__main__":
    print(main())
