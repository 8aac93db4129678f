"""Modules only: nn.KLDivLoss of nn.LogSoftmax."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from toy import train


class Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log_softmax = nn.LogSoftmax(dim=-1)
        self.kl = nn.KLDivLoss(reduction="batchmean", log_target=True)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        value: Tensor = self.kl(self.log_softmax(student), self.log_softmax(teacher))
        return value


def main(**options: Any) -> list[float]:
    return train(Loss(), **options)


if __name__ == "__main__":
    print(main())
