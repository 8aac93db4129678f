"""What every rank of a world checks: merging by many ranks, cuts that change, graphs, memory."""

from __future__ import annotations

import contextlib
from unittest import mock

import torch
import torch.distributed as dist
from sharding_tools import (
    EVERY_KIND,
    SECOND_SWEEP,
    Traffic,
    case,
    cut,
    errors,
    leaf,
    same_everywhere,
    true_numbers,
)
from torch import Tensor

import fusedkl
from fusedkl import distributed


def as_many(limit: int = 1) -> mock._patch[int]:
    """Groups of this size merge as those of more than 8 ranks do."""
    return mock.patch.object(distributed, "_GATHERED_BY", limit)


def unseen() -> mock._patch[mock.Mock]:
    """The host looks at no numbers, as where they are on a GPU."""
    return mock.patch.object(distributed, "_looked_at", mock.Mock(return_value=False))


@case
def many_ranks(group: dist.ProcessGroup) -> None:
    # rows that the ranks do not divide; fewer rows than ranks; none
    for n, kinds in ((7, list(EVERY_KIND)), (1, ["reverse_kl", "jsd"]), (0, ["tvd"])):
        rows = 3 * torch.randn(n, 67), 3 * torch.randn(n, 67)
        mask = torch.rand(n) > 0.3
        temperature = torch.rand(n) + 0.5
        for way, kind in enumerate(kinds):
            part = cut(group, 67, way)
            options = {"temperature": temperature, "mask": mask, **EVERY_KIND[kind]}
            with as_many():
                found = errors(
                    group, rows, part, true_numbers(rows, kind, **options), kind, **options
                )
            assert max(found) <= 1e-5, f"{kind} {n}: values, gradients off by {found}"
    whole, ids = 3 * torch.randn(5, 67), torch.randint(67, (5, 3))
    part = cut(group, 67, 0)
    with as_many(), Traffic() as forward:
        mine = leaf(whole, part)
        stats = fusedkl.token_stats(mine, leaf(whole + 0.1, part), ids, group=group)
        same_everywhere(stats.forward_kl, group)
        same_everywhere(stats.logprob, group)
    expected = fusedkl.token_stats(whole, whole + 0.1, ids)
    for name, value in stats._asdict().items():
        torch.testing.assert_close(value, getattr(expected, name), rtol=3e-6, atol=3e-6)
    names = [name for name, _ in forward.calls]
    assert names[:2] == ["all_to_all_single", "all_gather_into_tensor"]
    logprobs = torch.log_softmax(torch.randn(5, 4), -1)[:, :3]
    chosen = torch.stack([torch.randperm(67)[:3] for _ in range(5)])
    with as_many():
        got = fusedkl.topk_divergence(whole[:, part], chosen, logprobs, group=group)
    torch.testing.assert_close(got, fusedkl.topk_divergence(whole, chosen, logprobs))


@case
def memory(group: dist.ProcessGroup) -> None:
    """What is allocated for collectives, by ranks; the logits are one entry per rank."""
    n, p = 512, group.size()
    x, y = torch.randn(n, 1), torch.randn(n, 1)
    sizes = {}
    for limit in (8, 1):
        with as_many(limit), Buffers() as seen:
            fusedkl.forward_kl(x, y, group=group)
        sizes[limit] = seen.largest
    assert sizes[8] == 24 * n * p, "one gather: a payload per rank"
    assert sizes[1] <= 24 * (n + p), "rows exchanged: a payload, however many ranks"


class Buffers(Traffic):
    """The largest buffer that a collective fills."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func.namespace == "_c10d_functional" and isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel() * out.element_size())
        return out


@case
def cut_anew(group: dist.ProcessGroup) -> None:
    # The last rank's slice keeps its size, the others' do not; and back again.
    last, ranks = group.rank() == group.size() - 1, group.size()
    whole = 3 * torch.randn(4, 90), 3 * torch.randn(4, 90)
    ids = torch.tensor([0, 50, 60, 29])
    for size in (10, 17, 10):
        end = size * (ranks - 1)
        total = end + 10
        part = slice(end, total) if last else slice(size * group.rank(), size * (group.rank() + 1))
        rows = whole[0][:, :total], whole[1][:, :total]
        here = torch.minimum(ids, torch.tensor(total - 1))
        for kind, parameter in (("forward_kl", {}), ("jsd", SECOND_SWEEP["jsd"])):
            for valid in (None, 9):
                options = {"valid_vocab": valid, **parameter}
                found = errors(
                    group, rows, part, true_numbers(rows, kind, **options), kind, **options
                )
                assert max(found) <= 1e-5, f"{kind} {valid} {size}: off by {found}"
        full = rows[0].clone().requires_grad_()
        expected = fusedkl.selective_log_softmax(full, here)
        expected.sum().backward()
        for looked_at in (False, True):  # as on a GPU, whose ranks go by what they believe still
            mine = leaf(rows[0], part)
            with contextlib.nullcontext() if looked_at else unseen():
                chosen = fusedkl.selective_log_softmax(mine, here, group=group)
            torch.testing.assert_close(chosen, expected, rtol=3e-6, atol=3e-6)
            chosen.sum().backward()
            torch.testing.assert_close(mine.grad, full.grad[:, part], rtol=1e-5, atol=1e-6)
        # an id that the new cut has and the old one has not is no error, and one beyond it is
        try:
            fusedkl.selective_log_softmax(rows[0][:, part], here + total, group=group)
        except ValueError as error:
            assert f"from 0 to {total - 1}" in str(error)
        else:
            raise AssertionError("ids beyond the vocabulary went through")


@case
def graphs(group: dist.ProcessGroup) -> None:
    """A training step as one graph, with collectives in it; values and gradients as without."""
    if group.size() > 2:  # tracing takes seconds, and knows nothing of how many ranks there are
        return
    whole = 3 * torch.randn(6, 40), 3 * torch.randn(6, 40)
    part = cut(group, 40, 0)
    ids, mask = torch.randint(40, (6,)), torch.tensor([True, False, True, True, True, False])

    def loss(x: Tensor, y: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        options = {"mask": mask, "reduction": "mean", "group": group}
        value = fusedkl.forward_kl(x, y, **options) + fusedkl.jsd(x, y, **options)
        return value - fusedkl.selective_log_softmax(x, ids, group=group).mean()

    step = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (6, 4):
        found = []
        for run in (loss, step):
            mine = [leaf(t[:rows], part) for t in whole]
            value = run(*mine, ids[:rows].clone(), mask[:rows].clone())
            value.backward()
            found.append([value.detach(), *(t.grad for t in mine)])
        for a, b in zip(*found, strict=True):  # gradients of three functions, added in some order
            torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-7)


@case
def a_cut_unseen_in_a_graph(group: dist.ProcessGroup) -> None:
    """Where nobody looks at numbers: ids by any cut; valid_vocab by another one is NaN."""
    if group.size() > 2:  # as above
        return
    rank, ranks = group.rank(), group.size()

    def cut_after(first: int) -> tuple[Tensor, Tensor, slice]:
        """Rank 0's slice has this size, the others' have 9."""
        total = first + 9 * (ranks - 1)
        ends = [0, *range(first, total + 1, 9)]
        return 3 * torch.randn(3, total), 3 * torch.randn(3, total), slice(*ends[rank : rank + 2])

    chosen = torch.compile(
        lambda x, ids: fusedkl.selective_log_softmax(x, ids, group=group), backend="eager"
    )
    for first in (9, 11, 9):  # only rank 0 compiles anew
        x, _, part = cut_after(first)
        ids = torch.tensor([first - 1, first, x.shape[1] - 1])
        expected = x.log_softmax(-1).gather(1, ids[:, None])[:, 0]
        torch.testing.assert_close(chosen(x[:, part], ids), expected, rtol=3e-6, atol=3e-6)

    bounded = torch.compile(
        lambda x, y: fusedkl.forward_kl(x, y, valid_vocab=12, group=group), backend="eager"
    )
    another = torch.compile(
        lambda x, y: fusedkl.forward_kl(x, y, valid_vocab=12, group=group), backend="eager"
    )
    for first, step in ((9, bounded), (11, another), (9, bounded)):
        x, y, part = cut_after(first)
        expected = fusedkl.forward_kl(x, y, valid_vocab=12)
        torch.testing.assert_close(step(x[:, part], y[:, part]), expected, rtol=1e-5, atol=1e-6)
    x, y, part = cut_after(9)
    assert another(x[:, part], y[:, part]).isnan().all()
