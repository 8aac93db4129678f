"""KL as a measure of calibration: how far stated confidence is from how often it is right.

Predictions are binned by the probability of their likeliest token. In each bin, with confidence c
and accuracy a, KL((a, 1 - a) || (c, 1 - c)) is what believing c instead of a costs, in nats per
prediction; the sum over bins, by their share, is the calibration term of the log score.
"""

from __future__ import annotations

import torch
from common import BLUE, ORANGE, arguments, load, panels, save
from torch import Tensor

import fusedkl

ROWS, LENGTH, BINS = 8, 64, 12
TEMPERATURES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.4, 1.7, 2.0, 2.5)


def two_outcomes(p: Tensor) -> Tensor:
    """Logits [..., 2] of (p, 1 - p)."""
    return torch.stack([p.log(), torch.log1p(-p)], -1)


def calibration(logits: Tensor, labels: Tensor, temperature: float) -> tuple[float, Tensor]:
    """Nats per prediction, and [bins, 3]: confidence, accuracy, share."""
    top, guess = logits.max(-1)
    lse = fusedkl.logsumexp(logits, temperature=temperature)
    confidence = (top / temperature - lse).exp()
    right = (guess == labels).float()
    order = confidence.argsort()  # bins of equal size
    bins = [
        (confidence[part].mean(), right[part].mean(), torch.tensor(len(part) / len(order)))
        for part in order.tensor_split(BINS)
    ]
    table = torch.stack([torch.stack(b) for b in bins]).double().clamp(1e-6, 1 - 1e-6)
    cost = fusedkl.forward_kl(
        two_outcomes(table[:, 0]), two_outcomes(table[:, 1]), weight=table[:, 2], reduction="sum"
    )
    return float(cost), table


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    options = arguments(__doc__, argv, steps=2)
    language = load(options.model, options.seed)
    batches = language.batches(options.steps, ROWS, LENGTH, options.seed)
    with torch.no_grad():
        logits = torch.cat([language.model(b.inputs).flatten(0, 1) for b in batches])
    labels = torch.cat([b.labels.flatten() for b in batches])
    found = {t: calibration(logits, labels, t) for t in TEMPERATURES}
    costs = [found[t][0] for t in TEMPERATURES]
    best = min(TEMPERATURES, key=lambda t: found[t][0])
    print(f"calibration: {found[1.0][0]:.4f} nats at T = 1, {found[best][0]:.4f} at T = {best}")

    figure, (left, right) = panels(2, 4.6)
    for t, colour in ((1.0, BLUE), (best, ORANGE)):
        table = found[t][1]
        left.plot(
            table[:, 0].tolist(),
            table[:, 1].tolist(),
            "o-",
            color=colour,
            label=f"T = {t}",
            linewidth=1.5,
        )
    left.plot([0, 1], [0, 1], ":", color="black")
    left.set_title("Accuracy by confidence", fontsize=10, loc="left")
    left.set_xlabel("confidence")
    left.legend(frameon=False, fontsize=8)
    right.plot(TEMPERATURES, costs, "o-", color=BLUE)
    right.set_title("Calibration term, nats per prediction", fontsize=10, loc="left")
    right.set_xlabel("temperature")
    right.set_yscale("log")
    save(figure, options.out, "calibration")
    return {"temperature": list(TEMPERATURES), "cost": costs, "best": [best]}


if __name__ == "__main__":
    main()
