"""Sampled-token KL estimates as RL trainers bound them."""

from __future__ import annotations

from torch import Tensor

from ..penalties import kl_estimate


def bounded_estimate(
    logprob: Tensor, ref_logprob: Tensor, kind: str, bound: float | None
) -> Tensor:
    """`fusedkl.kl_estimate`, limited to +-bound, with no gradient where it is: as torch.clamp."""
    if bound is None:
        return kl_estimate(logprob, ref_logprob, kind)
    if kind == "k3":
        # Beyond e^20 it is past any bound already; e^100 would be inf, and its gradient NaN.
        difference = logprob.float() - ref_logprob.float()
        logprob, ref_logprob = difference.clamp(-20, 20), difference.new_zeros(difference.shape)
    return kl_estimate(logprob, ref_logprob, kind).clamp(-bound, bound)
