"""A variational autoencoder on scikit-learn's digits: its ELBO has a Gaussian KL.

ELBO = E log p(x | z) - KL(N(mu, exp(logvar)) || N(0, 1)); the KL in closed form, summed over the
latent dims (reduction="batchmean"). Pixels are Bernoulli.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import arguments, curve, panels, save
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fusedkl

LATENT, HIDDEN, BATCH = 6, 96, 128


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2 * LATENT)
        )
        self.decoder = nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu, logvar = self.encoder(x).chunk(2, -1)
        z = mu + (logvar / 2).exp() * torch.randn_like(mu)
        return self.decoder(z), mu, logvar


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    options = arguments(__doc__, argv, steps=1500, model=False)
    torch.manual_seed(options.seed)
    digits = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    model = VAE()
    optimise = torch.optim.Adam(model.parameters(), lr=3e-3)
    log: dict[str, list[float]] = {"elbo": [], "kl": []}
    for _ in range(options.steps):
        x = digits[torch.randint(len(digits), (BATCH,))]
        pixels, mu, logvar = model(x)
        kl = fusedkl.gaussian_kl(mu, logvar, reduction="batchmean")
        likelihood = -F.binary_cross_entropy_with_logits(pixels, x, reduction="sum") / BATCH
        elbo = likelihood - kl
        optimise.zero_grad()
        (-elbo).backward()
        optimise.step()
        log["elbo"].append(float(elbo.detach()))
        log["kl"].append(float(kl.detach()))
    print(
        f"ELBO {log['elbo'][0]:.1f} -> {log['elbo'][-1]:.1f} nats, of which KL {log['kl'][-1]:.1f}"
    )

    with torch.no_grad():
        drawn = model.decoder(torch.randn(16, LATENT)).sigmoid()
        again = model(digits[:16])[0].sigmoid()
    figure, (left, middle, right) = panels(3, 4)
    curve(left, "ELBO, nats", {"ELBO": log["elbo"]})
    left.set_ylim(top=0)
    curve(middle, "KL to the prior, nats", {"KL": log["kl"]})
    gap = torch.zeros(32, 4)
    shown, found, invented = (
        t.view(4, 4, 8, 8).transpose(1, 2).reshape(32, 32) for t in (digits[:16], again, drawn)
    )
    picture = torch.cat([shown, gap, found, gap, invented], 1)
    right.imshow(picture.numpy(), cmap="gray_r")
    right.set_title("digits | reconstructed | drawn", fontsize=10)
    right.axis("off")
    save(figure, options.out, "vae")
    return log


if __name__ == "__main__":
    main()
