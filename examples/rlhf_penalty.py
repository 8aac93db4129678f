"""RLHF's reward: a score for the sequence, a KL penalty per token, a coefficient that adapts.

The reward is the share of tokens with a vowel. Without the penalty the policy would forget its
language for it; the controller holds the KL per sequence near --target instead.
"""

from __future__ import annotations

import torch
from common import arguments, curve, frozen, load, logprobs, optimizer, panels, sample, save

import fusedkl

PROMPT, ANSWER, ROWS = 8, 12, 16


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    options = arguments(__doc__, argv, steps=60)
    language = load(options.model, options.seed)
    policy, reference, wanted = language.model, frozen(language.model), language.wanted()
    optimise = optimizer(policy, 3e-3 if options.model == "tiny" else 3e-5)
    control = fusedkl.AdaptiveKLController(0.2, target=1.0, horizon=2 * ROWS)
    mask = torch.ones(ROWS, ANSWER, dtype=torch.bool)
    log: dict[str, list[float]] = {"reward": [], "kl": [], "coef": []}
    for batch in language.batches(options.steps, ROWS, PROMPT, options.seed):
        ids = sample(policy, batch.inputs, ANSWER)
        reward = 10 * wanted[ids[:, -ANSWER:]].float().mean(-1)
        with torch.no_grad():
            ref_logprob = logprobs(reference(ids), ids, ANSWER)
        logits = policy(ids)
        logprob = logprobs(logits, ids, ANSWER)

        # k1 in the reward: right in the mean, and the policy gradient makes it right in gradient.
        kl = fusedkl.kl_estimate(logprob.detach(), ref_logprob, "k1")
        rewards = fusedkl.kl_penalized_rewards(reward, kl, mask, control.coef)
        to_go = rewards.flip(-1).cumsum(-1).flip(-1)
        advantage = to_go - to_go.mean(0)

        loss = -(advantage * logprob).mean()
        optimise.zero_grad()
        loss.backward()
        optimise.step()

        log["reward"].append(float(reward.mean()))
        log["kl"].append(float(kl.sum(-1).mean()))
        log["coef"].append(control.update(log["kl"][-1], ROWS))
    print(f"reward {log['reward'][-1]:.2f}, KL per sequence {log['kl'][-1]:.3f} nats")

    figure, (left, middle, right) = panels(3)
    curve(left, "Reward", {"reward": log["reward"]})
    curve(middle, "KL per sequence, nats", {"k1": log["kl"], "target": [1.0] * options.steps})
    curve(right, "Coefficient", {"coef": log["coef"]})
    save(figure, options.out, "rlhf_penalty")
    return log


if __name__ == "__main__":
    main()
