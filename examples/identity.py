"""Cross-entropy = entropy + KL, token by token.

With q the teacher's row and p the student's, -sum q log p = H(q) + KL(q || p). The first part does
not depend on the student: training on soft targets minimises the second.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import BLUE, ORANGE, arguments, load, panels, save

import fusedkl

ROWS, LENGTH = 1, 40


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    options = arguments(__doc__, argv, steps=1)
    language = load(options.model, options.seed)
    student = language.smaller()
    (batch,) = language.batches(1, ROWS, LENGTH, options.seed)
    with torch.no_grad():
        q_logits, p_logits = language.model(batch.inputs)[0], student(batch.inputs)[0]
    entropy = fusedkl.entropy(q_logits)
    kl = fusedkl.forward_kl(p_logits, q_logits)
    cross = F.cross_entropy(p_logits.double(), q_logits.double().softmax(-1), reduction="none")
    gap = float((cross - (entropy + kl)).abs().max())
    print(f"cross-entropy {cross.mean():.4f} = entropy {entropy.mean():.4f} + KL {kl.mean():.4f}")
    print(f"largest difference of any token: {gap:.1e} nats")

    figure, (ax,) = panels(1, 8)
    at = range(len(kl))
    below, above = entropy.tolist(), kl.tolist()
    ax.bar(at, below, color=BLUE, label="entropy of the teacher")
    ax.bar(at, above, bottom=below, color=ORANGE, label="KL(teacher || student)")
    ax.plot(at, cross.tolist(), "_", color="black", markersize=9, label="cross-entropy, on its own")
    ax.set_title("Nats per token", fontsize=10, loc="left")
    ax.set_xlabel("token")
    ax.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    save(figure, options.out, "identity")
    return {"entropy": below, "kl": above, "cross": cross.tolist(), "gap": [gap]}


if __name__ == "__main__":
    main()
