"""fusedkl: KL divergences between rows of logits, values and gradients, in one pass over memory."""

from . import inductor
from .backends import backends, explain
from .distribution import entropy, log_softmax, logsumexp, selective_log_softmax
from .functional import divergence, forward_kl, jeffreys, reverse_kl
from .kl_div import KLDivLoss, kl_div
from .modules import ForwardKLLoss, JeffreysLoss, ReverseKLLoss
from .patch import patch, unpatch

__version__ = "0.1.0"

__all__ = [
    "ForwardKLLoss",
    "JeffreysLoss",
    "KLDivLoss",
    "ReverseKLLoss",
    "backends",
    "divergence",
    "entropy",
    "explain",
    "forward_kl",
    "inductor",
    "jeffreys",
    "kl_div",
    "log_softmax",
    "logsumexp",
    "patch",
    "reverse_kl",
    "selective_log_softmax",
    "unpatch",
]
