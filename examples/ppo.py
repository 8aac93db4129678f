"""PPO: several updates on one batch, stopped early when the policy has moved far enough.

The measure is the exact KL(old || new), averaged over the rows; the usual estimate from the sampled
tokens, k3 on the old policy's side, is drawn beside it.
"""

from __future__ import annotations

import torch
from common import (
    answers,
    arguments,
    curve,
    load,
    logprobs,
    optimizer,
    panels,
    sample,
    save,
)

import fusedkl

PROMPT, ANSWER, ROWS, EPOCHS, CLIP, LIMIT = 8, 10, 16, 8, 0.2, 0.01


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    options = arguments(__doc__, argv, steps=8)
    language = load(options.model, options.seed)
    policy, wanted = language.model, language.wanted()
    optimise = optimizer(policy, 1e-2 if options.model == "tiny" else 3e-5)
    log: dict[str, list[float]] = {"exact": [], "k3": [], "epochs": [], "reward": []}
    for batch in language.batches(options.steps, ROWS, PROMPT, options.seed):
        ids = sample(policy, batch.inputs, ANSWER)
        reward = wanted[ids[:, -ANSWER:]].float().mean(-1)
        advantage = ((reward - reward.mean()) / (reward.std() + 1e-4)).unsqueeze(-1)
        with torch.no_grad():
            old = answers(policy(ids), ANSWER)
            old_logprob = fusedkl.selective_log_softmax(old, ids[:, -ANSWER:])
        for epoch in range(1, EPOCHS + 1):
            logits = policy(ids)
            logprob = logprobs(logits, ids, ANSWER)
            with torch.no_grad():
                # drawn from the old policy: its log-probability comes first
                k3 = fusedkl.kl_estimate(old_logprob, logprob, "k3").mean()
                exact = fusedkl.forward_kl(answers(logits, ANSWER), old, reduction="mean")
            log["exact"].append(float(exact))
            log["k3"].append(float(k3))
            if exact > LIMIT:
                break
            ratio = (logprob - old_logprob).exp()
            gain = torch.min(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
            optimise.zero_grad()
            (-gain.mean()).backward()
            optimise.step()
        log["epochs"].append(float(epoch))
        log["reward"].append(float(reward.mean()))
    print(f"reward {log['reward'][-1]:.3f}; passes over each batch: {log['epochs']}")

    figure, (left, right) = panels(2, 5.5)
    limit = [LIMIT] * len(log["exact"])
    curve(
        left,
        "KL(old || new) per token, nats; 0 at each new batch",
        {"exact": log["exact"], "k3": log["k3"], "limit": limit},
        "pass over a batch",
    )
    curve(right, "Share of tokens with a vowel", {"reward": log["reward"]}, "batch")
    save(figure, options.out, "ppo")
    return log


if __name__ == "__main__":
    main()
