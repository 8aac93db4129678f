"""Knowledge distillation: the teacher's soft targets at a temperature, mixed with hard labels.

The student is half the teacher. loss = (1 - ce_weight) T^2 KL(teacher || student at T) + ce_weight
CE(labels, student), both terms from the same rows.
"""

from __future__ import annotations

import torch
from common import arguments, curve, load, optimizer, panels, save

import fusedkl

TEMPERATURE, CE_WEIGHT, ROWS, LENGTH = 2.0, 0.3, 4, 64


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    options = arguments(__doc__, argv, steps=20)
    language = load(options.model, options.seed)
    teacher, student = language.model.requires_grad_(False), language.smaller()
    optimise = optimizer(student, 1e-2 if options.model == "tiny" else 1e-4)
    log: dict[str, list[float]] = {"loss": [], "kl": [], "ce": []}
    for batch in language.batches(options.steps, ROWS, LENGTH, options.seed):
        with torch.no_grad():
            teacher_logits = teacher(batch.inputs)
        logits = student(batch.inputs)
        loss = fusedkl.distillation_loss(
            logits,
            teacher_logits,
            batch.labels,
            temperature=TEMPERATURE,
            ce_weight=CE_WEIGHT,
        )
        optimise.zero_grad()
        loss.backward()
        optimise.step()
        with torch.no_grad():
            kl = fusedkl.forward_kl(logits, teacher_logits, reduction="mean")
            ce = -fusedkl.selective_log_softmax(logits, batch.labels).mean()
        for name, value in (("loss", loss.detach()), ("kl", kl), ("ce", ce)):
            log[name].append(float(value))
    print(f"KL(teacher || student): {log['kl'][0]:.3f} -> {log['kl'][-1]:.3f} nats per token")

    figure, (left, right) = panels(2, 5)
    curve(left, "Loss, nats", {"loss": log["loss"]})
    curve(
        right,
        "At temperature 1, nats per token",
        {"KL(teacher || student)": log["kl"], "cross-entropy of the text": log["ce"]},
    )
    save(figure, options.out, "distill")
    return log


if __name__ == "__main__":
    main()
