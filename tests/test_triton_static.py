"""What the Triton kernels are compiled to, for GPUs that are not there: budgets, and how often."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles, which an interpreting process cannot", allow_module_level=True)

from bench_modules import capture, sass, static

# Where a budget is missed, the most instructions per pair that are let through: no worse than now.
SHORT = {
    ("forward_kl", 100): 21.8,  # within its instructions; the ceiling misses by 3%
    ("both directions", 100): 25.2,
    ("forward_kl and entropy", 90): 31.3,
    ("backward of forward_kl", 100): 16.5,
}
TARGETS = [80, pytest.param(90, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.slow)]


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("case", static.cases(), ids=lambda case: case.name)
def test_budget(case: static.Case, architecture: int) -> None:
    row = static.count(case, architecture)
    beyond = list(static.violations(row))
    if (case.name, architecture) in SHORT:
        assert len(beyond) <= 1 and row.instructions <= SHORT[case.name, architecture]
    else:
        assert not beyond


def test_a_budget_can_fail() -> None:
    """Counted on code written for it: a spill, a narrow load, a shuffle, a float64 instruction."""
    lines = [
        "LDG.E R0",
        "LDG.E.128 R4",
        "LDL R1",
        "SHFL.BFLY R2",
        "DFMA R8",
        "FFMA2 R2",
        "MUFU.EX2",
    ]
    code = [sass.Instruction(*line.partition(" ")[::2], "") for line in lines]
    counts = sass.Counts.of(code)
    assert (counts.spills, counts.shuffles, counts.float64, counts.special) == (1, 1, 1, 1)
    assert counts.load_bits == {32, 128} and counts.loaded == 20 and counts.fp32_lanes == 2
    row = static.Row("forward_kl", 90, 64, 8, counts, 0.1, 0.0, 4)
    assert len(list(static.violations(row))) == 6


def test_loops_and_their_cold_blocks_are_told_apart() -> None:
    text = """
.L_x_0:
        /*0000*/                   LDG.E.128 R4, [R2] ;
        /*0010*/                   FADD R1, R4, R5 ;
        /*0020*/               @P0 BRA `(.L_x_1) ;
        /*0030*/                   SHFL.BFLY R1, R1 ;
        /*0040*/                   FADD R1, R4, R5 ;
.L_x_1:
        /*0050*/                   FMUL R1, R1, R1 ;
        /*0060*/               @P1 BRA `(.L_x_0) ;
        /*0070*/                   EXIT ;
"""
    (loop,) = sass.hot_loops(*sass.parse(text))
    assert [i.base for i in loop.code] == ["LDG", "FADD", "BRA", "FMUL", "BRA"]
    assert loop.cold.instructions == 2


def test_one_compilation_serves_every_size_stride_temperature_and_mask() -> None:
    from fusedkl.kernels import backend

    with capture.capture("cuda:90") as launches:
        for vocab in (1, 16, 1000, 50257, 128256):
            for step in (0, 1, 8):
                for per_row in (None, 1, 3):
                    x, y = torch.empty(2, 3, vocab + step, dtype=torch.bfloat16)[..., :vocab]
                    inverse = None
                    if per_row:
                        inverse = torch.empty(per_row, dtype=torch.float64)
                    mask = torch.empty(3, dtype=torch.bool) if per_row == 3 else None
                    backend.row_stats(x, y, None, ["forward_kl"], None, inverse, mask, None, None)
    assert len(launches) == 5 * 3 * 3 * 3
    assert len({id(launch.compiled) for launch in launches}) <= 4


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda:120", "hip:gfx942"])
def test_it_compiles_for_other_targets(target: str) -> None:
    with capture.capture(target) as launches:
        for case in static.cases():
            case.call()
    for launch in launches:
        if target.startswith("cuda"):
            assert sass.registers_and_stack(launch.cubin)[1] == 0
        else:
            assert ".vgpr_spill_count: 0" in launch.compiled.asm["amdgcn"].replace("  ", " ")
