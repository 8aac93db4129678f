"""Distillation as a LightningModule: `training_step` returns the divergence, and that is all.

The student is half the teacher. `pip install 'fusedkl[lightning]'`.
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
from common import arguments, curve, load, optimizer, panels, save
from torch import Tensor, nn

import fusedkl

TEMPERATURE, ROWS, LENGTH = 2.0, 4, 64


class Distiller(lightning.LightningModule):
    """Trains a student on a teacher's next-token distributions."""

    def __init__(self, student: nn.Module, teacher: nn.Module, rate: float) -> None:
        super().__init__()
        self.student, self.rate = student, rate
        # In a list, Lightning neither trains it nor writes it into checkpoints.
        self.kept = [teacher.eval().requires_grad_(False)]
        self.losses: list[float] = []

    def on_fit_start(self) -> None:
        self.kept[0].to(self.device)

    def training_step(self, batch: Any, index: int) -> Tensor:
        with torch.no_grad():
            teacher_logits = self.kept[0](batch.inputs)
        loss = fusedkl.forward_kl(
            self.student(batch.inputs), teacher_logits, temperature=TEMPERATURE, reduction="mean"
        )
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer(self.student, self.rate)


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    options = arguments(__doc__, argv, steps=20)
    language = load(options.model, options.seed)
    student = language.smaller()
    module = Distiller(student, language.model, 1e-2 if options.model == "tiny" else 1e-4)
    batches = language.batches(options.steps, ROWS, LENGTH, options.seed)
    trainer = lightning.Trainer(
        max_steps=options.steps,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    whole: Any = batches  # a list will do for a dataset
    trainer.fit(module, torch.utils.data.DataLoader(whole, batch_size=None))
    losses = module.losses
    print(f"KL at T = {TEMPERATURE:g}: {losses[0]:.3f} -> {losses[-1]:.3f} nats per token")
    figure, (axis,) = panels(1, 5)
    curve(axis, f"KL(teacher || student) at T = {TEMPERATURE:g}, nats per token", {"kl": losses})
    save(figure, options.out, "lightning_distill")
    return {"loss": losses}


if __name__ == "__main__":
    main()
