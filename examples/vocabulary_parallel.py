"""A training step whose lm_head is cut over four processes: each holds a quarter of the vocabulary.

A student learns from a teacher; both heads are sharded, hidden states are the same everywhere. Each
step is done once more with the heads whole, and loss and weights must agree.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

import fusedkl

RANKS, VOCABULARY, WIDTH, TOKENS = 4, 1003, 32, 64


class Whole(torch.nn.Module):
    """The student: a layer that every rank has, and the head."""

    def __init__(self, head: torch.Tensor) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(WIDTH, WIDTH)
        self.head = torch.nn.Parameter(head.clone())

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.tanh(self.layer(x))
        return hidden, hidden @ self.head.t()


class Sharded(Whole):
    """The same with this rank's rows of the head."""

    def __init__(self, whole: Whole, part: slice, group: dist.ProcessGroup) -> None:
        super().__init__(whole.head.detach()[part])
        self.layer.load_state_dict(whole.layer.state_dict())
        self.group = group

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.tanh(self.layer(x))
        # the layer's gradient is the sum of what comes back through each rank's head
        hidden.register_hook(self.summed)
        return hidden, hidden @ self.head.t()

    def summed(self, gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.clone()
        dist.all_reduce(total, group=self.group)
        return total


def train(rank: int, rendezvous: Path, steps: int) -> list[float]:
    dist.init_process_group(
        "gloo",
        init_method=rendezvous.as_uri(),
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=60),
    )
    torch.manual_seed(0)  # the same whole model on every rank
    group = dist.group.WORLD
    assert group is not None
    begin, end = (VOCABULARY * r // RANKS for r in (rank, rank + 1))
    teacher_head = torch.randn(VOCABULARY, WIDTH)
    whole = Whole(torch.randn(VOCABULARY, WIDTH))
    mine = Sharded(whole, slice(begin, end), group)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.5) for model in (mine, whole)]
    losses = []
    for _ in range(steps):
        x, labels = torch.randn(TOKENS, WIDTH), torch.randint(VOCABULARY, (TOKENS,))
        teacher = x @ teacher_head.t()

        _, logits = mine(x)
        loss = fusedkl.distillation_loss(
            logits, teacher[:, begin:end], labels, temperature=2.0, ce_weight=0.3, group=group
        )
        loss.backward()

        _, logits = whole(x)
        expected = fusedkl.distillation_loss(
            logits, teacher, labels, temperature=2.0, ce_weight=0.3
        )
        expected.backward()

        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    torch.testing.assert_close(mine.head, whole.head[begin:end], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine.layer.weight, whole.layer.weight, rtol=1e-5, atol=1e-6)
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        print(", ".join(f"{loss:.4f}" for loss in losses))
    return losses


def main(argv: list[str] | None = None) -> int:
    """Runs the ranks; how many of them failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5)
    steps = parser.parse_args(argv).steps
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=train, args=(rank, Path(folder, "rendezvous"), steps))
            for rank in range(RANKS)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    return sum(process.exitcode != 0 for process in ranks)


if __name__ == "__main__":
    raise SystemExit(main())
