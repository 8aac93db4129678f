"""fusedkl: KL divergences between rows of logits, values and gradients, in one pass over memory."""

from . import inductor
from .backends import backends, explain
from .distillation import distillation_loss
from .distribution import entropy, log_softmax, logsumexp, selective_log_softmax
from .functional import divergence
from .gaussian import gaussian_kl
from .kl_div import KLDivLoss, kl_div
from .linear import linear_divergence
from .linear_modules import LinearDivergenceLoss
from .linear_token_stats import linear_token_stats
from .modules import (
    ForwardKLLoss,
    HellingerLoss,
    JeffreysLoss,
    JSDLoss,
    RenyiLoss,
    ReverseKLLoss,
    SkewKLLoss,
    TVDLoss,
)
from .named import forward_kl, hellinger, jeffreys, jsd, renyi, reverse_kl, skew_kl, tvd
from .patch import patch, unpatch
from .penalties import (
    AdaptiveKLController,
    FixedKLController,
    kl_estimate,
    kl_penalized_rewards,
    nats_to_bits,
)
from .second_order import fisher_vector_product
from .stats import TokenStats, token_stats
from .topk import TopkDivergence, topk_divergence

__version__ = "0.1.0"

__all__ = [
    "AdaptiveKLController",
    "FixedKLController",
    "ForwardKLLoss",
    "HellingerLoss",
    "JSDLoss",
    "JeffreysLoss",
    "KLDivLoss",
    "LinearDivergenceLoss",
    "RenyiLoss",
    "ReverseKLLoss",
    "SkewKLLoss",
    "TVDLoss",
    "TokenStats",
    "TopkDivergence",
    "backends",
    "distillation_loss",
    "divergence",
    "entropy",
    "explain",
    "fisher_vector_product",
    "forward_kl",
    "gaussian_kl",
    "hellinger",
    "inductor",
    "jeffreys",
    "jsd",
    "kl_div",
    "kl_estimate",
    "kl_penalized_rewards",
    "linear_divergence",
    "linear_token_stats",
    "log_softmax",
    "logsumexp",
    "nats_to_bits",
    "patch",
    "renyi",
    "reverse_kl",
    "selective_log_softmax",
    "skew_kl",
    "token_stats",
    "topk_divergence",
    "tvd",
    "unpatch",
]
