"""fusedkl: KL divergences between rows of logits, values and gradients, in one pass over memory."""

from . import inductor
from .backends import backends, explain
from .distillation import distillation_loss
from .distribution import entropy, log_softmax, logsumexp, selective_log_softmax
from .functional import divergence, forward_kl, jeffreys, reverse_kl
from .gaussian import gaussian_kl
from .kl_div import KLDivLoss, kl_div
from .linear import linear_divergence
from .linear_modules import LinearDivergenceLoss
from .modules import ForwardKLLoss, JeffreysLoss, ReverseKLLoss
from .patch import patch, unpatch
from .penalties import (
    AdaptiveKLController,
    FixedKLController,
    kl_estimate,
    kl_penalized_rewards,
    nats_to_bits,
)
from .second_order import fisher_vector_product
from .topk import TopkDivergence, topk_divergence

__version__ = "0.1.0"

__all__ = [
    "AdaptiveKLController",
    "FixedKLController",
    "ForwardKLLoss",
    "JeffreysLoss",
    "KLDivLoss",
    "LinearDivergenceLoss",
    "ReverseKLLoss",
    "TopkDivergence",
    "backends",
    "distillation_loss",
    "divergence",
    "entropy",
    "explain",
    "fisher_vector_product",
    "forward_kl",
    "gaussian_kl",
    "inductor",
    "jeffreys",
    "kl_div",
    "kl_estimate",
    "kl_penalized_rewards",
    "linear_divergence",
    "log_softmax",
    "logsumexp",
    "nats_to_bits",
    "patch",
    "reverse_kl",
    "selective_log_softmax",
    "topk_divergence",
    "unpatch",
]
