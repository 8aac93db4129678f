"""The suite's logic: right ones are timed, wrong ones shown, and memory is counted."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bench_modules import (
    contenders,
    oracle_f64,
    speed,
    suite_batch,
    suite_contenders,
    suite_fake_memory,
    suite_judge,
    suite_measure,
    suite_models,
    suite_plans,
)
from torch import Tensor

Case = suite_batch.Case
pytestmark = pytest.mark.slow
KL = Case("models", "forward_kl", "small", 16)
QUICK = speed.Settings(True, rounds=2, seconds=0.05)


# -- inputs and the truth ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_the_truth_is_the_oracles(kind: str) -> None:
    case = dataclasses.replace(KL, operation=f"{kind}_kl", masked=0.5)
    batch = suite_batch.build(case)
    true = suite_judge.truth(case, batch)
    counted = batch.counted.nonzero().flatten().tolist()
    rows = [oracle_f64.row(batch.policy[i], batch.reference[i]) for i in counted]
    assert 1 < len(counted) < case.tokens
    expected = sum(float(getattr(row, f"{kind}_kl")) for row in rows) / len(rows)
    assert true.value == pytest.approx(expected, rel=1e-9)
    gradient = getattr(rows[-1], f"{kind}_gradient") / len(rows)
    assert oracle_f64.relative_l2(true.gradient(counted[-1]), gradient) < 1e-8
    assert not true.gradient(int((~batch.counted).nonzero()[0])).any()


def test_a_slice_stays_a_slice_and_its_copy_too() -> None:
    batch = suite_batch.build(dataclasses.replace(KL, layout="sliced"))
    for leaf in (suite_judge.leaf(batch.policy, copied) for copied in (False, True)):
        assert leaf.stride() == (4096 + suite_batch.PADDING, 1) and leaf.shape == (16, 4096)
    assert torch.equal(batch.policy, suite_batch.build(KL).policy)


@pytest.mark.parametrize(
    "operation", ["forward_kl", "reverse_kl", "jsd", "token_stats", "topk", "linear"]
)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_every_contender_is_right(operation: str, dtype: str) -> None:
    case = Case("operations", operation, "small", 16, dtype, masked=0.5)
    batch = suite_batch.build(case)
    true = suite_judge.truth(case, batch)
    for name, make in suite_contenders.makers(case, "cpu").items():
        if name.startswith("torch.compile") or name == "eager, no upcast":
            continue  # slow to make; of 16 bits, wrong by nature
        found = suite_judge.judge(make(case), case, batch, true)
        assert found.wrong == "", name
        assert found.gradient is not None and found.gradient < 0.1


# -- correctness first ---------------------------------------------------------------------------


def _plant(loss: Callable[[Any], Tensor], monkeypatch: pytest.MonkeyPatch, case: Any) -> Any:
    def planted(case: Any, device: str) -> dict[str, Any]:
        ours = suite_contenders.ours(case, "reference")
        return {
            "fusedkl reference": lambda case: ours,
            "planted": lambda case: contenders.Contender("planted", loss),
        }

    monkeypatch.setattr(suite_measure, "makers", planted)
    item = suite_plans.Item(case)
    ours, other = suite_measure.times(item, QUICK, "cpu", lambda text: None)
    assert ours.wrong == "" and ours.seconds.median > 0 and ours.share > 0
    return other


def _right(b: Any) -> Tensor:
    return contenders.two_lines(b.policy, b.reference)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda b: 1.05 * _right(b), "value"),
        (lambda b: 2 * _right(b) - _right(b).detach(), "gradient off"),
        (lambda b: _right(b) * math.nan, "value nan"),
    ],
    ids=["value", "gradient", "nan"],
)
def test_wrong_numbers_are_shown_and_not_timed(
    loss: Callable[[Any], Tensor], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = _plant(loss, monkeypatch, KL)
    assert said in other.wrong and other.seconds is None and other.ratio is None


def test_a_gradient_on_a_masked_row_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaks(b: Any) -> Tensor:
        rows = torch.stack(
            [
                contenders.two_lines(x[None], y[None])
                for x, y in zip(b.policy, b.reference, strict=True)
            ]
        )
        mean = (rows * b.counted).sum() / b.counted.sum()
        other = (rows * ~b.counted).sum()
        return mean + other - other.detach()

    case = dataclasses.replace(KL, masked=0.5, dtype="fp32")
    assert "gradient off by inf" in _plant(leaks, monkeypatch, case).wrong


def test_a_right_peer_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    other = _plant(_right, monkeypatch, KL)
    assert other.wrong == "" and other.seconds.median > 0 and other.ratio.median > 0


def test_what_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite_measure, "available_bytes", lambda device: 16 * 4096 * 12)
    assert suite_measure.fits(KL, "fusedkl cpu", "cpu")
    assert not suite_measure.fits(KL, "eager", "cpu")


def test_a_product_that_takes_minutes_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    case = dataclasses.replace(KL, operation="linear")
    names = ["fusedkl cpu", "eager", "eager, float32 products"]
    item = suite_plans.Item(case, ";".join(names[1:]))

    def entries() -> list[Any]:
        return list(suite_measure.times(item, QUICK, "cpu", lambda text: None))

    assert [entry.contender for entry in entries() if entry.seconds] == names
    assert [dict(entry.to_json())["skipped"] for entry in entries()] == ["", "", ""]
    monkeypatch.setattr(suite_measure, "LONGEST_CALL", 0.0)
    monkeypatch.setattr(suite_judge, "judge", lambda *arguments: pytest.fail("begun"))
    for entry in entries():
        assert entry.seconds is None and entry.skipped.startswith("not timed: about ")


# -- plans ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_plan_covers_what_it_should(device: str) -> None:
    items = suite_plans.plan(device, quick=False)
    cases = [item.case for item in items]
    named = {"llama3", "qwen3", "qwen3.5", "gemma3", "gpt-oss", "deepseek-v3", "kimi-k2", "glm-5"}
    assert named <= {case.model for case in cases}
    assert {"smollm2", "gemma3-270m"} <= {case.model for case in cases}
    assert {case.operation for case in cases} == set(suite_contenders.OPERATIONS)
    assert {case.masked for case in cases} == {0.0, 0.5, 0.9}
    assert {case.dtype for case in cases} == {"bf16", "fp16", "fp32"}
    assert {case.layout for case in cases} == {"contiguous", "sliced"}
    assert len({case.name for case in cases}) == len(cases)
    if device == "cuda":
        assert {256, 32768} <= {case.tokens for case in cases}
    for item in items:
        assert set(filter(None, item.only.split(";"))) <= set(suite_contenders.PEERS)
        assert all(item.chooses(name) for name in item.peaks), item
        assert item.case.vocabulary == suite_models.MODELS[item.case.model].vocabulary


# -- the memory model ----------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["forward_kl", "jsd", "token_stats", "linear"])
@pytest.mark.parametrize("name", ["eager", "row loop", "chunked, checkpoint"])
def test_the_small_engine_finds_autograds_gradients(operation: str, name: str) -> None:
    case = dataclasses.replace(KL, operation=operation, tokens=5)
    batch = suite_batch.build(case)
    loss = suite_contenders.PEERS[name](case).loss
    leaf = batch.policy.detach().requires_grad_()
    (expected,) = torch.autograd.grad(loss(batch._replace(policy=leaf)), leaf)
    found = suite_fake_memory.backward(loss(batch._replace(policy=leaf)))[id(leaf)]
    assert torch.equal(found, expected) and bool(found.any())


def test_allocations_are_counted_while_they_live() -> None:
    with suite_fake_memory.Allocations() as seen:
        a = torch.ones(1000)
        b = a + 1
        view = b[:10]
        assert seen.now == 8000
        del a, b
        assert seen.now == 4000  # the view keeps what it looks at
        del view
        c = torch.ones(500)
        assert (seen.now, seen.most) == (2000, 8000)
        del c


def test_bytes_on_a_gpu_without_one() -> None:
    """10 gradients for eager is also what VmHWM says of the same code on a CPU."""
    case = Case("memory model", "forward_kl", "gemma3-270m", 32768)
    logits = 32768 * 262144 * 2
    found = {
        contender.name: suite_fake_memory.count(contender, case) / logits
        for contender in suite_fake_memory.contenders(case)
    }
    assert found["eager"] == pytest.approx(10, abs=0.01)
    assert found["eager, no upcast"] == pytest.approx(5, abs=0.01)
    assert found["chunked, checkpoint"] < found["chunked"] < found["eager"]
    assert found["fusedkl triton"] == pytest.approx(1, abs=0.001)
    assert found["fusedkl triton inplace_grad"] < 0.001
