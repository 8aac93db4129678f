"""What every rank of a world checks: DTensors, sharded over the vocabulary, tokens, or both."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import oracle
import test_errors_everywhere as surface
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sharding_tools import Traffic, case, close
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import loss_parallel

import fusedkl

Places = list[Placement]


def meshes(group: dist.ProcessGroup) -> Iterator[tuple[tuple[str, ...], DeviceMesh, Places]]:
    """Meshes whose dims cut the vocabulary, cut tokens, or repeat; and where logits then lie."""
    ranks = group.size()
    shapes: list[tuple[tuple[int, ...], tuple[str, ...]]] = [
        ((ranks,), ("v",)),
        ((ranks,), ("t",)),
        ((ranks,), ("r",)),
    ]
    if ranks == 4:
        shapes += [((2, 2), ("t", "v")), ((2, 2), ("v", "r"))]
    for shape, roles in shapes:
        mesh = init_device_mesh("cpu", shape)
        places = {"v": Shard(-1), "t": Shard(0), "r": Replicate()}
        yield roles, mesh, [places[role] for role in roles]


def spread(t: Tensor, mesh: DeviceMesh, places: Places) -> DTensor:
    out: DTensor = distribute_tensor(t, mesh, places, src_data_rank=None)
    return out


@case
def dtensors(group: dist.ProcessGroup) -> None:
    whole = torch.randn(5, 3, 31), torch.randn(5, 3, 31)
    mask, weight = torch.rand(5, 3) > 0.3, torch.rand(5, 3)
    temperature = torch.rand(5, 3) + 0.5
    ids = torch.randint(31, (5, 3))
    for roles, mesh, places in meshes(group):
        for reduction in ("none", "sum", "mean", "batchmean"):
            for options in ({}, {"mask": mask, "weight": weight, "temperature": temperature}):
                what = f"{roles} {reduction} {sorted(options)}"
                x, y = (spread(t, mesh, places).requires_grad_() for t in whole)
                full = [t.clone().requires_grad_() for t in whole]
                with Traffic() as forward:
                    value = fusedkl.jeffreys(x, y, reduction=reduction, **options)
                sent = sum(size for _, size in forward.calls)
                assert isinstance(value, DTensor)
                assert sent <= (8 * 4 * 15 if "v" in roles else 8), f"{what}: {forward.calls}"
                expected = fusedkl.jeffreys(*full, reduction=reduction, **options)
                close(value.full_tensor(), expected.detach(), torch.float32, what)
                scale = torch.rand(5, 3) if reduction == "none" else torch.tensor(3.0)
                here = spread(scale, mesh, [Replicate()] * mesh.ndim)
                (value * here).sum().backward()
                (expected * scale).sum().backward()
                for a, e in zip((x, y), full, strict=True):
                    assert a.grad.placements == a.placements
                    error = oracle.relative_l2(a.grad.full_tensor(), e.grad, 1e-12)
                    assert error <= 3e-6, f"{what}: gradient off by {error}"
        chosen = fusedkl.selective_log_softmax(x.detach(), ids)
        expected = fusedkl.selective_log_softmax(whole[0], ids)
        close(chosen.full_tensor(), expected, torch.float32, "selective_log_softmax")
        balanced = torch.tensor([1.0, -1.0, 0.0]).expand(5, 3).double()
        for w in (balanced, balanced * 0, weight.double()):
            found = fusedkl.jeffreys(x.detach(), y.detach(), weight=w, reduction="mean")
            expected = fusedkl.jeffreys(*whole, weight=w, reduction="mean")
            assert found.dtype == torch.float32 == expected.dtype
            if expected.isfinite():
                torch.testing.assert_close(found.full_tensor(), expected, rtol=3e-6, atol=0)
            else:  # something over 0: infinite, or a sum of infinite parts
                assert not found.full_tensor().isfinite()
    partial = DTensor.from_local(whole[0], mesh, [Partial()] * mesh.ndim)
    everywhere = [Replicate()] * mesh.ndim
    elsewhere = spread(mask, init_device_mesh("cpu", (1, group.size())), [Replicate()] * 2)
    wrong: dict[str, Callable[[], Tensor]] = {
        "Partial": lambda: fusedkl.forward_kl(partial, partial),
        "DTensor": lambda: fusedkl.forward_kl(x, whole[1]),
        "lie as": lambda: fusedkl.forward_kl(x, y.redistribute(mesh, [Shard(1)] * mesh.ndim)),
        "group": lambda: fusedkl.forward_kl(x, y, group=group),
        "reduction": lambda: fusedkl.forward_kl(x, y, reduction="average"),
        "mask must have": lambda: fusedkl.forward_kl(x, y, mask=spread(mask[1:], mesh, everywhere)),
        "mesh of the logits": lambda: fusedkl.forward_kl(x, y, mask=elsewhere),
    }
    for name, call in wrong.items():
        try:
            call()
        except (TypeError, ValueError) as error:
            assert name in str(error), f"{name}: {error}"
        else:
            raise AssertionError(f"{name}: no error")


def agree(
    function: Callable[..., Any],
    logits: dict[str, Tensor],
    tokens: dict[str, Tensor],
    mesh: DeviceMesh,
    places: Places,
    alike: bool,
    what: str,
    **options: Any,
) -> None:
    """Values and gradients, against whole rows in float64 in one process.

    alike: what is one per token lies as the logits do; else every rank has all of it.
    """
    rows: Places = [Replicate() if p == Shard(2) or p == Shard(-1) else p for p in places]
    given, whole = {}, {}
    for name, t in {**logits, **tokens}.items():
        lies = places if name in logits else rows
        mine = spread(t, mesh, lies) if name in logits or alike else t.clone()
        full = t.double() if t.is_floating_point() else t
        if name in logits or name == "topk_logprobs":
            mine, full = mine.requires_grad_(), full.clone().requires_grad_()
        given[name], whole[name] = mine, full
    got, expected = function(**given, **options), function(**whole, **options)
    pairs = [(got, expected)]
    if isinstance(got, tuple):
        pairs = [(a, e) for a, e in zip(got, expected, strict=True) if a is not None]
        assert len(pairs) == sum(e is not None for e in expected)
    total, true_total = 0.0, 0.0
    for i, (a, e) in enumerate(pairs):
        assert isinstance(a, DTensor) and a.shape == e.shape, f"{what}: {i}"
        error = oracle.relative_error(a.full_tensor(), e.detach(), 1e-1)
        assert error <= 3e-6, f"{what}: value {i} off by {error}"
        if e.requires_grad:
            scale = torch.rand(e.shape, dtype=torch.float64)
            here = spread(scale.float(), mesh, [Replicate()] * mesh.ndim)
            total, true_total = total + (a * here).sum(), true_total + (e * scale).sum()
    total.backward()
    true_total.backward()
    for name, t in given.items():
        if t.requires_grad:
            grad = t.grad
            if isinstance(t, DTensor):
                assert grad.placements == t.placements
                grad = grad.full_tensor()
            error = oracle.relative_l2(grad, whole[name].grad, 1e-12)
            assert error <= 1e-5, f"{what}: gradient of {name} off by {error}"


@case
def dtensors_of_other_functions(group: dist.ProcessGroup) -> None:
    x, y = 3 * torch.randn(5, 3, 31), 3 * torch.randn(5, 3, 31)
    mask, weight = torch.rand(5, 3) > 0.3, torch.rand(5, 3)
    labels, ids = torch.randint(31, (5, 3)), torch.randint(31, (5, 3, 2))
    labels[1, 1], ids[~mask] = -7, 12345  # of rows that do not count
    chosen = torch.stack([torch.randperm(31)[:4] for _ in range(15)]).view(5, 3, 4)
    chosen[2, 0, 3:] = -1
    logprobs = torch.log_softmax(torch.randn(5, 3, 9), -1)[..., :4]
    temperature = torch.rand(5, 3) + 0.5
    one, pair = {"policy_logits": x}, {"policy_logits": x, "reference_logits": y}
    both = {"student_logits": x, "teacher_logits": y}
    topk = {"topk_ids": chosen, "topk_logprobs": logprobs}
    for way, (roles, mesh, places) in enumerate(meshes(group)):
        for at, reduction in enumerate(("none", "sum", "mean", "batchmean")):
            alike = (at + way) % 2 == 0
            on = (mesh, places, alike)
            what = f"{roles} {'alike' if alike else 'whole'}"
            if at < 2:
                some = {"token_ids": ids, "mask": mask, "temperature": temperature}
                agree(fusedkl.token_stats, pair, some, *on, f"token_stats {what}")
                some = {"token_ids": labels.clamp(min=0)}
                agree(fusedkl.token_stats, one, some, *on, f"token_stats, half {what}")
            options = {
                "reduction": reduction,
                "kind": ("forward_kl", "reverse_kl")[way % 2],
                "tail": ("bucket", "drop", "renormalize")[(at + way) % 3],
                "return_mass": at % 2 == 0,
            }
            some = topk | {"mask": mask, "temperature": temperature}
            said = f"topk_divergence {what} {options}"
            agree(fusedkl.topk_divergence, one, some, *on, said, **options)
            options = {
                "reduction": reduction,
                "kind": ("forward_kl", "jsd")[at % 2],
                "temperature": (1.0, 2.0)[way % 2],
                "label_smoothing": (0.0, 0.1)[at // 2],
                "ignore_index": -7,
            }
            some = {"labels": labels, "mask": mask, "weight": weight}
            said = f"distillation_loss {what} {options}"
            agree(fusedkl.distillation_loss, both, some, *on, said, **options)


@case
def what_loss_parallel_gets_wrong(group: dist.ProcessGroup) -> None:
    # torch's own loss_parallel(): the right loss, and not its gradient; ours is both
    whole = torch.randn(4, 24), torch.randn(4, 24)
    full = whole[0].clone().requires_grad_()
    truth = F.kl_div(
        F.log_softmax(full, -1), F.log_softmax(whole[1], -1), log_target=True, reduction="sum"
    )
    truth.backward()
    mesh = init_device_mesh("cpu", (group.size(),))
    x, theirs, y = (
        distribute_tensor(t, mesh, [Shard(-1)], src_data_rank=None)
        for t in (whole[0], whole[0], whole[1])
    )
    x.requires_grad_()
    theirs.requires_grad_()
    with loss_parallel():
        loss = F.kl_div(
            F.log_softmax(theirs, -1), F.log_softmax(y, -1), log_target=True, reduction="sum"
        )
        loss.backward()
    assert abs(float(loss.full_tensor().detach() / truth.detach()) - 1) < 1e-5
    assert oracle.relative_l2(theirs.grad.full_tensor(), full.grad) > 0.1
    value = fusedkl.forward_kl(x, y, reduction="sum")
    value.backward()
    assert abs(float(value.full_tensor().detach() / truth.detach()) - 1) < 1e-5
    assert oracle.relative_l2(x.grad.full_tensor(), full.grad) < 3e-6


LINEAR = {"bias": torch.zeros(surface.V), "ref_bias": torch.zeros(surface.V)}
TENSORS = {
    "mask": surface.LABELS >= 0,
    "weight": torch.ones(surface.N),
    "token_weight": torch.ones(surface.N),
    "temperature": torch.ones(surface.N),
    "labels": surface.LABELS,
}
MORE: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = {
    "log_softmax": (fusedkl.log_softmax, (surface.X,), {}),
    "gaussian_kl": (
        fusedkl.gaussian_kl, (surface.X, surface.Y),
        {"prior_mu": surface.Y, "prior_logvar": surface.X},
    ),
    "kl_estimate": (fusedkl.kl_estimate, (surface.X, surface.Y), {}),
    "kl_penalized_rewards": (
        fusedkl.kl_penalized_rewards,
        (surface.X[:, 0], surface.X, surface.X > 0, torch.tensor(0.1)), {},
    ),
    "controller": (fusedkl.AdaptiveKLController(0.1, 1.0).update, (torch.tensor(2.0), 1), {}),
    "linear, logits": (
        fusedkl.linear_divergence, (surface.HIDDEN, surface.WEIGHT), {"ref_logits": surface.Y},
    ),
    "linear, two heads": (
        fusedkl.linear_divergence, (surface.HIDDEN, surface.WEIGHT, surface.HIDDEN),
        {"ref_weight": surface.WEIGHT.clone(), **LINEAR},
    ),
    "linear_token_stats, two heads": (
        fusedkl.linear_token_stats, (surface.HIDDEN, surface.WEIGHT, surface.HIDDEN),
        {"ref_weight": surface.WEIGHT.clone(), **LINEAR},
    ),
}  # fmt: skip
# One DTensor among plain tensors is enough for these: (function, argument).
ALONE = {(name, "logits") for name in ("entropy", "logsumexp", "selective_log_softmax")}
ALONE |= {("topk_divergence", "policy_logits")}
# torch's own operators on DTensors, or no tensors
NOT_HERE = {"kl_div", "nats_to_bits", "backends", "explain", "inductor", "patch", "unpatch"}


@case
def a_dtensor_among_plain_tensors(group: dist.ProcessGroup) -> None:
    """Of every tensor of every public function: taken, or a TypeError that names it."""
    calls = {**surface.CALLS, **MORE}
    public = {name for name in fusedkl.__all__ if name[0].islower()}
    reached = {call[0].__name__ for call in calls.values()}
    assert public - NOT_HERE <= reached, public - NOT_HERE - reached
    mesh = init_device_mesh("cpu", (group.size(),))
    for name, (function, given, options) in calls.items():
        accepted = inspect.signature(function)
        bound = dict(accepted.bind(*given, **options).arguments)
        bound |= bound.pop("options", {})
        optional = set(accepted.parameters)
        if "options" in optional:  # the named kinds
            optional = {"mask", "weight", "temperature", "labels"}
        for option, t in TENSORS.items():
            if option in optional:
                bound.setdefault(option, t)
        for option, t in bound.items():
            pair = isinstance(t, tuple)
            first = t[0] if pair else t
            if not isinstance(first, Tensor):
                continue
            places = [Replicate() if first.dim() == 0 else Shard(first.dim() - 1)]
            sharded = spread(first, mesh, places)
            changed = bound | {option: (sharded, t[1]) if pair else sharded}
            what = f"{name}, {option}"
            try:
                value = function(**changed)
            except TypeError as error:
                said = str(error)
                assert (name, option) not in ALONE, f"{what}: {said}"
                named = "must be a DTensor as" in said or "got a DTensor with placements" in said
                assert named and re.search(rf"\b{option}\b", said), f"{what}: {said}"
            else:
                assert (name, option) in ALONE and isinstance(value, DTensor), what
    pair = surface.X.log_softmax(-1), surface.Y.log_softmax(-1)
    estimate = fusedkl.kl_estimate(*(spread(t, mesh, [Shard(0)]) for t in pair))
    torch.testing.assert_close(estimate.full_tensor(), fusedkl.kl_estimate(*pair))
    ours = [t.clone().requires_grad_() for t in pair]
    theirs = [spread(t, mesh, [Shard(-1)]).requires_grad_() for t in pair]
    for leaves in (ours, theirs):
        fusedkl.kl_div(*leaves, reduction="sum", log_target=True).backward()
    for a, e in zip(theirs, ours, strict=True):
        torch.testing.assert_close(a.grad.full_tensor(), e.grad)
    partial = DTensor.from_local(surface.X, mesh, [Partial()])
    try:
        fusedkl.log_softmax(partial)
    except TypeError as error:
        assert "full_tensor" in str(error) and "to_local" not in str(error)
    else:
        raise AssertionError("a Partial went through")
