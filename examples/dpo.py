"""DPO, with the exact KL to the reference as a metric beside its loss.

Preferred are continuations from the text, rejected are the same continuations with their tokens
shuffled. DPO's implicit KL is only what its pairs show; the exact KL of the rows is what drifts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import answers, arguments, curve, frozen, load, logprobs, optimizer, panels, save

import fusedkl

PROMPT, ANSWER, ROWS, BETA = 16, 16, 6, 0.1


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    options = arguments(__doc__, argv, steps=20)
    language = load(options.model, options.seed)
    policy, reference = language.model, frozen(language.model)
    optimise = optimizer(policy, 3e-3 if options.model == "tiny" else 1e-5)
    log: dict[str, list[float]] = {"loss": [], "margin": [], "chosen": [], "rejected": []}
    for batch in language.batches(options.steps, ROWS, PROMPT + ANSWER, options.seed):
        prompt, chosen = batch.inputs[:, :PROMPT], batch.inputs[:, PROMPT:]
        rejected = chosen[:, torch.randperm(ANSWER)]
        ids = torch.cat([torch.cat([prompt, answer], 1) for answer in (chosen, rejected)])
        logits = policy(ids)
        with torch.no_grad():
            ref_logits = reference(ids)
        ratio = (logprobs(logits, ids, ANSWER) - logprobs(ref_logits, ids, ANSWER)).sum(-1)
        margin = BETA * (ratio[:ROWS] - ratio[ROWS:])
        loss = -F.logsigmoid(margin).mean()
        optimise.zero_grad()
        loss.backward()
        optimise.step()
        with torch.no_grad():  # no copy: slices of the logits are read as they are
            kl = fusedkl.reverse_kl(answers(logits, ANSWER), answers(ref_logits, ANSWER))
        log["loss"].append(float(loss.detach()))
        log["margin"].append(float(margin.detach().mean()))
        log["chosen"].append(float(kl[:ROWS].mean()))
        log["rejected"].append(float(kl[ROWS:].mean()))
    print(f"margin {log['margin'][-1]:.3f}, KL {log['chosen'][-1]:.2e} nats per chosen token")

    figure, (left, right) = panels(2, 5)
    curve(left, "DPO", {k: log[k] for k in ("loss", "margin")})
    curve(
        right,
        "Exact KL(policy || reference), nats per token",
        {"on chosen": log["chosen"], "on rejected": log["rejected"]},
    )
    save(figure, options.out, "dpo")
    return log


if __name__ == "__main__":
    main()
