"""The CUDA kernels compiled for every target: no spills. What their loops issue: test_static.py."""

from __future__ import annotations

import re

import pytest
from bench_modules import nvcc

SOURCES = ("bf16", "f16", "f32", "mixed", "rows", "topk")
SOURCES += ("family_bf16", "family_f16", "family_f32", "family_any")
# Minutes each: one in `make test`, whose code test_static.py counts.
QUICK = ("bf16", "90a")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "target"),
    [
        pytest.param(s, t, marks=() if (s, t) == QUICK else pytest.mark.full)
        for s in SOURCES
        for t in nvcc.TARGETS
    ],
)
def test_no_kernel_spills(source: str, target: str) -> None:
    if nvcc.toolkit("bin/nvcc") is None:
        pytest.skip("no nvcc: install a toolkit, or the packages of `make cuda-tools`")
    _, log = nvcc.cubin(source, target)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", log)
    assert len(frames) >= (3 if source == "rows" else 6)  # of kernels, and what they call
    if source in ("rows", "topk"):  # one block per row, in double: not a hot loop
        assert all(int(stores) <= 200 for _, stores in frames), log
    else:
        assert all(frame == ("0", "0") for frame in frames), log
