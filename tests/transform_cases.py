"""Every public function that takes tensors, as f(x, y) of two [N, V] logits: one number a row."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

import fusedkl

N, V, H, K = 4, 23, 6, 3
Function = Callable[[Tensor, Tensor], Tensor]


def _ids(x: Tensor) -> Tensor:
    return torch.arange(x.shape[0], device=x.device) % V


def _token_stats(x: Tensor, y: Tensor) -> Tensor:
    found = fusedkl.token_stats(x, y, _ids(x))
    return (
        found.logprob + 2 * found.entropy + 3 * found.logsumexp
        + 4 * found.forward_kl + 5 * found.reverse_kl + 6 * found.k3
    )  # fmt: skip


def _head(x: Tensor) -> Tensor:
    """Hidden states that are a slice of x."""
    return x[:, :H].contiguous()


def _weight(like: Tensor, shift: float) -> Tensor:
    at = torch.arange(V * H, device=like.device, dtype=like.dtype)
    return torch.sin(at + shift).view(V, H)


def _linear(x: Tensor, y: Tensor) -> Tensor:
    return fusedkl.linear_divergence(_head(x), _weight(x, 0), _head(y), _weight(y, 1), "reverse_kl")


def _linear_token_stats(x: Tensor, y: Tensor) -> Tensor:
    found = fusedkl.linear_token_stats(
        _head(x), _weight(x, 0), token_ids=_ids(x), fields=("logprob", "entropy")
    )
    return found.logprob - 2 * found.entropy


def _topk(x: Tensor, y: Tensor) -> Tensor:
    ids = torch.arange(K, device=x.device).expand(x.shape[0], K).contiguous()
    logprobs = torch.log_softmax(y, -1)[:, :K].detach()
    return fusedkl.topk_divergence(x, ids, logprobs)


def _distillation(x: Tensor, y: Tensor) -> Tensor:
    return fusedkl.distillation_loss(
        x, y, _ids(x), kind="forward_kl", temperature=2.0, ce_weight=0.3, reduction="none"
    )


def _kl_div(x: Tensor, y: Tensor) -> Tensor:
    return fusedkl.kl_div(torch.log_softmax(x, -1), torch.softmax(y, -1), reduction="none").sum(-1)


def _estimate(kind: str, x: Tensor, y: Tensor) -> Tensor:
    return fusedkl.kl_estimate(x[:, 0], y[:, 0], kind)


def _gaussian(x: Tensor, y: Tensor) -> Tensor:
    return fusedkl.gaussian_kl(x[:, :2], x[:, 2:4], y[:, :2], y[:, 2:4]).sum(-1)


KINDS = {
    "forward_kl": fusedkl.forward_kl,
    "reverse_kl": functools.partial(fusedkl.reverse_kl, temperature=2.0),
    "jeffreys": fusedkl.jeffreys,
    "jsd": fusedkl.jsd,
    "skew_kl": fusedkl.skew_kl,
    "renyi": functools.partial(fusedkl.renyi, alpha=0.7),
    "tvd": fusedkl.tvd,
    "hellinger": fusedkl.hellinger,
}
FUNCTIONS: dict[str, Function] = {
    **KINDS,
    "divergence": lambda x, y: fusedkl.divergence(x, y, "reverse_kl", softcap=5.0),
    "token_stats": _token_stats,
    "entropy": lambda x, _: fusedkl.entropy(x),
    "logsumexp": lambda x, _: fusedkl.logsumexp(x),
    "log_softmax": lambda x, y: (fusedkl.log_softmax(x) * y).sum(-1),
    "selective_log_softmax": lambda x, _: fusedkl.selective_log_softmax(x, _ids(x)),
    "topk_divergence": _topk,
    "distillation_loss": _distillation,
    "linear_divergence": _linear,
    "linear_token_stats": _linear_token_stats,
    "kl_div": _kl_div,
    "gaussian_kl": _gaussian,
    "nats_to_bits": lambda x, _: fusedkl.nats_to_bits(x[:, 0]),
    "fisher_vector_product": lambda x, y: fusedkl.fisher_vector_product(x, y).sum(-1),
    **{f"kl_estimate {kind}": functools.partial(_estimate, kind) for kind in ("k1", "k2", "k3")},
}
# Without a gradient, by what they are.
FORWARD_ONLY: dict[str, Function] = {
    "kl_penalized_rewards": lambda x, y: fusedkl.kl_penalized_rewards(
        y[:, 0], x[:, :5], x[:, :5] > 0, 0.1
    ),
}
