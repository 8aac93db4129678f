"""What every rank of a world checks: lm_heads over a group, beyond divergences of two heads."""

from __future__ import annotations

from typing import Any

import oracle
import torch
import torch.distributed as dist
import torch.nn.functional as F
from linear_cases import Heads
from sharding_groups import as_many, unseen
from sharding_linear import GRADIENT, LABELS, TILE, N, V, check, sliced, two_heads
from sharding_tools import EVERY_KIND, Traffic, case, cut, same_everywhere
from torch import Tensor

import fusedkl


@case
def linear_token_stats(group: dist.ProcessGroup) -> None:
    ids = torch.randint(V, (N, 3))
    temperature, mask = torch.rand(N) + 0.5, torch.arange(N) != 4
    for way, (chosen, dtype) in enumerate(
        [(ids, torch.float32), (ids[:, 0], torch.bfloat16), (None, torch.float32)]
    ):
        h, part = two_heads(dtype, softcap=9.0, ref_softcap=8.0), cut(group, V, way)
        exact = h.double()
        mine = {
            name: sliced(name, t, part).clone().requires_grad_() for name, t in h.tensors.items()
        }
        full = exact.leaves(*exact.tensors)
        on: dict[str, Any] = {"token_ids": chosen, "temperature": temperature, "mask": mask}
        got = fusedkl.linear_token_stats(**mine, **h.options, **on, tile=TILE, group=group)
        x, y = exact.logits(""), exact.logits("ref_")
        wanted = fusedkl.token_stats(x, y, **on, backend="reference")
        sums = []
        for name, a, e in zip(got._fields, got, wanted, strict=True):
            if e is None:
                assert a is None
                continue
            same_everywhere(a, group)
            error = oracle.relative_error(a.detach(), e.detach(), 1.0)
            assert error <= 1e-5, f"{name} off by {error}"
            upstream = torch.rand(e.shape, dtype=torch.float64)
            sums.append(((a * upstream).sum(), (e * upstream).sum()))
        found, slopes = (
            torch.autograd.grad(sum(side), leaves)
            for side, leaves in zip(zip(*sums, strict=True), (mine.values(), full), strict=True)
        )
        for name, a, e in zip(mine, found, slopes, strict=True):
            off = float((a - sliced(name, e, part)).norm() / e.norm())
            assert off <= GRADIENT[dtype], f"{name} off by {off}"
        half = fusedkl.linear_token_stats(
            mine["hidden"], mine["weight"], bias=mine["bias"], **h.options, **on, tile=TILE,
            group=group,
        )  # fmt: skip
        torch.testing.assert_close(half.entropy, got.entropy)
        assert half.forward_kl is None


@case
def linear_topk(group: dist.ProcessGroup) -> None:
    ids = torch.stack([torch.randperm(V)[:5] for _ in range(N)])
    ids[1, 3:] = -1
    logprobs = torch.log_softmax(torch.randn(N, 9), -1)[:, :5]
    mask = torch.arange(N) != 2
    for way, tail in enumerate(("bucket", "drop", "renormalize")):
        for kind, ce_weight in (("forward_kl", None), ("reverse_kl", 0.4)):
            h, part = two_heads(), cut(group, V, way)
            for name in ("ref_hidden", "ref_weight", "ref_bias"):
                del h.tensors[name]
            exact = h.double()
            mine = {n: sliced(n, t, part).clone().requires_grad_() for n, t in h.tensors.items()}
            full = exact.leaves(*exact.tensors)
            q, full_q = (logprobs.clone().requires_grad_() for _ in range(2))
            on: dict[str, Any] = {"kind": kind, "tail": tail, "temperature": 1.4}
            given = {"labels": LABELS, "ce_weight": ce_weight} if ce_weight else {}
            got = fusedkl.linear_divergence(
                **mine, ref_topk=(ids, q), **on, **given, mask=mask, tile=TILE, group=group
            )
            counted = mask & (LABELS != -100) if ce_weight else mask
            x = exact.logits("")
            wanted = fusedkl.topk_divergence(
                x, ids, full_q, mask=counted, backend="reference", **on
            )
            if ce_weight:
                hard = F.cross_entropy(x, LABELS, reduction="none")
                wanted = torch.where(counted, (1 - ce_weight) * wanted + ce_weight * hard, 0)
            what = f"{kind} {tail} {ce_weight}"
            same_everywhere(got, group)
            error = oracle.relative_error(got.detach(), wanted.detach(), 1e-3)
            assert error <= 1e-5, f"{what}: values off by {error}"
            found = torch.autograd.grad(got.sum(), [*mine.values(), q])
            slopes = torch.autograd.grad(wanted.sum(), [*full, full_q])
            for name, a, e in zip([*mine, "q"], found, slopes, strict=True):
                off = float((a - sliced(name, e, part)).norm() / e.norm())
                assert off <= 1e-5, f"{what}: {name} off by {off}"


@case
def linear_many_ranks(group: dist.ProcessGroup) -> None:
    """What is sent by more than 8 ranks: two collectives for all questions, one more for sums."""
    h, part = two_heads(), cut(group, V, 1)
    for kind, more in (("forward_kl", []), ("jsd", ["all_reduce"])):
        call = {"kind": kind, **EVERY_KIND[kind], "temperature": torch.rand(N) + 0.5}
        call |= {"labels": LABELS, "ce_weight": 0.3}
        with as_many():
            check(group, h, part, call, kind)
            mine = {name: sliced(name, t, part) for name, t in h.tensors.items()}
            with Traffic() as sent:
                fusedkl.linear_divergence(**mine, **call, group=group)
        names = [name for name, _ in sent.calls]
        assert names == ["all_to_all_single", "all_gather_into_tensor", *more], names


@case
def linear_cut_anew(group: dist.ProcessGroup) -> None:
    """Labels by the cut as it is now; where nobody looks at numbers, too."""
    last, ranks = group.rank() == group.size() - 1, group.size()
    whole = two_heads()
    for size in (20, 27, 20):
        end = size * (ranks - 1)
        h = Heads({n: sliced(n, t, slice(end + 10)) for n, t in whole.tensors.items()})
        own = (
            slice(end, end + 10) if last else slice(size * group.rank(), size * (group.rank() + 1))
        )
        call: dict[str, Any] = {"kind": "tvd", "ce_weight": 0.5}
        call["labels"] = torch.tensor([0, 9, size - 1, size, end - 1, end, end + 9])
        for looked_at in (True, False):
            with as_many(8) if looked_at else unseen():
                check(group, h, own, call, f"{size} {looked_at}")


@case
def linear_graph(group: dist.ProcessGroup) -> None:
    """A training step as one graph, with collectives in it; values and gradients as without."""
    if group.size() > 2:  # tracing takes seconds, and knows nothing of how many ranks there are
        return
    h, part = two_heads(), cut(group, V, 0)
    other = {name: sliced(name, h.tensors[name], part) for name in ("ref_weight", "bias")}

    def loss(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, labels: Tensor) -> Tensor:
        return fusedkl.linear_divergence(
            hidden, weight, ref_hidden, kind="jsd", labels=labels, ce_weight=0.3,
            reduction="mean", **other, tile=TILE, group=group,
        )  # fmt: skip

    # aot_eager takes three times as long; the operators' opcheck has what it would add
    step = torch.compile(loss, fullgraph=True, dynamic=True, backend="eager")
    labels = LABELS.clamp(min=0)
    for rows in (N, 5):
        found = []
        for run in (loss, step):
            hidden = h.tensors["hidden"][:rows].clone().requires_grad_()
            weight = h.tensors["weight"][part].clone().requires_grad_()
            value = run(hidden, weight, h.tensors["ref_hidden"][:rows].clone(), labels[:rows])
            value.backward()
            found.append([value.detach(), hidden.grad, weight.grad])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-7)


@case
def linear_not_supported(group: dist.ProcessGroup) -> None:
    h, part = two_heads(), cut(group, V, 0)
    mine = {n: sliced(n, t, part).clone().requires_grad_() for n, t in h.tensors.items()}
    for kind in ("reverse_kl", "jsd"):
        value = fusedkl.linear_divergence(**mine, kind=kind, group=group)
        try:
            torch.autograd.grad(value.sum(), mine["hidden"], create_graph=True)
        except RuntimeError as error:
            assert "double backward" in str(error)
        else:
            raise AssertionError("double backward went through")
    calls = {
        "backend='reference'": {"backend": "reference"},
        "rank 1": {"kind": "jsd", "beta": 0.25 + (group.rank() == 1) / 8},
        "kind": {"labels": LABELS, "ce_weight": 0.5 + (group.rank() == 1) / 2, "temperature": 1.7},
    }
    for said, options in calls.items():
        try:
            fusedkl.linear_divergence(**mine, **options, group=group)
        except ValueError as error:
            assert said in str(error), error
        else:
            raise AssertionError(f"{options} went through")


@case
def ids_of_no_token(group: dist.ProcessGroup) -> None:
    """NaN where the host looks at no numbers, of rows of logits too, and in no other row."""
    h, part = two_heads(), cut(group, V, 1)
    ids, mask = torch.tensor([0, -1, V - 1, V, 4, 9, -7]), torch.arange(N) < 6
    lost = [False, True, False, True, False, False, False]
    mine = {name: sliced(name, t, part) for name, t in h.tensors.items()}
    on: dict[str, Any] = {"token_ids": ids, "mask": mask, "group": group}
    x, y = (h.logits(side)[:, part] for side in ("", "ref_"))
    labels: dict[str, Any] = {"labels": ids, "ce_weight": 0.5, "mask": mask, "group": group}
    with unseen():
        for stats in (fusedkl.linear_token_stats(**mine, **on), fusedkl.token_stats(x, y, **on)):
            for name in ("logprob", "ref_logprob", "log_ratio"):
                assert getattr(stats, name).isnan().tolist() == lost, name
            assert bool(stats.forward_kl.isfinite().all())
        assert fusedkl.linear_divergence(**mine, **labels).isnan().tolist() == lost
        known = torch.tensor([[3, 40], [V, 2], [5, -1], [6, 7], [1, V + 9], [8, 9], [V, 1]])
        head = {name: mine[name] for name in ("hidden", "weight")}
        sparse = fusedkl.linear_divergence(
            **head, ref_topk=(known, torch.full((N, 2), -1.5)), mask=mask, group=group
        )
        assert sparse.isnan().tolist() == [False, True, False, False, True, False, False]
        value = fusedkl.distillation_loss(x, y, **labels, reduction="none")
        assert value.isnan().tolist() == lost
    for call in (
        lambda: fusedkl.linear_token_stats(**mine, **on),
        lambda: fusedkl.token_stats(x, y, **on),
    ):
        try:
            call()
        except ValueError as error:
            said = f"token_ids must hold token ids of the whole vocabulary, from 0 to {V - 1}; got"
            assert f"{said} -1 to {V}" in str(error), error
        else:
            raise AssertionError("ids of no token went through where they are looked at")
