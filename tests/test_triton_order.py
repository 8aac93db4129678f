"""Rows get the same bits at any alignment: what the compiled sweeps have to show for it.

An interpreter adds in the order of the source. A GPU adds what one lane holds first, and the loads
of aligned rows put other numbers into a lane than those of others; and a compiler that fuses
products and sums as it likes rounds one kernel otherwise than the next. So: sums across lanes are
only of one number per lane, in the lanes' order, and only what the source fuses is fused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles, which an interpreting process cannot", allow_module_level=True)

from bench_modules import capture

from fusedkl.kernels import backend

LAYOUT = re.compile(r"^(#\w+) = #ttg\.(\S.*)$", re.M)
REDUCTION = re.compile(
    r'"tt\.reduce"\(.*?\) <\{axis = (\d)[^}]*\}> \(\{(.*?)\}\) : \(tensor<(.*?), (#\w+)>\) ->', re.S
)
IN_ORDER = (
    "blocked<{sizePerThread = [1], threadsPerWarp = [32], warpsPerCTA = [1], order = [0]}>",
    "linear<{register = [], lane = [[1], [2], [4], [8], [16]], warp = [], block = []}>",
)
# the two rows of a half tile in one lane: a sum of two numbers has one order
TWO_ROWS = re.compile(r"blocked<\{sizePerThread = \[1, [14]\], threadsPerWarp = \[1, 32\]")


def sums(text: str) -> Iterator[tuple[str, str]]:
    """Shape and layout of the operands of float sums."""
    layouts = dict(LAYOUT.findall(text))
    for axis, body, shape, name in REDUCTION.findall(text):
        if "arith.addf" in body:
            yield f"{shape} over {axis}", layouts[name]


def bad(text: str, counts: int) -> list[str]:
    """Sums whose order a layout decides; `counts` of ones and zeros, which are exact, may be."""
    found = []
    for shape, layout in sums(text):
        if shape == "256xf32 over 0" and counts:
            counts -= 1
        elif shape == "32xf32 over 0":
            found += [] if layout in IN_ORDER else [f"{shape} in {layout}"]
        elif not (shape == "2x128xf32 over 0" and TWO_ROWS.match(layout)):
            found.append(f"{shape} in {layout}")
    return found


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a sanitizer has compiled into the shared cache is printed in another form."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


FIELDS = {
    "two divergences": (("forward_kl", "reverse_kl"), 0),
    # in each of two copies of a tile's code: how often the largest logit was found
    "divergence and entropy": (("forward_kl", "entropy"), 2),
    "one row": (("entropy",), 2),
}


@pytest.mark.parametrize("case", FIELDS)
@pytest.mark.parametrize(
    "offset",
    [pytest.param(0, marks=pytest.mark.full, id="aligned"), pytest.param(1, id="misaligned")],
)
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.full)], ids=str
)
@pytest.mark.slow
def test_sums_do_not_depend_on_loads(dtype: torch.dtype, case: str, offset: int) -> None:
    fields, counts = FIELDS[case]
    x, y = (torch.empty(2, 2048 + 8, dtype=dtype)[:, offset : offset + 2040] for _ in range(2))
    with capture.capture("cuda:90") as launches:
        backend.row_stats(x, y, None, list(fields), None, None, None, None, None)
    sweep = next(launch for launch in launches if launch.name.startswith("sweep"))
    text = sweep.compiled.asm["ttgir"]
    assert any(shape.startswith("32xf32") for shape, _ in sums(text))
    assert bad(text, counts) == []
    assert not re.search(r"\bf(mul|add|sub) (contract|fast|reassoc)", sweep.compiled.asm["llir"])
    assert not sweep.compiled.metadata.enable_fp_fusion


def test_a_layout_that_decides_is_seen() -> None:
    text = """
#a = #ttg.blocked<{sizePerThread = [4], threadsPerWarp = [32], warpsPerCTA = [1], order = [0]}>
#b = #ttg.blocked<{sizePerThread = [1], threadsPerWarp = [32], warpsPerCTA = [1], order = [0]}>
    %1 = "tt.reduce"(%0) <{axis = 0 : i32}> ({
      %3 = arith.addf %4, %5 : f32
    }) : (tensor<128xf32, #a>) -> f32
    %1 = "tt.reduce"(%0) <{axis = 0 : i32}> ({
      %3 = arith.addf %4, %5 : f32
    }) : (tensor<32xf32, #b>) -> f32
"""
    assert len(bad(text, 0)) == 1
    assert bad(text.replace("128xf32", "256xf32"), 1) == []
