"""What every rank of a world checks: the adapter for Megatron-LM, which is not installed here.

The contract of what it replaces is written out below, in plain float64 torch over the gathered
rows: what its documentation says it computes, and Megatron's convention for the gradient.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from sharding_tools import case
from torch import Tensor

import fusedkl
from fusedkl.integrations import megatron

STATE = """
def get_tensor_model_parallel_group():
    return dist.group.WORLD
"""
PLAIN = """
def whole(slice_):  # every rank's slice; this one's leads back to it
    group = dist.group.WORLD
    parts = [torch.empty_like(slice_) for _ in range(group.size())]
    dist.all_gather(parts, slice_.detach().contiguous())
    parts[group.rank()] = slice_
    return torch.cat(parts, -1).double()

def vocab_parallel_cross_entropy(vocab_parallel_logits, target, label_smoothing=0.0):
    log_p = whole(vocab_parallel_logits).log_softmax(-1)
    loss = -log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    if label_smoothing == 0:
        return loss
    # to all other tokens alike: (1 - a) of the target, a / (V - 1) of the others
    share = label_smoothing / (log_p.shape[-1] - 1)
    return (1 - label_smoothing) * loss + share * (-log_p.sum(-1) - loss)
"""
FUSED = """
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

def fused_vocab_parallel_cross_entropy(vocab_parallel_logits, target, tp_group):
    return vocab_parallel_cross_entropy(vocab_parallel_logits, target)
"""
SOURCES = {
    "megatron": "",
    "megatron.core": '__version__ = "0.16.1"',
    "megatron.core.parallel_state": STATE,
    "megatron.core.tensor_parallel": "",
    "megatron.core.tensor_parallel.cross_entropy": PLAIN,
    "megatron.core.fusions": "",
    "megatron.core.fusions.fused_cross_entropy": FUSED,
}
PLAIN_AT, FUSED_AT = list(SOURCES)[4], list(SOURCES)[6]


@contextmanager
def package() -> Iterator[None]:
    """The package `megatron`, of these modules."""
    for name, source in SOURCES.items():
        module = types.ModuleType(name)
        module.__path__ = []  # type: ignore[attr-defined]
        vars(module).update(torch=torch, dist=dist)
        sys.modules[name] = module
        exec(source, vars(module))
    try:
        yield
    finally:
        for name in SOURCES:
            del sys.modules[name]


def _found(call: Callable[..., Tensor], *slices: Tensor) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in slices]
    value = call(*leaves)
    towards = torch.linspace(0.5, 2, value.numel()).reshape(value.shape)
    (value * towards.to(value.dtype)).sum().backward()
    return [value.detach(), *(t.grad for t in leaves if t.grad is not None)]


def _alike(found: list[Tensor], wanted: list[Tensor], what: str) -> None:
    assert found[0].dtype == torch.float32, what
    for a, e in zip(found, wanted, strict=True):
        error = float((a - e).norm() / e.norm())
        assert error <= 1e-5, f"{what}: off by {error}"


def _megatron_ignored(
    mine: Tensor, ignored: Tensor, target: Tensor, group: dist.ProcessGroup
) -> None:
    """Labels below 0: 0, and no gradient; the others are as if those were tokens."""
    counted = ignored >= 0
    for smoothing in (0.0, 0.1):
        towards = torch.linspace(0.5, 2, target.numel()).view(target.shape)
        found = []
        for ids, weight in ((ignored, towards), (target, towards * counted)):
            x = mine.clone().requires_grad_()
            loss = megatron.vocab_parallel_cross_entropy(x, ids, smoothing, group)
            (loss * weight).sum().backward()
            assert x.grad is not None
            found.append((loss.detach(), x.grad))
        (loss, grad), (wanted, wanted_grad) = found
        assert torch.equal(loss, wanted * counted) and torch.equal(grad, wanted_grad), smoothing
        assert (grad[~counted] == 0).all() and (grad[counted] != 0).any()


@case
def megatron_cross_entropies(group: dist.ProcessGroup) -> None:
    v, rank = 24, group.rank()
    logits = 3 * torch.randn(5, 2, v * group.size())
    mine, target = logits[..., rank * v : (rank + 1) * v], torch.randint(logits.shape[-1], (5, 2))
    ignored = target.clone()
    ignored[0, 0], ignored[3, 1] = -100, -1  # as in Megatron's own data sets, with a loss mask of 0
    with package():
        plain, fused = (sys.modules[name] for name in (PLAIN_AT, FUSED_AT))
        calls: dict[str, Callable[[Tensor], Tensor]] = {
            "plain": lambda x: plain.vocab_parallel_cross_entropy(x, target),
            "smoothed": lambda x: plain.vocab_parallel_cross_entropy(x, target, 0.1),
            "fused": lambda x: fused.fused_vocab_parallel_cross_entropy(x, target, group),
            "imported": lambda x: fused.vocab_parallel_cross_entropy(x, target),
        }
        theirs = plain.vocab_parallel_cross_entropy
        wanted = {name: _found(call, mine) for name, call in calls.items()}
        with megatron.patch() as handle:
            assert "cross_entropy rebound" in repr(handle)
            assert plain.vocab_parallel_cross_entropy is megatron.vocab_parallel_cross_entropy
            for name, call in calls.items():
                _alike(_found(call, mine), wanted[name], name)
        assert plain.vocab_parallel_cross_entropy is theirs
        assert fused.vocab_parallel_cross_entropy is theirs
        _megatron_ignored(mine, ignored, target, group)
        before = mine.clone()
        megatron.vocab_parallel_cross_entropy(mine, target)
        assert torch.equal(mine, before)


@case
def megatron_rows(group: dist.ProcessGroup) -> None:
    v, rank = 24, group.rank()
    logits = [3 * torch.randn(5, 2, v * group.size()) for _ in range(2)]
    mine = [t[..., rank * v : (rank + 1) * v] for t in logits]
    labels = torch.randint(logits[0].shape[-1], (5, 2))
    with package():
        whole = vars(sys.modules[PLAIN_AT])["whole"]

        def true_kl(x: Tensor, y: Tensor, reverse: bool) -> Tensor:
            log_p, log_q = ((whole(t) / 2).log_softmax(-1) for t in (x, y))
            first, second = (log_p, log_q) if reverse else (log_q, log_p)
            return (first.exp() * (first - second)).sum(-1)

        for reverse in (False, True):
            _alike(
                _found(lambda x, y, r=reverse: megatron.vocab_parallel_kl_div(x, y, r, 2.0), *mine),
                _found(lambda x, y, r=reverse: true_kl(x, y, r), *mine),
                f"kl {reverse}",
            )
        _alike(
            _found(lambda x: megatron.vocab_parallel_entropy(x, tp_group=group), mine[0]),
            _found(lambda x: torch.special.entr(whole(x).softmax(-1)).sum(-1), mine[0]),
            "entropy",
        )
        _alike(
            _found(
                lambda x: megatron.vocab_parallel_log_probs_from_logits(x, labels, 0.7), mine[0]
            ),
            _found(
                lambda x: (whole(x) / 0.7).log_softmax(-1).gather(-1, labels[..., None])[..., 0],
                mine[0],
            ),
            "log_probs",
        )


@case
def megatron_refusals(group: dist.ProcessGroup) -> None:
    with package():
        plain: Any = sys.modules[PLAIN_AT]
        theirs = plain.vocab_parallel_cross_entropy

        def refused(*said: str) -> None:
            try:
                megatron.patch()
            except RuntimeError as error:
                assert all(word in str(error) for word in said), str(error)
            else:
                raise AssertionError(f"{said} went through")

        sys.modules["megatron.core"].__version__ = "0.99.0"  # type: ignore[attr-defined]
        refused("knows megatron 0.11", "0.16; got 0.99.0")
        assert plain.vocab_parallel_cross_entropy is theirs
        sys.modules["megatron.core"].__version__ = "0.12.0"  # type: ignore[attr-defined]
        plain.vocab_parallel_cross_entropy = lambda logits, labels: logits
        refused("takes (logits, labels), not (vocab_parallel_logits, target")
    try:
        megatron.patch()
    except ImportError as error:
        assert "megatron" in str(error)
    else:
        raise AssertionError("megatron is not there")
    assert fusedkl.integrations.megatron is megatron
