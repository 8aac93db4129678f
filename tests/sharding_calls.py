"""What every rank of a world checks: other functions than divergence, traffic, errors."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import oracle
import torch
import torch.distributed as dist
from sharding_tools import (
    EVERY_KIND,
    KINDS,
    SECOND_SWEEP,
    Traffic,
    case,
    cut,
    grad_error,
    leaf,
    whole_rows,
)
from torch import Tensor

import fusedkl
from fusedkl import shard_agreement


@case
def topk(group: dist.ProcessGroup) -> None:
    whole = 4 * torch.randn(4, 71)
    ids = torch.stack([torch.randperm(71)[:5] for _ in range(4)])
    ids[1, 3:] = -1
    logprobs = torch.log_softmax(torch.randn(4, 9), -1)[:, :5]
    mask = torch.tensor([True, True, True, False])
    for way in range(3):
        part = cut(group, 71, way)
        for kind in ("forward_kl", "reverse_kl"):
            for tail in ("bucket", "drop", "renormalize"):
                options = {"kind": kind, "tail": tail, "temperature": 1.4, "mask": mask}
                x, full = leaf(whole, part), whole.double().requires_grad_()
                q, full_q = (logprobs.clone().requires_grad_() for _ in range(2))
                got = fusedkl.topk_divergence(x, ids, q, group=group, return_mass=True, **options)
                expected = fusedkl.topk_divergence(
                    full, ids, full_q, return_mass=True, backend="reference", **options
                )
                for a, e in zip(got, expected, strict=True):
                    assert oracle.relative_error(a, e.detach(), 1e-3) <= 1e-5, (
                        f"{kind} {tail} {part}"
                    )
                got.value.sum().backward()
                expected.value.sum().backward()
                assert grad_error(x, full.grad, part) <= 1e-5, f"{kind} {tail} {part}"
                assert oracle.relative_l2(q.grad, full_q.grad, 1e-6) <= 1e-5, f"{kind} {tail}"


@case
def slices_that_drifted(group: dist.ProcessGroup) -> None:
    """A difference of 256 and -1.5e-5, of rows that are hardly different otherwise."""
    policy = torch.tensor([[256.0, 250.0, 150.0, 150.0]]).bfloat16()
    reference = torch.tensor([[-1.502e-5, -4.0, -100.0, -100.0]]).bfloat16()
    part = slice(*[(0, 2), (2, 4), (4, 4)][min(group.rank(), 2)])
    for kind in KINDS:
        x, y = leaf(policy, part), leaf(reference, part)
        value = fusedkl.divergence(x, y, kind, group=group)
        expected, (to_policy, to_reference) = whole_rows(policy, reference, kind)
        assert oracle.relative_error(value, expected) <= 1e-5, kind
        value.sum().backward()
        assert grad_error(x, to_policy, part) <= 4e-3, kind
        assert grad_error(y, to_reference, part) <= 4e-3, kind


@case
def ids_in_the_padding(group: dist.ProcessGroup) -> None:
    """What whole rows refuse, slices refuse too."""
    logits = torch.randn(2, 6 * group.size())
    part = slice(6 * group.rank(), 6 * (group.rank() + 1))
    ids, valid = torch.tensor([0, logits.shape[1] - 1]), logits.shape[1] - 2
    whole = {"fields": ["logprob"], "valid_vocab": valid}
    for given in ({}, {"group": group}):
        x = logits[:, part] if given else logits
        try:
            fusedkl.token_stats(x, None, ids, **whole, **given)
        except ValueError as error:
            assert f"from 0 to {valid - 1}" in str(error), error
        else:
            raise AssertionError(f"{given} took an id of the padding")


@case
def topk_of_bad_ids(group: dist.ProcessGroup) -> None:
    """What whole rows refuse, slices refuse too."""
    h, ids = 4 * group.size(), torch.arange(3).expand(2, 3).contiguous()
    x, weight, q = torch.randn(2, 4), torch.randn(4, 5), torch.full((2, 3), -2.0)
    many = torch.full((2, h + 1), -1).index_copy_(1, torch.arange(3), ids)
    more = torch.full((2, h + 1), -2.0)
    for given, said in (
        ((ids - 2, q), "-1; got -2 to 0"),
        ((ids + h - 1, q), f"to {h - 1}; got"),
        ((many, more), f"from 1 to V = {h} tokens a row; got {h + 1}"),
    ):
        for call in (
            functools.partial(fusedkl.topk_divergence, x, *given),
            functools.partial(fusedkl.linear_divergence, x @ weight, weight, ref_topk=given),
        ):
            try:
                call(group=group)
            except ValueError as error:
                assert said in str(error), error
            else:
                raise AssertionError(f"{said}: no error")


@case
def memory_of_answers(group: dist.ProcessGroup) -> None:
    """Row counts that come and go are forgotten by all ranks alike."""
    whole = torch.randn(7, 8 * group.size())
    part = cut(group, whole.shape[1], 1)
    fusedkl.entropy(whole[:, part], group=group)
    answers = shard_agreement._known[group].answers
    graphs = sum(isinstance(rows, str) for rows, _ in answers)
    with mock.patch.object(shard_agreement, "_REMEMBERED", 3):
        for n in (1, 2, 3, 4, 5, 1, 5, 2, 7):
            found = fusedkl.entropy(whole[:n, part], group=group)
            torch.testing.assert_close(found, fusedkl.entropy(whole[:n]))
            assert len(answers) <= 3 + graphs
    assert [rows for rows, _ in answers if isinstance(rows, int)] == [1, 2, 7]


@case
def traffic(group: dist.ProcessGroup) -> None:
    """Collectives of a call, and float32 numbers per token in each: docs/sharding.md's table."""
    n, width, k = 10, 6, 3
    x, y = (torch.randn(n, 16, requires_grad=True) for _ in range(2))
    hidden, other = (torch.randn(n, width, requires_grad=True) for _ in range(2))
    weight, ids = torch.randn(16, width), torch.randint(16, (n, k))
    known = torch.arange(k).expand(n, k), torch.full((n, k), -2.0)
    on: dict[str, Any] = {"group": group}
    sends: dict[str, tuple[Callable[[], Any], int, int]] = {  # gathered; reduced
        "logsumexp": (lambda: fusedkl.logsumexp(x, **on), 2, 0),
        "entropy": (lambda: fusedkl.entropy(x, **on), 3, 0),
        "selective": (lambda: fusedkl.selective_log_softmax(x, ids, **on), 2 + k, 0),
        "topk": (lambda: fusedkl.topk_divergence(x, *known, **on), 2 + k, 0),
        "stats": (lambda: fusedkl.token_stats(x, y, **on).reverse_kl, 12, 0),
        "stats of tokens": (lambda: fusedkl.token_stats(x, y, ids, **on).logprob, 12 + 2 * k, 0),
        "distillation": (lambda: fusedkl.distillation_loss(x, y, ids[:, 0], **on), 9, 0),
    }
    gathered = {"jeffreys": 8, "forward_kl": 6, "reverse_kl": 6, "renyi": 6}
    for kind, parameter in EVERY_KIND.items():
        made = functools.partial(fusedkl.divergence, x, y, kind, **parameter, **on)
        sends[kind] = made, gathered.get(kind, 4), 6 if kind in SECOND_SWEEP else 0
    head = functools.partial(fusedkl.linear_divergence, hidden, weight, **on)
    for kind, parameter in EVERY_KIND.items():
        made = functools.partial(head, other, kind=kind, **parameter)
        sends[f"linear {kind}"] = made, gathered.get(kind, 4), 6 if kind in SECOND_SWEEP else 0
    hard: dict[str, Any] = {"labels": ids[:, 0], "ce_weight": 0.3}
    sends["linear, labels"] = functools.partial(head, other, **hard), 6 + 3, 0
    sends["linear, labels, jsd"] = functools.partial(head, other, kind="jsd", **hard), 4 + 3, 6
    sends["linear, top-k"] = functools.partial(head, ref_topk=known), 2 + k, 0
    sends["linear, stats of tokens"] = (
        lambda: fusedkl.linear_token_stats(hidden, weight, other, token_ids=ids, **on).reverse_kl,
        12 + 2 * k, 0,
    )  # fmt: skip
    by_ids = ("selective", "topk", "stats of tokens", "distillation", "labels", "top-k")
    for name, (call, numbers, reduced) in sends.items():
        with Traffic() as forward:
            value = call()
        with Traffic() as backward:
            value.sum().backward()
        # one row more says by what cut the ids were taken
        rows = n + any(word in name for word in by_ids)
        expected = [("all_gather_into_tensor", rows * 4 * numbers)]
        expected += [("all_reduce", n * 4 * reduced)] if reduced else []
        assert forward.calls == expected, f"{name}: {forward.calls}"
        hiddens = ("linear" in name) * (1 if "top-k" in name else 2)
        back = [("all_reduce", n * 4 * width)] * hiddens
        assert backward.calls == back, f"{name}: {backward.calls}"


@case
def disagreements(group: dist.ProcessGroup) -> None:
    odd = group.rank() == 1
    x, y = torch.randn(10, 16), torch.randn(10, 16)
    new = iter(range(2, 9))  # calls that no rank has made before

    def call(x: Tensor, y: Tensor, kind: str, temperature: float) -> Tensor:
        return fusedkl.divergence(x, y, kind, temperature=temperature, group=group)

    calls: dict[str, Callable[[], Tensor]] = {
        "rows": lambda: call(x[: 10 - odd], y[: 10 - odd], KINDS[0], next(new)),
        "dtype": lambda: call(x.bfloat16() if odd else x, y, KINDS[0], next(new)),
        "kind": lambda: call(x, y, KINDS[odd], next(new)),
        "temperature": lambda: call(x, y, KINDS[0], next(new) + odd / 2),
    }
    for name, made in calls.items():
        try:
            made()
        except ValueError as error:
            assert name in str(error) and "rank 1" in str(error), f"{name}: {error}"
        else:
            raise AssertionError(f"{name}: no error")
    fusedkl.forward_kl(x, y, group=group)  # the group is as good as before


@case
def not_supported(group: dist.ProcessGroup) -> None:
    x, y = torch.randn(2, 9, requires_grad=True), torch.randn(2, 9)
    value = fusedkl.forward_kl(x, y, group=group).sum()
    try:
        torch.autograd.grad(value, x, create_graph=True)
    except RuntimeError as error:
        assert "double backward" in str(error)
    else:
        raise AssertionError("double backward went through")
    try:
        fusedkl.forward_kl(x, y, group=group, backend="reference")
    except ValueError as error:
        assert "gradients of slices" in str(error)
    else:
        raise AssertionError("the reference backend took slices that need a gradient")
    with torch.no_grad():
        true = fusedkl.forward_kl(x, y, group=group)
        torch.testing.assert_close(fusedkl.forward_kl(x, y, group=group, backend="reference"), true)
    for wrong in ("world", 3, dist.GroupMember.NON_GROUP_MEMBER):
        try:
            fusedkl.forward_kl(x, y, group=wrong)
        except TypeError as error:
            assert "ProcessGroup" in str(error)
        else:
            raise AssertionError(f"group={wrong!r} went through")


def alone(group: dist.ProcessGroup) -> dict[str, Any]:
    """Rank 1 is dead when the others call."""
    if group.rank() == 1:
        os._exit(0)
    x = torch.randn(4, 8)
    try:
        for _ in range(2):
            fusedkl.forward_kl(x, x, group=group)
    except RuntimeError as error:
        return {"error": type(error).__name__, "said": str(error)}
    return {"error": "none"}


def dies(group: dist.ProcessGroup) -> dict[str, Any]:
    """Rank 1 ends after calls that all made: nothing is asked any more."""
    x = torch.randn(4, 8)
    fusedkl.forward_kl(x, x, group=group)
    if group.rank() == 1:
        os._exit(0)
    try:
        fusedkl.forward_kl(x, x, group=group)
    except RuntimeError as error:
        return {"error": type(error).__name__, "said": str(error)}
    return {"error": "none"}


def apart(group: dist.ProcessGroup) -> dict[str, Any]:
    """Rank 1 makes a new call where rank 0 repeats an old one."""
    x = torch.randn(10, 8)
    fusedkl.forward_kl(x, x, group=group)
    mine = x if group.rank() == 0 else torch.randn(12, 8)
    begin = time.perf_counter()
    try:
        fusedkl.forward_kl(mine, mine, group=group)
    except (RuntimeError, ValueError) as error:
        said = {"error": type(error).__name__, "said": str(error)}
    else:
        said = {"error": "none"}
    # so that the other one's error is its own, not this one's end
    time.sleep(max(0.0, 6 - (time.perf_counter() - begin)))
    return said
