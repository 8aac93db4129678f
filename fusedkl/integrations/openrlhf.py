"""OpenRLHF's log-probabilities, entropies and KL estimates, by fusedkl.

    import fusedkl.integrations.openrlhf

    fusedkl.integrations.openrlhf.patch()  # in every worker

Nothing of openrlhf is imported before `patch()` is called.
"""

from __future__ import annotations

from torch import Tensor

from .. import validation
from ..distribution import entropy, selective_log_softmax
from .estimates import bounded_estimate
from .replacing import Adapter, Part

__all__ = ["VERSIONS", "patch", "unpatch"]


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """log p[labels] at a temperature, float32. The logits are not divided in place."""
    return selective_log_softmax(logits, labels, temperature=temperature)


def compute_entropy(logits: Tensor) -> Tensor:
    """-sum p log p, float32."""
    return entropy(logits)


def compute_approx_kl(
    log_probs: Tensor, log_probs_base: Tensor, kl_estimator: str = "k1"
) -> Tensor:
    """k1, k2 or k3 of KL(policy || base) from sampled tokens, limited to +-10; float32.

    No gradient where it is limited, and finite where exp overflows.
    """
    validation.one_of("kl_estimator", kl_estimator, ("k1", "k2", "k3"))
    return bounded_estimate(log_probs, log_probs_base, kl_estimator, 10)


_UTILS = "openrlhf.models.utils"
_PARTS = (
    Part(_UTILS, "log_probs_from_logits", "logits, labels, temperature=1.0", log_probs_from_logits),
    Part(_UTILS, "compute_entropy", "logits", compute_entropy),
    Part(
        _UTILS,
        "compute_approx_kl",
        "log_probs, log_probs_base, kl_estimator='k1'",
        compute_approx_kl,
    ),
)

VERSIONS: dict[str, tuple[Part, ...]] = dict.fromkeys(("0.9", "0.10", "0.11"), _PARTS)

_ADAPTER = Adapter("openrlhf", VERSIONS)
patch, unpatch = _ADAPTER.patch, _ADAPTER.unpatch
