"""What only the Triton backend has, under Triton's interpreter (TRITON_INTERPRET=1 pytest ...)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import cases
import mpmath
import oracle
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_triton_interpreted.py", allow_module_level=True)

from fusedkl import reference_backend
from fusedkl.kernels import backend as triton_backend
from fusedkl.kernels import forward
from fusedkl.kernels.family import kind_of
from fusedkl.kernels.launch import choose, pieces

FIELDS = ["forward_kl", "reverse_kl", "entropy", "logsumexp"]


def stats(
    policy: Tensor,
    reference: Tensor | None,
    fields: list[str],
    token_ids: Tensor | None = None,
    valid_vocab: int | None = None,
) -> tuple[Tensor, Tensor]:
    return triton_backend.row_stats(
        policy, reference, token_ids, fields, None, None, None, valid_vocab, None
    )


@pytest.mark.parametrize("scenario", ["flat 1", "peaked 2", "offset 1", "masked 2"])
def test_fields_of_the_reference_are_those_of_a_policy(scenario: str) -> None:
    policy, reference = cases.make(scenario, torch.float32)
    ids = torch.tensor([[5, -1], [0, 66], [7, 7]])
    names = ["ref_entropy", "ref_logsumexp", "ref_logprob", "entropy"]
    found, _ = stats(policy, reference, names, ids)
    swapped, own = oracle.fields(reference), oracle.fields(policy)
    expected = [swapped["entropy"], swapped["logsumexp"]]
    for j in range(2):
        chosen = swapped["log_prob"].gather(1, ids[:, j : j + 1].clamp(min=0)).squeeze(1)
        expected.append(torch.where(ids[:, j] == -1, 0, chosen))
    expected.append(own["entropy"])
    assert oracle.relative_error(found, torch.stack(expected), 1e-2) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "fields", [["forward_kl"], ["forward_kl", "entropy"], [*FIELDS, "ref_entropy"]]
)
def test_ordinary_rows_are_read_once(
    monkeypatch: pytest.MonkeyPatch, fields: list[str], dtype: torch.dtype
) -> None:
    """None is left to the careful kernel."""
    policy = torch.randn(3, 700).to(dtype)
    reference = (policy + 0.1 * torch.randn(3, 700)).to(dtype)
    launch, left = forward.careful, []

    class Spy:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def call(*args: Any, **options: Any) -> None:
                left.append(args[2][-3:].clone())
                launch[grid](*args, **options)

            return call

    monkeypatch.setattr(forward, "careful", Spy())
    stats(policy, reference, fields)
    assert len(left) == 1 and bool((left[0] == 0).all())


def test_slices_of_a_vocabulary_merge_to_the_row() -> None:
    fields = [*FIELDS, "mean_logprob"]
    policy, reference = cases.make("peaked 2", torch.bfloat16)
    policy, reference = policy.clone(), reference.clone()
    policy[0, :20] = reference[0, :20] = -torch.inf  # the first slice of this row is empty
    whole, state = stats(policy, reference, fields)
    cuts = [0, 20, 21, 50, cases.V]
    parts = [stats(policy[:, a:b], reference[:, a:b], fields)[1] for a, b in pairwise(cuts)]
    merged, merged_state = triton_backend.merge_states(torch.stack(parts), fields, None)
    torch.testing.assert_close(merged, whole.double(), rtol=2e-6, atol=0)
    asked = slice(6, 9)  # an entropy that nobody asked for is there where a row was read again
    torch.testing.assert_close(merged_state[:, asked], state[:, asked], rtol=2e-6, atol=1e-12)
    by_reference, _ = reference_backend.merge_states(torch.stack(parts), fields, None)
    torch.testing.assert_close(merged, by_reference, rtol=1e-6, atol=0)


def test_logits_beyond_the_valid_vocabulary_do_not_exist() -> None:
    policy, reference = cases.make("flat 1", torch.float32)
    longer = torch.cat([policy, torch.full((cases.N, 5), torch.nan)], 1)
    values, state = stats(longer, reference, FIELDS, valid_vocab=60)
    expected, _ = stats(policy[:, :60], reference[:, :60], FIELDS)
    assert torch.equal(values, expected)
    grad = torch.ones_like(values)
    gx, gy = triton_backend.row_stats_backward(
        grad, longer, reference, None, state, FIELDS, None, None, 60, None, True, True
    )
    assert gx.shape == longer.shape and gy.shape == reference.shape
    assert not gx[:, 60:].any() and not gy[:, 60:].any()
    assert bool((gx[:, :60] != 0).all() and (gy[:, :60] != 0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_long_row_has_the_same_bits_at_any_alignment(dtype: torch.dtype) -> None:
    """Segments, their merge, and both kinds of loads."""
    width = 33_700 if dtype == torch.bfloat16 else 1_500
    memory = torch.empty(2, width + 16, dtype=dtype)
    rows = [3 * torch.randn(width), 3 * torch.randn(width)]
    found = []
    for x_at, y_at in ((0, 0), (1, 8), (3, 3)):
        x = memory[0, x_at : x_at + width].copy_(rows[0])[None]
        y = memory[1, y_at : y_at + width].copy_(rows[1])[None]
        found.append(stats(x, y, ["forward_kl", "reverse_kl"])[0])
    true, _ = reference_backend.row_stats(
        x, y, None, ["forward_kl", "reverse_kl"], None, None, None, None, None
    )
    assert oracle.relative_error(found[0], true) <= 3e-6
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("fields", "noise"),
    [(["forward_kl"], 1e-3), pytest.param(FIELDS, 1.0, marks=pytest.mark.full)],
    ids=["one", "all"],
)
def test_a_row_of_a_large_vocabulary(fields: list[str], noise: float) -> None:
    policy = 3 * torch.randn(1, 128256)
    x, y = policy.bfloat16(), (policy + noise * torch.randn(1, 128256)).bfloat16()
    found, _ = stats(x, y, fields)
    true, _ = reference_backend.row_stats(x, y, None, fields, None, None, None, None, None)
    assert oracle.relative_error(found, true) <= 1e-5


@pytest.mark.parametrize("fields", [["forward_kl"], FIELDS], ids=["one", "all"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gradients_of_rows_longer_than_a_block(dtype: torch.dtype, fields: list[str]) -> None:
    """The loop without masks; shorter rows take the one for the end of a row."""
    width = 2 * 2048 + 3
    policy = 3 * torch.randn(2, width)
    x, y = policy.to(dtype), (policy + 0.3 * torch.randn(2, width)).to(dtype)
    y[0, 7] = x[0, 7] = -torch.inf
    _, state = stats(x, y, fields)
    grad = 2.0**12 * torch.randn(len(fields), 2)
    common = (fields, None, None, None, None, True, fields != ["forward_kl"])
    found = triton_backend.row_stats_backward(grad, x, y, None, state, *common)
    true = reference_backend.row_stats_backward(grad, x.double(), y.double(), None, state, *common)
    for a, b in zip(found, true, strict=True):
        if a.numel():
            assert oracle.relative_l2(a, b) <= oracle.GRADIENT_TOLERANCE[dtype]


def test_series_are_those_of_the_formulas() -> None:
    """In 30 digits, from the definitions; skew_kl at 0.7 converges most slowly."""
    for field, beta in (("jsd", 0.5), ("jsd", 0.1), ("skew_kl", 0.7), ("renyi", 2.0), ("tvd", 0.0)):
        _, rest, near, value, slope, log_m = kind_of(field, beta)
        for sign in (-1, 1):
            with mpmath.workdps(30):
                z = mpmath.mpf(sign * near)  # log2(p/q)
                p = mpmath.mpf(2) ** z
                to_m = mpmath.log(beta + rest * p)  # log(m/q)
                of_p = rest * p * (mpmath.log(p) - to_m)
                terms = {
                    "jsd": of_p - beta * to_m,
                    "skew_kl": -to_m + rest * (p - 1),
                    "renyi": 1 + rest * (p - 1) - p**rest,
                    "tvd": p - 1,
                }
                slopes = {
                    "jsd": of_p + beta * rest * (1 - p),
                    "skew_kl": beta * rest * (1 - p) * (mpmath.exp(-to_m) - 1),
                }
                power = 1 if field == "tvd" else 2
                expected = {value: terms[field] / z**power}
                if field in slopes:
                    expected[slope] = slopes[field] / z**2
                for series, true in expected.items():
                    found = mpmath.fsum(c * z**j for j, c in enumerate(series))
                    assert abs(found / true - 1) <= 1.5e-5, (field, beta, sign)
            if field in slopes:  # in nats, up to half of one
                l = sign * 0.5  # noqa: E741
                found = l * sum(c * l**j for j, c in enumerate(log_m))
                assert abs(found / math.log(beta + rest * math.exp(l)) - 1) <= 5e-6


def test_segments_depend_on_the_vocabulary_alone() -> None:
    for vocab in (1, 511, 512, 32768, 32769, 50257, 128256, 151936, 262144):
        sizes = choose(vocab, (torch.bfloat16, torch.bfloat16), 90)
        assert sizes.segment % 512 == 0 and -(-vocab // sizes.segment) == -(-vocab // 32768)


def test_pieces_cover_each_row_once() -> None:
    memory = torch.arange(5 * 4 * 3 * 2 * 7.0).view(5, 4, 3, 2, 7)
    for view in (memory, memory[:, 1:3, ::2], memory.permute(3, 1, 0, 2, 4), memory[2, 1, 1]):
        rows = view.reshape(-1, 7)
        seen = torch.zeros(rows.shape[0], dtype=torch.long)
        for piece in pieces([view]):
            ((outer, inner),) = piece.strides
            start = piece.tensors[0].storage_offset()
            for local in range(piece.rows):
                at = start + (local // piece.inner) * outer + (local % piece.inner) * inner
                assert memory.flatten()[at] == rows[piece.first + local, 0]
                seen[piece.first + local] += 1
        assert bool((seen == 1).all())
