"""On-policy distillation (GKD): the student writes, the teacher grades each of its tokens' rows.

Half of the batches are the student's own samples, half are text. The loss is the generalized JSD,
whose BETA of 0 is KL(teacher || student) and of 1 KL(student || teacher) (Agarwal et al., 2024).
"""

from __future__ import annotations

import torch
from common import answers, arguments, curve, load, optimizer, panels, sample, save

import fusedkl

PROMPT, ANSWER, ROWS, BETA = 12, 24, 6, 0.5


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    options = arguments(__doc__, argv, steps=20)
    language = load(options.model, options.seed)
    teacher, student = language.model.requires_grad_(False), language.smaller()
    optimise = optimizer(student, 1e-2 if options.model == "tiny" else 1e-4)
    log: dict[str, list[float]] = {"own samples": [], "text": []}
    for step, batch in enumerate(
        language.batches(options.steps, ROWS, PROMPT + ANSWER, options.seed)
    ):
        source = "own samples" if step % 2 == 0 else "text"
        ids = batch.inputs
        if source == "own samples":
            ids = sample(student, ids[:, :PROMPT], ANSWER)
        with torch.no_grad():
            teacher_rows = answers(teacher(ids), ANSWER)
        # the prompt counts for nothing: its rows are not even passed
        loss = fusedkl.jsd(answers(student(ids), ANSWER), teacher_rows, beta=BETA, reduction="mean")
        optimise.zero_grad()
        loss.backward()
        optimise.step()
        log[source].append(float(loss.detach()))
    print(", ".join(f"JSD on {k}: {v[0]:.4f} -> {v[-1]:.4f} nats" for k, v in log.items() if v))

    figure, (ax,) = panels(1, 6)
    curve(ax, f"Generalized JSD, beta = {BETA}, nats per token", log, "step / 2")
    save(figure, options.out, "gkd")
    return log


if __name__ == "__main__":
    main()
