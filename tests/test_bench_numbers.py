"""The benchmark's numbers: right ones are timed, wrong ones are not, and the truth is true."""

from __future__ import annotations

import io
import itertools
import math
from pathlib import Path

import pytest
import torch
from bench_modules import (
    cases,
    contenders,
    cpu_loops,
    families,
    goals,
    growth,
    jobs_io,
    limits,
    memory,
    oracle_f64,
    speed,
    timing,
)
from torch import Tensor

Result = goals.Result


@pytest.fixture(scope="module")
def problem() -> cases.Problem:
    return cases.make(cases.NARROW, 257, 40, "fp32")


# -- checked before they are timed ---------------------------------------------------


def _lines(stream: io.StringIO) -> list[Result]:
    said = [jobs_io.parse(line) for line in stream.getvalue().splitlines()]
    return [entry for entry in said if isinstance(entry, Result)]


def _half_right(policy: Tensor, reference: Tensor) -> Tensor:
    """The planted fault: the value is right, the gradient of the policy is doubled."""
    loss = contenders.two_lines(policy, reference)
    return 2 * loss - loss.detach()


def _wrong_value(policy: Tensor, reference: Tensor) -> Tensor:
    return contenders.two_lines(policy, reference) * 1.05


@pytest.mark.parametrize(
    ("loss", "backward", "said"),
    [(_wrong_value, False, "value"), (_half_right, True, "gradient of row")],
)
def test_a_wrong_contender_is_reported_and_not_timed(
    problem: cases.Problem,
    monkeypatch: pytest.MonkeyPatch,
    loss: contenders.Loss,
    backward: bool,
    said: str,
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("timed all the same")

    monkeypatch.setattr(timing, "compare", never)
    stream = io.StringIO()
    here = speed.Measurement(
        problem, speed.Settings(quick=True), jobs_io.Reporter("reference", stream)
    )
    planted = contenders.Contender("planted", loss)
    assert here.versus("forward_compile/fp32", contenders.EAGER, planted, backward) is None
    (result,) = _lines(stream)
    assert result.wrong.startswith(f"planted: {said}")
    assert result.value is None and goals.verdict(result, judged=False) == goals.WRONG


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_right_contenders_pass_the_check(dtype: str) -> None:
    here = cases.make(cases.NARROW, 257, 40, dtype)
    expected = here.expected_rows()
    everyone = (
        contenders.EAGER,
        contenders.ROW_LOOP,
        contenders.ours(dtype),
        contenders.ours_inplace(dtype),
    )
    for contender in everyone:
        before = here.policy.clone()
        assert contenders.check(contender, here, expected, backward=True) == ""
        assert torch.equal(here.policy, before)


def test_a_right_contender_is_timed(problem: cases.Problem) -> None:
    stream = io.StringIO()
    reporter = jobs_io.Reporter("avx512", stream)
    here = speed.Measurement(problem, speed.Settings(True, rounds=2, seconds=0.1), reporter)
    eager = contenders.EAGER
    assert here.versus("forward_eager/fp32", eager, contenders.ROW_LOOP, False, limit=1e-9)
    (result,) = _lines(stream)
    assert result.value is not None and result.value > 0 and not result.wrong
    assert result.isa == "avx512" and result.ceiling is not None and result.ceiling > result.value


def test_inplace_is_given_a_restored_policy_each_time(problem: cases.Problem) -> None:
    step = contenders.steps(contenders.ours_inplace("fp32"), problem, backward=True)
    assert not step.repeatable and step.before is not None
    grads = []
    for _ in range(2):
        step.before()
        grad = step.run()
        assert isinstance(grad, Tensor)
        grads.append(grad.clone())
    assert torch.equal(*grads) and float(grads[0].abs().sum()) > 0


# -- inputs and truth ----------------------------------------------------------------------------


def test_repeated_rows_keep_the_mean(problem: cases.Problem) -> None:
    rows = problem.expected_rows()
    assert len(rows) == cases.DISTINCT < problem.rows
    every = [
        float(oracle_f64.row(x, y).forward_kl)
        for x, y in zip(problem.policy, problem.reference, strict=True)
    ]
    assert problem.expected_mean(rows) == pytest.approx(sum(every) / problem.rows, rel=1e-12)


def test_sizes_exceed_the_cache_four_times() -> None:
    for dtype in cases.DTYPES.values():
        rows = cases.rows_for(128256, dtype, quick=False)
        size = 2 * rows * 128256 * dtype.itemsize
        assert size >= 4 * cases.last_level_cache_bytes() or size >= cases.memory_bytes() // 25


def test_truth_of_a_case_done_by_hand() -> None:
    """p = (1/4, 3/4), q = (1/2, 1/2)."""
    x = torch.tensor([0.0, math.log(3.0)], dtype=torch.float64)
    row = oracle_f64.row(x, torch.zeros(2, dtype=torch.float64))
    assert float(row.forward_kl) == pytest.approx(0.5 * math.log(4 / 3), rel=1e-14)
    reverse = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert float(row.reverse_kl) == pytest.approx(reverse, rel=1e-14)
    assert row.forward_gradient.tolist() == pytest.approx([-0.25, 0.25], rel=1e-14)
    slope = 0.25 * (math.log(0.5) - reverse)
    assert row.reverse_gradient.tolist() == pytest.approx([slope, -slope], rel=1e-13)


@pytest.mark.parametrize("size", [1e-6, 1e-3, 0.7, 30.0])
def test_truth_against_sixty_digits(size: float) -> None:
    mp = pytest.importorskip("mpmath")
    generator = torch.Generator().manual_seed(3)
    y = torch.randn(50, generator=generator, dtype=torch.float64) * 3
    x = y + size * torch.randn(50, generator=generator, dtype=torch.float64) + 1e3
    with mp.workdps(60):
        p, q = ([mp.e ** mp.mpf(v) for v in row.tolist()] for row in (x, y))
        p, q = ([e / mp.fsum(row) for e in row] for row in (p, q))
        forward = mp.fsum(b * mp.log(b / a) for a, b in zip(p, q, strict=True))
        reverse = mp.fsum(a * mp.log(a / b) for a, b in zip(p, q, strict=True))
        row = oracle_f64.row(x, y)
        assert abs(float(row.forward_kl) / float(forward) - 1) < 1e-8
        assert abs(float(row.reverse_kl) / float(reverse) - 1) < 1e-8


def test_truth_at_the_edge_of_the_support() -> None:
    y = torch.tensor([0.0, 1.0, 2.0])
    x = torch.tensor([0.0, -torch.inf, 2.0])
    only_reference, only_policy = oracle_f64.row(x, y), oracle_f64.row(y, x)
    assert float(only_reference.forward_kl) == math.inf
    assert float(only_policy.reverse_kl) == math.inf
    mass = 1 / (1 + math.e + math.e**2)
    kept = -math.log(1 - math.e * mass)
    assert float(only_reference.reverse_kl) == pytest.approx(kept, rel=1e-13)
    assert float(only_policy.forward_kl) == pytest.approx(kept, rel=1e-13)


def test_families_span_the_magnitudes() -> None:
    values = [
        float(oracle_f64.row(s.policy, s.reference).forward_kl) for s in families.scenarios(2048)
    ]
    finite = [v for v in values if 0 < v < math.inf]
    assert min(finite) < 1e-12 and max(finite) > 100 and math.inf in values
    for decade in range(-11, 2):
        assert any(10.0**decade <= v < 10.0 ** (decade + 1) for v in finite), decade


def test_growth_slices_cover_the_buffer_without_overlap() -> None:
    flat = torch.arange(1 << 20, dtype=torch.float32)
    for cell in growth.cells(flat, flat.clone(), (1024, 4096)):
        starts = [policy.data_ptr() for policy, _ in cell.slices]
        assert cell.pairs >= growth.LEAST_PAIRS
        gaps = [b - a for a, b in itertools.pairwise(starts)]
        assert all(gap == cell.pairs * 4 for gap in gaps)


def test_limit_probes_read_everything(problem: cases.Problem) -> None:
    even = cases.make(cases.NARROW, 256, 40, "bf16")
    name, step = limits.read_probe(even)
    assert name and step.run() is not None
    assert limits.bytes_read(even) == 2 * 256 * 40 * 2
    out = torch.zeros_like(even.policy)
    limits.write_probe(even, out)[1].run()
    bits = [t.view(-1).view(torch.int64) for t in (even.policy, even.reference, out)]
    assert torch.equal(bits[0] + bits[1], bits[2])


@pytest.mark.skipif(not memory.supported(), reason="needs Linux's clear_refs")
def test_high_water_mark_sees_a_freed_allocation() -> None:
    memory.settle()
    Path("/proc/self/clear_refs").write_text("5")
    before = memory.resident()
    torch.ones(32 << 20, dtype=torch.uint8)
    extra = memory.resident("VmHWM") - before
    assert 31 << 20 <= extra <= 40 << 20


# -- counted in machine code ---------------------------------------------------------

DISASSEMBLY = """
0000000000000000 <block(void const*)>:
   0:\tjmp    30 <block(void const*)+0x30>
   4:\tvfmadd213ps %zmm1,%zmm2,%zmm3
{more}
  20:\tprefetcht0 0x800(%rdi)
  24:\tadd    $0x20,%rax
  28:\tcmp    %rax,%rcx
  2c:\tjg     4 <block(void const*)+0x4>
  30:\tvmovups %zmm3,(%rdi)
  34:\tlea    -0x10(%rbp),%rsp
  38:\tret
  3c:\tjmp    30 <block(void const*)+0x30>
  40:\tjmp    2c <block(void const*)+0x2c>

0000000000000050 <other()>:
  50:\tret
"""


def test_the_loop_that_is_counted() -> None:
    def found(fused: int) -> list[cpu_loops.Instruction]:
        more = "\n".join(f"  {i:x}:\tvfnmadd231ps %zmm1,%zmm2,%zmm3" for i in range(5, 4 + fused))
        code = cpu_loops.functions(DISASSEMBLY.format(more=more))
        assert set(code) == {"block(void const*)", "other()"}
        return cpu_loops.main_loop(code["block(void const*)"])

    # neither the jump into the loop nor the one that goes back beyond the end of the function
    assert [hex(each.address) for each in found(8)[-4:]] == ["0x20", "0x24", "0x28", "0x2c"]
    assert len(found(8)) == 12 and len(found(9)) == 13
    assert found(7) == []  # too few multiply-adds for a sweep
