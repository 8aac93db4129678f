"""Faults of slices that a reading found, each as the input that showed it, for every rank."""

from __future__ import annotations

import math

import oracle
import torch
import torch.distributed as dist
from sharding_tools import case, cut, errors, leaf, true_numbers

import fusedkl


@case
def a_token_of_one_row_under_a_softcap(group: dist.ProcessGroup) -> None:
    """One slice's sums are taken in double, and held what the others' leave out."""
    ranks = group.size()
    x, y = 0.1 * torch.randn(2, 1, 8 * ranks)
    x[0, 0] = -math.inf
    part = slice(8 * group.rank(), 8 * (group.rank() + 1))
    for kind in ("jsd", "skew_kl"):
        truth = true_numbers((x, y), kind, softcap=5.0)
        found = errors(group, (x, y), part, truth, kind, softcap=5.0)
        assert max(found) <= 1e-5, f"{kind}: off by {found}"


@case
def a_token_that_underflows_in_both_rows(group: dist.ProcessGroup) -> None:
    """q^2 / p of it does not: 0 times infinity."""
    part = slice(*[(0, 1), (1, 2), (2, 2)][min(group.rank(), 2)])
    for dtype in (torch.float32, torch.float64):
        y = torch.tensor([[0.0, -1000.0]], dtype=dtype)
        for low, expected in ((-1800.0, 0.0), (-math.inf, math.inf)):
            x = leaf(torch.tensor([[0.0, low]], dtype=dtype), part)
            value = fusedkl.renyi(x, y[:, part], alpha=2.0, group=group)
            assert math.isclose(float(value.detach()), expected, abs_tol=1e-80), (low, value)
            value.sum().backward()
            assert x.grad is not None and bool((x.grad.abs() < 1e-12).all()), (low, x.grad)


@case
def a_bad_temperature_beside_an_empty_slice(group: dist.ProcessGroup) -> None:
    """The rank without logits went on to wait for the others."""
    x, y = torch.randn(2, 2, 30)
    for way, valid in ((1, None), (2, None), (0, 5)):
        part = cut(group, 30, way)
        temperature = torch.tensor([1.0, 0.0])
        try:
            fusedkl.forward_kl(
                x[:, part], y[:, part], temperature=temperature, valid_vocab=valid, group=group
            )
        except ValueError as error:
            assert "temperature" in str(error), error
        else:
            raise AssertionError("no error")


@case
def a_slice_whose_share_underflows(group: dist.ProcessGroup) -> None:
    part = slice(*[(0, 1), (1, 2), (2, 2)][min(group.rank(), 2)])
    lacking, having = torch.tensor([[[0.0, -math.inf]], [[0.0, -1000.0]]])
    for backend in (None, "reference"):
        for kind, x, y in (("forward_kl", lacking, having), ("reverse_kl", having, lacking)):
            value = fusedkl.divergence(x[:, part], y[:, part], kind, group=group, backend=backend)
            assert value.tolist() == [math.inf], (backend, kind, value)


@case
def a_smoothed_label_beside_an_offset(group: dist.ProcessGroup) -> None:
    """A mean of logits is a sum of numbers as large as their offset."""
    part = cut(group, 100_004, 2)
    logits = torch.full((1, 100_004), 10000.1)[:, part]
    options = {"ce_weight": 1.0, "label_smoothing": 1.0, "group": group}
    value = fusedkl.distillation_loss(logits, logits, torch.tensor([0]), **options)
    expected = torch.tensor(math.log(100_004), dtype=torch.float64)
    assert oracle.relative_error(value, expected) <= 1e-5, value
