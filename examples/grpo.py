"""GRPO with the KL in the loss: the k3 estimate and the exact KL of each row, side by side.

Advantages are rewards relative to the other answers to the same prompt. Both runs start from the
same model and seed; only the penalty differs. k3 sees the token drawn, the exact KL the whole row.
"""

from __future__ import annotations

import torch
from common import (
    answers,
    arguments,
    curve,
    frozen,
    load,
    logprobs,
    optimizer,
    panels,
    sample,
    save,
)

import fusedkl

PROMPT, ANSWER, PROMPTS, GROUP, BETA = 8, 10, 3, 6, 0.1


def train(penalty: str, options: object) -> dict[str, list[float]]:
    language = load(options.model, options.seed)
    policy, reference, wanted = language.model, frozen(language.model), language.wanted()
    optimise = optimizer(policy, 1e-2 if options.model == "tiny" else 3e-5)
    log: dict[str, list[float]] = {"reward": [], "k3": [], "exact": []}
    for batch in language.batches(options.steps, PROMPTS, PROMPT, options.seed):
        ids = sample(policy, batch.inputs.repeat_interleave(GROUP, 0), ANSWER)
        reward = wanted[ids[:, -ANSWER:]].float().mean(-1).view(PROMPTS, GROUP)
        spread = reward.std(-1, keepdim=True) + 1e-4
        advantage = ((reward - reward.mean(-1, keepdim=True)) / spread).view(-1, 1)

        logits = policy(ids)
        with torch.no_grad():
            ref_logits = reference(ids)
        logprob = logprobs(logits, ids, ANSWER)
        k3 = fusedkl.kl_estimate(logprob, logprobs(ref_logits, ids, ANSWER), "k3")
        exact = fusedkl.reverse_kl(answers(logits, ANSWER), answers(ref_logits, ANSWER))

        ratio = (logprob - logprob.detach()).exp()  # one update per batch: 1, with a gradient
        kl = {"k3": k3, "exact": exact}[penalty]
        loss = (-advantage * ratio + BETA * kl).mean()
        optimise.zero_grad()
        loss.backward()
        optimise.step()
        for name, value in (("reward", reward), ("k3", k3), ("exact", exact)):
            log[name].append(float(value.detach().mean()))
    return log


def main(argv: list[str] | None = None) -> dict[str, dict[str, list[float]]]:
    options = arguments(__doc__, argv, steps=30)
    logs = {penalty: train(penalty, options) for penalty in ("k3", "exact")}
    for penalty, log in logs.items():
        print(f"penalty {penalty}: reward {log['reward'][-1]:.3f}, KL {log['exact'][-1]:.2e} nats")

    figure, (left, middle, right) = panels(3)
    curve(left, "Share of tokens with a vowel", {k: log["reward"] for k, log in logs.items()})
    curve(middle, "Exact KL per token, nats", {k: log["exact"] for k, log in logs.items()})
    curve(right, "The k3 run, seen both ways", {k: logs["k3"][k] for k in ("k3", "exact")})
    save(figure, options.out, "grpo")
    return logs


if __name__ == "__main__":
    main()
