"""Distillation from a file: the teacher's top-k log-probabilities are stored once, then reused.

The teacher runs once over the text and leaves int32 ids and float16 log-probabilities of K tokens a
row. The student never sees it: `topk_divergence` takes all other tokens as one outcome, the tail.
"""

from __future__ import annotations

from pathlib import Path

import torch
from common import arguments, curve, load, optimizer, panels, save
from torch import Tensor, nn

import fusedkl

K, ROWS, LENGTH, EPOCHS = 16, 4, 64, 4


def store(teacher: nn.Module, inputs: list[Tensor], path: Path) -> None:
    found = []
    with torch.no_grad():
        for ids in inputs:
            values, tokens = fusedkl.log_softmax(teacher(ids)).topk(K, -1)
            found.append({"ids": tokens.int(), "logprobs": values.half()})
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(found, path)


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    options = arguments(__doc__, argv, steps=5)
    language = load(options.model, options.seed)
    teacher, student = language.model.requires_grad_(False), language.smaller()
    inputs = [b.inputs for b in language.batches(options.steps, ROWS, LENGTH, options.seed)]
    path = options.out / "topk_teacher.pt"
    store(teacher, inputs, path)
    stored, whole = path.stat().st_size, options.steps * ROWS * LENGTH * len(language.spelling) * 4
    print(f"{path}: {stored / 2**20:.2f} MiB; all log-probabilities would be {whole / 2**20:.0f}")

    optimise = optimizer(student, 1e-2 if options.model == "tiny" else 1e-4)
    log: dict[str, list[float]] = {"top-k": [], "full": [], "student": [], "teacher": []}
    for _ in range(EPOCHS):
        for ids, kept in zip(inputs, torch.load(path), strict=True):
            logits = student(ids)
            result = fusedkl.topk_divergence(
                logits, kept["ids"].long(), kept["logprobs"], return_mass=True, reduction="mean"
            )
            optimise.zero_grad()
            result.value.backward()
            optimise.step()
            with torch.no_grad():  # to see how well it stands in for the whole
                full = fusedkl.forward_kl(logits, teacher(ids), reduction="mean")
            log["top-k"].append(float(result.value.detach()))
            log["full"].append(float(full))
            log["student"].append(float(result.policy_mass.mean()))
            log["teacher"].append(float(result.reference_mass.mean()))
    print(f"KL(teacher || student): {log['full'][0]:.3f} -> {log['full'][-1]:.3f} nats per token")

    figure, (left, right) = panels(2, 5)
    curve(left, "KL(teacher || student), nats", {k: log[k] for k in ("top-k", "full")})
    curve(right, f"Mass on the {K} tokens", {k: log[k] for k in ("student", "teacher")})
    right.set_ylim(0, 1.02)
    save(figure, options.out, "topk_distill")
    return log


if __name__ == "__main__":
    main()
