"""What our GPU kernels are compiled to, for GPUs that are not there: budgets, and how often."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles, which an interpreting process cannot", allow_module_level=True)

from bench_modules import capture, nvcc, sass, static, static_cases

CASES = {case.name: case for case in static_cases.ours()}
COUNTED = [(name, at) for name, case in CASES.items() for at in static.MACHINES if at >= case.since]
# Minutes of compiling.
FAMILY = {case.name for case in static_cases.cuda_family()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        pytest.param(name, at, marks=pytest.mark.full if at != 90 or name in FAMILY else ())
        for name, at in COUNTED
    ],
)
def test_budget(name: str, architecture: int) -> None:
    """What is known to miss its budget is held where it is, by name."""
    if name.startswith("CUDA") and nvcc.toolkit("bin/nvcc") is None:
        pytest.skip("no nvcc: install a toolkit, or the packages of `make cuda-tools`")
    (row,) = static.count([CASES[name]], architecture)
    assert not static.beyond(row)


def test_a_budget_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
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
    loop = sass.HotLoop(0, counts, sass.Counts(instructions=50), code)
    case = static_cases.Case("Triton forward_kl", lambda at: found, 4, 40, per_lane=2.0)
    found = static_cases.Found(64, 8, loop)
    (row,) = static.count([case], 90)
    assert row.issued == 7 / 0.5 + 2 * 50 / 2 and row.spills == 1
    assert len(static.beyond(row)) == 6
    missed = static.Missed(100.0, 0.5, "")
    monkeypatch.setitem(static.MISSED, (case.name, 90), missed)
    assert len(static.beyond(row)) == 4  # instructions and ceiling are let through, by name
    monkeypatch.setattr(static, "BUDGETS", {})
    clean = dataclasses.replace(row, spills=0, shuffles=0, float64=0, load_bits=(128,), barriers=0)
    assert static.beyond(clean) == [
        "Triton forward_kl on sm_90 is within its budget: take it out of MISSED"
    ]


def test_the_page_shows_what_was_counted() -> None:
    content = json.loads(static.RESULTS.read_text())
    assert static.section(content) in static.PAGE.read_text()


def committed() -> list[static.Row]:
    """Of the results' file, ours."""
    rows = static.rows_of(json.loads(static.RESULTS.read_text()))
    return [row for row in rows if row.kernel.startswith(("CUDA", "Triton"))]


def test_the_results_are_of_the_kernels_that_there_are() -> None:
    assert sorted((row.kernel, row.architecture) for row in committed()) == sorted(COUNTED)
    assert set(static.BUDGETS) <= set(CASES)
    assert set(static.MISSED) <= {(name, at) for name, at in COUNTED if name in static.BUDGETS}


def test_the_check_fails_beyond_a_budget(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the counts that are committed, and on the same with one instruction too many."""
    rows = committed()
    monkeypatch.setattr(static, "count", lambda cases: rows)
    assert static.main(["--check"]) == 0
    at = next(i for i, row in enumerate(rows) if row.kernel == "CUDA backward of forward_kl")
    for worse in ({"instructions": 20.0}, {"bytes_per_pair": 8.0}, {"load_bits": (16,)}):
        monkeypatch.setattr(
            static,
            "count",
            lambda cases, worse=worse: [
                dataclasses.replace(row, **worse) if i == at + 1 else row
                for i, row in enumerate(rows)
            ],
        )
        assert static.main(["--check"]) == 1, worse
    assert "CUDA backward of forward_kl on sm_90: loads of 16 bits" in capsys.readouterr().out


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


def test_a_trip_makes_the_stores_that_a_shorter_way_skips() -> None:
    text = """
.L_x_0:
        /*0000*/                   LDG.E.128 R4, [R2] ;
        /*0010*/               @P0 BRA `(.L_x_1) ;
        /*0020*/                   STG.E.128 [R6], R4 ;
.L_x_1:
        /*0030*/               @P1 BRA `(.L_x_2) ;
        /*0040*/                   STG.E.128 [R8], R4 ;
.L_x_2:
        /*0050*/               @P2 BRA `(.L_x_0) ;
        /*0060*/                   EXIT ;
"""
    (loop,) = sass.hot_loops(*sass.parse(text))
    assert loop.hot.stored == 32
    case = static_cases.Case("a gradient", lambda at: found, 4, 4, ideal=6)
    found = static_cases.Found(64, 0, sass.HotLoop(0, sass.Counts(loaded=16), loop.cold, []))
    with pytest.raises(ValueError, match="leaves out stores"):
        static.count([case], 90)


# One row alone; two rows; the tokens that are asked for of both; all of a policy's numbers.
ALONE = ["entropy", "logprob", "mean_logprob"]
TOKENS = ["forward_kl", "logprob", "ref_logprob", "log_ratio"]
EVERYTHING = ["reverse_kl", "entropy", "ref_entropy", "logsumexp", "ref_logsumexp", *TOKENS]
# The launches of a forward, and those of a backward to both sides.
PAIR, SINGLE = ["sweep_pair", "finish", "careful"], ["sweep_single", "finish"]
SECOND = ["sweep_family", "finish_family", "careful_family"]
BACKWARD = ["prepare", "gradients"]
OF_TOKENS = ["token_gradients", "store_tokens"]


@pytest.mark.parametrize(
    ("fields", "parameters", "forward", "backward"),
    [
        (["forward_kl"], (None,), PAIR, BACKWARD),
        (ALONE, (None,), SINGLE, BACKWARD + OF_TOKENS),
        pytest.param(TOKENS, (None,), PAIR, BACKWARD + 2 * OF_TOKENS, marks=pytest.mark.full),
        pytest.param(EVERYTHING, (None,), PAIR, BACKWARD + 2 * OF_TOKENS, marks=pytest.mark.full),
        pytest.param(["renyi"], (0.5, 2.0), PAIR + SECOND, BACKWARD, marks=pytest.mark.full),
    ],
    ids=["forward_kl", "alone", "tokens", "everything", "renyi"],
)
def test_one_compilation_serves_every_size_stride_temperature_and_mask(
    fields: list[str], parameters: tuple[float | None, ...], forward: list[str], backward: list[str]
) -> None:
    """And another one of the sweeps, for rows that do not all begin on 16 bytes."""
    from fusedkl.kernels import backend

    torch.use_deterministic_algorithms(False)  # nothing runs: filling is for nobody
    tokens = any("logprob" in name for name in fields)
    ids = torch.empty(3, 2, dtype=torch.int64) if tokens else None
    with capture.capture("cuda:90") as launches:
        for vocab in (1, 16, 1000, 50257, 128256):
            for step in (0, 1, 8):
                for per_row in (None, 1, 3):
                    x, y = torch.empty(2, 3, vocab + step, dtype=torch.bfloat16)[..., :vocab]
                    y = None if fields == ALONE else y
                    inverse = None
                    if per_row:
                        inverse = torch.empty(per_row, dtype=torch.float64)
                    mask = torch.empty(3, dtype=torch.bool) if per_row == 3 else None
                    for value in parameters:
                        given = (fields, value, inverse)
                        values, state = backend.row_stats(x, y, ids, *given, mask, None, None)
                        backend.row_stats_backward(
                            values, x, y, ids, state, *given, None, None, True, y is not None
                        )
    assert Counter(launch.name for launch in launches) == Counter(
        (forward + backward) * 5 * 3 * 3 * len(parameters)
    )
    compiled = Counter(name for name, _ in {(each.name, id(each.compiled)) for each in launches})
    sweeps = {"sweep_pair", "sweep_single", "sweep_family", "gradients"}
    # token_gradients is one kernel for the policy's logits and another one for the reference's
    twice = sweeps | ({"token_gradients"} if "ref_logprob" in fields else set())
    for name, count in compiled.items():
        assert count <= (2 if name in twice else 1), name
    for own in (PAIR, SINGLE, SECOND, BACKWARD):
        assert sum(compiled[name] for name in own) <= 4


@pytest.mark.full
@pytest.mark.parametrize("target", ["cuda:120", "hip:gfx942"])
def test_it_compiles_for_other_targets(target: str) -> None:
    with capture.capture(target) as launches:
        for _, call in static_cases.triton_calls().values():
            call()
        for call in static_cases.other_calls():
            call()
    for launch in launches:
        if target.startswith("cuda"):
            code = sass.Cubin(launch.cubin)
            _, stack = code.registers_and_stack(code.kernel(""))
            assert stack == 0
        else:
            assert ".vgpr_spill_count: 0" in launch.compiled.asm["amdgcn"].replace("  ", " ")
