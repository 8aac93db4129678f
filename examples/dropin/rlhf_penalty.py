"""The exact per-token KL penalty of RLHF, policy to reference, under a mask."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from toy import train


def loss(policy: Tensor, reference: Tensor) -> Tensor:
    log_p = torch.log_softmax(policy, dim=-1)
    with torch.no_grad():
        log_q = reference.log_softmax(-1)
    kl = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    mask = torch.arange(kl.numel()) % 4 != 0
    return (kl * mask).sum() / mask.sum()


def main(**options: Any) -> list[float]:
    return train(loss, **options)


if __name__ == "__main__":
    print(main())
