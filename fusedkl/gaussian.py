"""KL between diagonal Gaussians: variational autoencoders, Bayesian layers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import reductions, reference, validation
from .backends import resolve


def gaussian_kl(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: float | Tensor = 0,
    prior_logvar: float | Tensor = 0,
    *,
    reduction: str = "none",
) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(prior_mu, exp(prior_logvar))) of every element, in nats.

    With d = logvar - prior_logvar::

        ((exp(d) - 1 - d) + (mu - prior_mu)^2 exp(-prior_logvar)) / 2

    Never negative, exactly 0 where both Gaussians are the same, accurate where they nearly are, and
    +inf only where the value leaves the floating-point range, at any logvar. Equivalent to::

        normal = torch.distributions.Normal
        posterior = normal(mu, (logvar / 2).exp())
        prior = normal(prior_mu, (prior_logvar / 2).exp())
        torch.distributions.kl_divergence(posterior, prior)

    Args:
        mu, logvar: mean and log of the variance, floating-point, shapes that broadcast.
        prior_mu, prior_logvar: the same for the second Gaussian; numbers, or tensors that broadcast
            with the others. All four are differentiable, twice too.
        reduction: "none" (the shape broadcast), "sum", "mean" (per element), "batchmean" = sum /
            size(0): the KL term of an ELBO whose latent dims are summed.

    Returns:
        float32, or float64 if any input is; autocast changes nothing. NaN stays in its element.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is accepted.

    Kingma and Welling, "Auto-Encoding Variational Bayes", 2014, appendix B, for the standard prior.
    """
    validation.floating("mu", mu)
    validation.floating("logvar", logvar)
    validation.reduction(reduction)
    priors = {"prior_mu": prior_mu, "prior_logvar": prior_logvar}
    tensors = [t for t in priors.values() if isinstance(t, Tensor)]
    for name, prior in priors.items():
        if isinstance(prior, Tensor):
            validation.floating(name, prior)
    double = any(t.dtype == torch.float64 for t in (mu, logvar, *tensors))
    dtype = torch.float64 if double else torch.float32
    given = [mu, logvar]
    for name, prior in priors.items():
        if not isinstance(prior, Tensor):
            # filled where it lies: a copy from the host would wait for the device
            prior = torch.full((), validation.real(name, prior), dtype=dtype, device=mu.device)
        given.append(prior)
    for name, t in zip(("logvar", "prior_mu", "prior_logvar"), given[1:], strict=True):
        if t.device != mu.device:
            raise ValueError(f"{name} must be on {mu.device} as mu; got {t.device}")
    try:
        shape = torch.broadcast_shapes(*(t.shape for t in given))
    except RuntimeError:
        shapes = ", ".join(str(list(t.shape)) for t in given)
        raise ValueError(
            f"mu, logvar, prior_mu and prior_logvar must have shapes that broadcast; got {shapes}"
        ) from None
    if reduction == "batchmean" and not shape:
        raise ValueError('reduction="batchmean" needs a batch dim; got 0-d tensors')
    m, v, prior_m, prior_v = (t.to(dtype) for t in given)
    # In quarters: the whole exponential may overflow where its product with a tiny distance does
    # not. From the clamp's end on, the product overflows with any distance but 0.
    limit = math.floor(math.log(torch.finfo(dtype).max))
    quarter = torch.exp((prior_v / -4).clamp(max=limit))
    distance = ((m - prior_m) * quarter) * quarter
    values = ((reference.gap(v - prior_v) + distance * distance) / 2).expand(shape)
    if reduction == "none":
        return values
    name = resolve(None, mu.device)
    flat = values.reshape(-1).contiguous()
    return reductions.reduce(flat, None, None, reduction, shape, backend=name)
