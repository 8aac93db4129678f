"""fusedkl: KL divergences between rows of logits, values and gradients, in one pass over memory."""

from .backends import backends, explain
from .distribution import entropy, log_softmax, logsumexp, selective_log_softmax
from .functional import divergence
from .kl_div import KLDivLoss, kl_div
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
from .stats import TokenStats, token_stats

__version__ = "0.1.0"

__all__ = [
    "ForwardKLLoss",
    "HellingerLoss",
    "JSDLoss",
    "JeffreysLoss",
    "KLDivLoss",
    "RenyiLoss",
    "ReverseKLLoss",
    "SkewKLLoss",
    "TVDLoss",
    "TokenStats",
    "backends",
    "divergence",
    "entropy",
    "explain",
    "forward_kl",
    "hellinger",
    "jeffreys",
    "jsd",
    "kl_div",
    "log_softmax",
    "logsumexp",
    "patch",
    "renyi",
    "reverse_kl",
    "selective_log_softmax",
    "skew_kl",
    "token_stats",
    "tvd",
    "unpatch",
]
