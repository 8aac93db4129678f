"""Two models over a text, in nats and bits per token, forward and reverse; and what the two mean.

The second picture fits one bell to a distribution with two modes: minimising KL(target || fit)
covers both modes, minimising KL(fit || target) seeks one.
"""

from __future__ import annotations

import torch
from common import BLUE, GREY, ORANGE, arguments, load, panels, save
from torch import Tensor

import fusedkl

ROWS, LENGTH, GRID = 4, 48, 201


def bell(grid: Tensor, centre: Tensor, log_width: Tensor) -> Tensor:
    """Logits of a normal distribution over the points of a grid."""
    return -0.5 * ((grid - centre) / log_width.exp()) ** 2


def fit(kind: str, grid: Tensor, target: Tensor, steps: int = 400) -> Tensor:
    """Probabilities of the bell that minimises the divergence from the target."""
    shape = torch.tensor([1.0, 0.0], dtype=grid.dtype, requires_grad=True)
    optimise = torch.optim.Adam([shape], lr=0.03)
    for _ in range(steps):
        optimise.zero_grad()
        fusedkl.divergence(bell(grid, shape[0], shape[1]), target, kind).backward()
        optimise.step()
    return bell(grid, shape[0], shape[1]).detach().softmax(-1)


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    options = arguments(__doc__, argv, steps=2)
    language = load(options.model, options.seed)
    other = language.smaller().requires_grad_(False)
    log: dict[str, list[float]] = {"forward": [], "reverse": [], "cost": []}
    for batch in language.batches(options.steps, ROWS, LENGTH, options.seed):
        with torch.no_grad():
            p, q = other(batch.inputs), language.model(batch.inputs)
            log["forward"] += fusedkl.forward_kl(p, q).flatten().tolist()
            log["reverse"] += fusedkl.reverse_kl(p, q).flatten().tolist()
            better = fusedkl.selective_log_softmax(q, batch.labels)
            cost = better - fusedkl.selective_log_softmax(p, batch.labels)
            log["cost"] += cost.flatten().tolist()
    for name in ("forward", "reverse"):
        nats = sum(log[name]) / len(log[name])
        print(f"{name} KL: {nats:.4f} nats = {fusedkl.nats_to_bits(nats):.4f} bits per token")

    figure, (left, right) = panels(2, 5.5)
    both = torch.tensor([log["forward"], log["reverse"]])
    bins = torch.linspace(0, float(both.quantile(0.99)), 40).tolist()
    for values, colour, label in (
        (both[0], BLUE, "forward, KL(first || second)"),
        (both[1], ORANGE, "reverse, KL(second || first)"),
    ):
        left.hist(values.tolist(), bins, histtype="step", color=colour, label=label, linewidth=1.8)
    left.set_title("Tokens by divergence of two models", fontsize=10, loc="left")
    left.set_xlabel("nats")
    left.legend(frameon=False, fontsize=8)

    grid = torch.linspace(-4, 4, GRID, dtype=torch.float64)
    modes = [bell(grid, torch.tensor(c), torch.tensor(-0.9)) for c in (-2.0, 2.0)]
    target = torch.logaddexp(modes[0], modes[1] + 0.4)
    points = grid.tolist()
    right.fill_between(points, target.softmax(-1).tolist(), color=GREY, alpha=0.35, label="target")
    for kind, colour, label in (
        ("forward_kl", BLUE, "KL(target || fit): covers"),
        ("reverse_kl", ORANGE, "KL(fit || target): seeks"),
    ):
        fitted = fit(kind, grid, target)
        log[kind] = fitted.tolist()
        right.plot(points, log[kind], color=colour, label=label, linewidth=1.8)
    right.set_title("One bell, two directions", fontsize=10, loc="left")
    right.legend(frameon=False, fontsize=8)
    right.set_yticks([])
    save(figure, options.out, "compare_models")
    return log


if __name__ == "__main__":
    main()
