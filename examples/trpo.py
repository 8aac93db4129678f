"""A trust-region step (TRPO): conjugate gradients on Fisher-vector products, then a line search.

The step solves F s = g for the gradient g of the surrogate, where F v = J^T F_logits J v: J v by
forward mode, F_logits in closed form, J^T by backward. It is scaled so that the KL it causes is
--delta by the quadratic model, and checked against the exact KL.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import BLUE, answers, arguments, load, panels, sample, save
from torch import Tensor
from torch.func import functional_call, jvp, vjp

import fusedkl

PROMPT, ANSWER, ROWS, DELTA, DAMPING = 8, 8, 16, 0.01, 1e-4


def conjugate_gradients(product: Callable[[Tensor], Tensor], b: Tensor, steps: int) -> Tensor:
    """x with product(x) = b, for a positive definite product (Hestenes and Stiefel, 1952)."""
    x, residual = torch.zeros_like(b), b.clone()
    direction, size = residual.clone(), residual @ residual
    for _ in range(steps):
        image = product(direction)
        length = size / (direction @ image)
        x, residual = x + length * direction, residual - length * image
        new = residual @ residual
        direction, size = residual + (new / size) * direction, new
    return x


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    options = arguments(__doc__, argv, steps=10)
    language = load(options.model, options.seed)
    policy, wanted = language.model, language.wanted()
    weights = {n: w.detach() for n, w in policy.named_parameters() if w.requires_grad}
    sizes = [w.numel() for w in weights.values()]
    (batch,) = language.batches(1, ROWS, PROMPT, options.seed)
    ids = sample(policy, batch.inputs, ANSWER)
    reward = wanted[ids[:, -ANSWER:]].float().mean(-1)
    advantage = ((reward - reward.mean()) / (reward.std() + 1e-4)).unsqueeze(-1)

    def unflat(flat: Tensor) -> dict[str, Tensor]:
        parts = flat.split(sizes)
        return {n: p.view(w.shape) for (n, w), p in zip(weights.items(), parts, strict=True)}

    def logits_at(change: dict[str, Tensor]) -> Tensor:
        moved = {n: weights[n] + change[n] for n in weights}
        return answers(functional_call(policy, moved, (ids,)), ANSWER)

    def flat(change: dict[str, Tensor]) -> Tensor:
        return torch.cat([change[n].reshape(-1) for n in weights])

    zero = unflat(torch.zeros(sum(sizes)))
    old, pull = vjp(logits_at, zero)
    old = old.detach()
    old_logprob = fusedkl.selective_log_softmax(old, ids[:, -ANSWER:])

    def surrogate(logits: Tensor) -> Tensor:
        ratio = (fusedkl.selective_log_softmax(logits, ids[:, -ANSWER:]) - old_logprob).exp()
        return (advantage * ratio).mean()

    def fisher(vector: Tensor) -> Tensor:
        _, moved = jvp(logits_at, (zero,), (unflat(vector),))
        product = fusedkl.fisher_vector_product(old, moved) / (ROWS * ANSWER)
        return flat(pull(product)[0]) + DAMPING * vector

    leaf = old.clone().requires_grad_()
    (slope,) = torch.autograd.grad(surrogate(leaf), leaf)
    gradient = flat(pull(slope)[0])
    step = conjugate_gradients(fisher, gradient, options.steps)
    curvature = step @ fisher(step)
    step = step * (2 * DELTA / curvature).sqrt()

    log: dict[str, list[float]] = {"scale": [], "kl": [], "model": [], "gain": []}
    for halving in range(8):  # the largest step that keeps the promise
        scale = 0.5**halving
        with torch.no_grad():
            logits = logits_at(unflat(scale * step))
            kl = fusedkl.forward_kl(logits, old, reduction="mean")  # KL(old || new)
            gain = surrogate(logits)
        log["scale"].append(scale)
        log["kl"].append(float(kl))
        log["model"].append(DELTA * scale**2)
        log["gain"].append(float(gain))
    kept = next((i for i in range(8) if log["kl"][i] <= 1.5 * DELTA and log["gain"][i] > 0), 0)
    print(f"step x {log['scale'][kept]}: KL {log['kl'][kept]:.4f}, gain {log['gain'][kept]:.3f}")

    figure, (left, right) = panels(2, 5)
    left.loglog(log["scale"], log["kl"], "o-", color=BLUE, label="exact KL(old || new)")
    left.loglog(log["scale"], log["model"], "--", color="black", label="quadratic model")
    left.legend(frameon=False, fontsize=8)
    right.semilogx(log["scale"], log["gain"], "o-", color=BLUE)
    for ax, title in ((left, "KL of the step, nats"), (right, "Gain of the surrogate")):
        ax.set_title(title, fontsize=10, loc="left")
        ax.set_xlabel("share of the full step")
    save(figure, options.out, "trpo")
    return log


if __name__ == "__main__":
    main()
