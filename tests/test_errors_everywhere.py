"""Each wrong option, given to each function that has it, is an error that names the option."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fusedkl

N, V, H, K = 4, 9, 3, 2
X, Y = torch.randn(2, N, V, generator=torch.Generator().manual_seed(0))
HIDDEN, WEIGHT = X[:, :H], Y.t()[:, :H]
IDS, LOG_Q = torch.arange(K).expand(N, K), torch.full((N, K), -2.0)
LABELS = torch.arange(N)
ONE_KIND = ("forward_kl", "reverse_kl", "jeffreys", "jsd", "skew_kl", "renyi", "tvd", "hellinger")

# name -> the function, and a good call of it
CALLS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = {
    "divergence": (fusedkl.divergence, (X, Y), {}),
    **{name: (getattr(fusedkl, name), (X, Y), {}) for name in ONE_KIND},
    "renyi": (fusedkl.renyi, (X, Y), {"alpha": 2.0}),
    "token_stats": (fusedkl.token_stats, (X, Y, LABELS), {}),
    "distillation_loss": (fusedkl.distillation_loss, (X, Y, LABELS), {}),
    "topk_divergence": (fusedkl.topk_divergence, (X, IDS, LOG_Q), {}),
    "linear_divergence": (fusedkl.linear_divergence, (HIDDEN, WEIGHT, HIDDEN), {}),
    "linear_divergence, top-k": (
        fusedkl.linear_divergence, (HIDDEN, WEIGHT), {"ref_topk": (IDS, LOG_Q)},
    ),
    "linear_token_stats": (
        fusedkl.linear_token_stats, (HIDDEN, WEIGHT, HIDDEN), {"token_ids": LABELS},
    ),
    "fisher_vector_product": (fusedkl.fisher_vector_product, (X, Y), {}),
    "entropy": (fusedkl.entropy, (X,), {}),
    "logsumexp": (fusedkl.logsumexp, (X,), {}),
    "selective_log_softmax": (fusedkl.selective_log_softmax, (X, LABELS), {}),
}  # fmt: skip

WRONG: dict[str, list[Any]] = {
    "kind": ["kl", "", 3, None],
    "temperature": [0, -1.0, math.nan, math.inf, "1", torch.ones(N + 1), torch.zeros(N)],
    "mask": [torch.ones(N + 1, dtype=torch.bool), torch.ones(N), [True] * N],
    "reduction": ["avg", 1],
    "tail": ["head", 2],
    "labels": [torch.zeros(N), torch.zeros(N + 1, dtype=torch.int64)],
    "token_ids": [LABELS + V, LABELS - 2, LABELS.int(), LABELS[:1]],
    "index": [LABELS + V, LABELS.int(), LABELS[:1]],
    "ce_weight": [-0.1, 1.5, "half", math.nan],
    "label_smoothing": [-0.1, 1.5, "half"],
    "ref_topk": [(IDS + V, LOG_Q), (IDS, -LOG_Q), (IDS, LOG_Q[:1]), (IDS[:, :0], LOG_Q[:, :0])],
    "topk_ids": [IDS + V, IDS - 3, IDS * 0, IDS.float(), IDS[:1]],
    "topk_logprobs": [-LOG_Q, LOG_Q[:1], IDS],
    "backend": ["gpu", 1],
    "softcap": [0.0, -1.0, "high"],
    "valid_vocab": [0, V + 1, 2.5],
    "precision": ["bf16"],
    "tile": [(0, 4), (4,)],
}
CASES = [
    (name, option, at)
    for name, (function, *_) in CALLS.items()
    for option in inspect.signature(function).parameters
    for at in range(len(WRONG.get(option, ())))
]


def called(name: str, **changed: Any) -> Any:
    function, given, options = CALLS[name]
    bound = inspect.signature(function).bind(*given, **options)
    return function(**(bound.arguments | changed))


@pytest.mark.parametrize("name", CALLS)
def test_the_call_itself_is_right(name: str) -> None:
    called(name)


@pytest.mark.parametrize(("name", "option", "at"), CASES)
def test_a_wrong_option_is_named(name: str, option: str, at: int) -> None:
    value = WRONG[option][at]
    extra: dict[str, Any] = {}
    if option == "ce_weight" and name.startswith("linear"):
        extra["labels"] = LABELS
    with pytest.raises((TypeError, ValueError), match=rf"\b{option}\b"):
        called(name, **{option: value}, **extra)


@pytest.mark.parametrize(
    ("kind", "option", "value"),
    [
        ("jsd", "beta", -0.1),
        ("jsd", "beta", 1.5),
        ("jsd", "beta", math.nan),
        ("jsd", "alpha", 0.5),
        ("skew_kl", "alpha", 0.0),
        ("skew_kl", "alpha", 1.0),
        ("skew_kl", "beta", 0.5),
        ("renyi", "alpha", 0.0),
        ("renyi", "alpha", -1.0),
        ("renyi", "alpha", math.inf),
        ("forward_kl", "beta", 0.5),
        ("tvd", "alpha", 0.5),
    ],
)
@pytest.mark.parametrize("name", ["divergence", "distillation_loss", "linear_divergence"])
def test_the_parameter_of_a_kind_is_named(name: str, kind: str, option: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"\b{option}\b"):
        called(name, kind=kind, **{option: value})


@pytest.mark.parametrize("name", ["distillation_loss", "linear_divergence"])
def test_labels_out_of_range_count_only_where_they_are_read(name: str) -> None:
    given: dict[str, Any] = {"ce_weight": 0.5, "labels": LABELS.clone()}
    given["labels"][1] = V
    with pytest.raises(ValueError, match=rf"labels .*{V - 1}"):
        called(name, **given)
    mask = torch.ones(N, dtype=torch.bool)
    mask[1] = False
    if name == "distillation_loss":  # the other takes labels as its mask
        assert bool(called(name, **given, mask=mask).isfinite().all())
    given["labels"][1] = -100
    assert bool(called(name, **given).isfinite().all())


def test_every_function_with_options_is_here() -> None:
    said = {re.sub(",.*", "", name) for name in CALLS}
    options = {"kind", "temperature", "mask"}
    missing = [
        name
        for name in fusedkl.__all__
        if inspect.isfunction(function := getattr(fusedkl, name))
        and options & set(inspect.signature(function).parameters)
        and name not in said
    ]
    # fields and penalties of their own, in the tests of theirs
    assert set(missing) <= {"explain", "kl_estimate", "kl_penalized_rewards"}
