"""The schedule of a fused lm_head on fake CUDA tensors: what it allocates, and that it never waits.

A fake tensor has no contents: whatever reads one, .item() or a branch, raises. Row kernels are
their fakes; matrix products give shapes and dtypes alone.
"""

from __future__ import annotations

import collections
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fusedkl import linear_ops, reference
from fusedkl.linear_arguments import DIFFERENTIABLE, Inputs

TOKENS, VOCABULARY, WIDTH = 4096, 64 * 1024, 128
SIZES = {"tokens": TOKENS, "vocabulary": VOCABULARY}


def on_gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda")


def _products_are_faked() -> bool:
    """Whether fake tensors know `addmm` with out_dtype; those of torch 2.11 take it for beta."""
    with FakeTensorMode():
        total, other = on_gpu(4, 4, dtype=torch.float32), on_gpu(4, 4)
        try:
            torch.addmm(total, other, other, out_dtype=torch.float32, out=total)
        except TypeError:
            return False
    return True


needs_products = pytest.mark.skipif(
    not _products_are_faked(), reason="fake tensors of this PyTorch take out_dtype for beta"
)


def arguments(dtype: torch.dtype = torch.bfloat16, **changed: Any) -> Inputs:
    """Of both heads, for the operators; inside of a FakeTensorMode."""
    hidden, weight = (on_gpu(n, WIDTH, dtype=dtype) for n in (TOKENS, VOCABULARY))
    given = Inputs(
        hidden, weight, None, torch.empty_like(hidden), torch.empty_like(weight), None, None, None,
        None, None, ["forward_kl"], None, None, None, [1.0, 1.0], [0.0, 0.0], False, [], "triton",
    )  # fmt: skip
    return given.changed(changed)


class Large(TorchDispatchMode):
    """Counts results of 1 MiB and more that are new memory, by operator and bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: collections.Counter[tuple[str, int]] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        results = out if isinstance(out, (tuple, list)) else (out,)
        for result, said in zip(results, func._schema.returns, strict=False):
            if isinstance(result, Tensor) and said.alias_info is None and result.nbytes >= 1 << 20:
                name = str(func.name()).split("::")[1].split(".")[0]
                self.found[name, result.nbytes] += 1
        return out


def test_what_is_counted() -> None:
    with FakeTensorMode(), Large() as large:
        x = on_gpu(512, 1024)
        x.view(-1).mul_(2)
        torch.mm(x, x.t(), out=on_gpu(512, 512))
        x.float()
    assert large.found == {("empty", 1 << 20): 1, ("_to_copy", 2 << 20): 1}


def test_forward_allocates_its_tiles_once() -> None:
    with FakeTensorMode():
        given = arguments(mask=on_gpu(TOKENS, dtype=torch.bool))
        tile = linear_ops.engine_of(given).tile
        with Large() as large:
            values, states = linear_ops._linear_stats(*given)
    assert values.device.type == states.device.type == "cuda"
    steps = -(-TOKENS // tile.tokens) * -(-VOCABULARY // tile.vocabulary)
    assert steps >= 4
    # two tiles, and the states of the tiles that wait to be merged
    waiting = 9 * TOKENS * len(reference.STATE) * 8
    assert large.found == {("empty", tile.tokens * tile.vocabulary * 4): 2, ("empty", waiting): 1}


@needs_products
@pytest.mark.parametrize("capped", [False, True])
def test_backward_allocates_its_tiles_once(capped: bool) -> None:
    """All of it, but for the gradient beside capped logits, which it is multiplied with."""
    with FakeTensorMode():
        given = arguments()
        if capped:
            bias = on_gpu(VOCABULARY)
            given = given._replace(bias=bias, softcaps=[30.0, 0.0], scales=[0.5, 1.0])
        tile = linear_ops.engine_of(given).tile
        states = on_gpu(1, TOKENS, len(reference.STATE), dtype=torch.float64)
        grad = on_gpu(1, TOKENS, dtype=torch.float32)
        wanted = [True, True, capped, False, False, False, False]
        with Large() as large:
            found = linear_ops._linear_stats_backward(grad, *given, states, wanted, False)
    assert [found[0].shape, found[1].shape] == [given.hidden.shape, given.weight.shape]
    steps = -(-TOKENS // tile.tokens) * -(-VOCABULARY // tile.vocabulary)
    pairs, rows = tile.tokens * tile.vocabulary, TOKENS * WIDTH
    expected: dict[tuple[str, int], int] = collections.Counter()
    for name, size in (
        ("empty", pairs * 4),  # tiles of logits
        ("empty", pairs * 4),
        ("empty", pairs * 2),  # a tile of gradients in the operands' dtype
        ("empty", tile.vocabulary * WIDTH * 4),  # a tile of d weight
        ("empty_like", VOCABULARY * WIDTH * 2),  # d weight
        ("zeros", rows * 4),  # d hidden
        ("_to_copy", rows * 2),  # rounded
        ("where", rows * 2),  # hidden states without those of tokens that do not count
        ("where", rows * 2),
    ):
        expected[name, size] += 1
    if capped:
        expected["row_stats_backward", pairs * 4] = steps
        expected["empty", pairs] = 1  # which tokens are absent
    assert large.found == expected


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mask": {"mask": (torch.bool, "tokens")},
    "labels": {"labels": (torch.int64, "tokens")},
    "token_ids": {"token_ids": (torch.int64, "tokens", 3), "fields": ["logprob", "log_ratio"]},
    "top-k": {"topk_ids": (torch.int64, "tokens", 8), "fields": ["logsumexp"], "ref_hidden": None,
              "ref_weight": None},
    "jsd": {"fields": ["jsd"], "parameter": 0.3},
    "options of the logits": {
        "bias": (None, "vocabulary"), "ref_bias": (None, "vocabulary"), "scales": [0.5, 2.0],
        "softcaps": [30.0, 20.0],
    },
    "ref_logits": {"ref_logits": (torch.float32, "tokens", "vocabulary"), "ref_hidden": None,
                   "ref_weight": None},
    "float16": {"dtype": torch.float16},
    "float32": {"dtype": torch.float32},
    "fast": {"fast": True},
    "temperature": {"inv_temperature": (torch.float64, "tokens")},
    "shared weight": {"ref_weight": None},
}  # fmt: skip


@needs_products
@pytest.mark.parametrize("of_slice", [False, True])
@pytest.mark.parametrize("setting", SETTINGS)
def test_no_host_synchronisation(setting: str, of_slice: bool) -> None:
    changes = dict(SETTINGS[setting])
    dtype = changes.pop("dtype", torch.bfloat16)
    with FakeTensorMode():
        made = {
            name: on_gpu(*(SIZES.get(n, n) for n in what[1:]), dtype=what[0] or dtype)
            if isinstance(what, tuple)
            else what
            for name, what in changes.items()
        }
        given = arguments(dtype, **made, tile=[TOKENS // 2, VOCABULARY // 2])
        if of_slice:
            _, states = linear_ops._linear_slice(*given)
            if given.fields == ["jsd"]:
                assert linear_ops._linear_sums(*given, states[0]).device.type == "cuda"
        values, whole = linear_ops._linear_stats(*given)
        states = whole if not of_slice else states
        assert values.shape == (given.value_rows(), TOKENS) and states.shape == whole.shape
        assert values.device.type == states.device.type == "cuda"
        wanted = [True] * DIFFERENTIABLE
        found = linear_ops._linear_stats_backward(values, *given, states, wanted, of_slice)
        for name, like, slope in zip(Inputs._fields, given.differentiable(), found, strict=False):
            assert slope.device.type == "cuda", name
            if like is None:
                assert slope.shape == (0,), name
                continue
            part = of_slice and name in ("hidden", "ref_hidden")
            assert slope.shape == like.shape, name
            assert slope.dtype == (torch.float32 if part else like.dtype), name


def test_a_host_synchronisation_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """If tokens were dropped as on the CPU."""
    monkeypatch.setattr(linear_ops, "_places", lambda counted: counted.nonzero().squeeze(1))
    with FakeTensorMode():
        given = arguments(mask=on_gpu(TOKENS, dtype=torch.bool))
        with pytest.raises((DataDependentOutputException, RuntimeError), match="nonzero"):
            linear_ops._linear_stats(*given)


@pytest.mark.parametrize("given", ["ref_hidden", "ref_logits"])
def test_a_token_without_a_gradient_may_hold_anything(
    given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where it is not dropped: gradients are as where it is."""
    n, v, h = 5, 37, 8
    hidden, weight = torch.randn(n, h), torch.randn(v, h)
    other = torch.randn(n, h) if given == "ref_hidden" else torch.randn(n, v)
    hidden[2], other[2] = math.nan, math.inf
    i = Inputs(
        hidden, weight, None, None, None, None, None, None, None, None, ["forward_kl"], None, None,
        None, [1.0, 1.0], [0.0, 0.0], False, [3, 16], "cpu",
    ).changed({given: other})  # fmt: skip
    live = torch.arange(n) != 2
    clear = linear_ops._cleared(i, live)
    assert not bool(clear.hidden[2].any()) and torch.equal(clear.hidden[live], hidden[live])
    if clear.ref_hidden is not None:
        assert not bool(clear.ref_hidden[2].any())
        assert torch.equal(clear.ref_hidden[live], other[live])
    values, states = linear_ops._linear_stats(*i)
    grad = torch.where(live, torch.ones_like(values), 0)
    wanted = [True, True, False, True, False, False, True]
    dropped = linear_ops._linear_stats_backward(grad, *i, states, wanted, False)
    monkeypatch.setattr(linear_ops, "_places", lambda counted: None)
    kept = linear_ops._linear_stats_backward(grad, *clear, states, wanted, False)
    for found, truth in zip(kept, dropped, strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-6)
        assert bool(found.isfinite().all())
