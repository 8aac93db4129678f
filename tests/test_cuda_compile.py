"""The CUDA kernels compiled for every target, and what their machine code must and must not hold.

Static: nothing here ran on a GPU. Counts are per pair of logits (bf16, the ordinary path of the hot
loop), with the cost of moving the anchor twice per warp added where a row is 128256 wide.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import cuda_on_cpu
import cuda_sass
import pytest

# Minutes of compiling: not in the default tier until its time has been measured.
pytestmark = pytest.mark.full

ROOT = cuda_on_cpu.ROOT
TARGETS = ("80", "90a", "100", "120")
SOURCES = ("bf16", "f16", "f32", "mixed", "rows")
# Counted once per pull request by `make test`; the others in `make test-full`.
QUICK = {("bf16", target) for target in TARGETS} | {("rows", "90a")}


@functools.cache
def compiled(source: str, target: str) -> tuple[Path, str]:
    """The cubin and what ptxas said; built once per content of csrc."""
    nvcc = cuda_on_cpu.nvcc()
    folder = ROOT / "build" / "cuda_static" / cuda_on_cpu.digest(ROOT / "csrc", [target])
    cubin, log = folder / f"{source}.{target}.cubin", folder / f"{source}.{target}.txt"
    if not log.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        done = cuda_on_cpu.run(
            [
                *(nvcc, "-O3", "-std=c++20", f"-arch=sm_{target}", "-cubin", "-Xptxas", "-v"),
                *("-Werror", "all-warnings", ROOT / "csrc" / "cuda" / f"{source}.cu", "-o", cubin),
            ]
        )
        log.write_text(done.stdout + done.stderr)
    return cubin, log.read_text()


@pytest.mark.parametrize(
    ("source", "target"),
    [
        pytest.param(s, t, marks=() if (s, t) in QUICK else pytest.mark.full)
        for s in SOURCES
        for t in TARGETS
    ],
)
def test_no_kernel_spills(source: str, target: str) -> None:
    _, log = compiled(source, target)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", log)
    assert len(frames) >= (3 if source == "rows" else 6)
    if source == "rows":  # one block per row, in double: not a hot loop
        assert all(int(stores) <= 200 for _, stores in frames), log
    else:
        assert all(frame == ("0", "0") for frame in frames), log


# kernel -> target -> most instructions per pair in the hot loop, and special-function operations.
# With two moves of the anchor at V = 128256, forward stays below 28, 19, both below 35, 24.
BUDGETS = {
    "forward_kl": ("forward_kernelILi0E", {"80": 25.0, "90a": 24.5, "100": 17.0}, 2),
    "both": ("forward_kernelILi1E", {"80": 31.0, "90a": 30.5, "100": 21.0}, 2),
    "forward_kl + entropy": ("forward_kernelILi2E", {"80": 27.0, "90a": 26.5, "100": 19.0}, 2),
    "gradient": ("gradient_kernelILb1E", {"80": 19.5, "90a": 19.0, "100": 15.6}, 2),
}


@pytest.mark.parametrize("target", ["80", "90a", "100"])
@pytest.mark.parametrize("kernel", BUDGETS)
def test_the_hot_loop_is_within_its_budget(kernel: str, target: str) -> None:
    name, most, special = BUDGETS[kernel]
    loop = cuda_sass.hot_loop(compiled("bf16", target)[0], name)
    assert loop.per_pair <= most[target], f"{loop}"
    assert loop.special / loop.pairs <= special + 0.1, f"{loop}"
    assert loop.narrow_loads == 0 and loop.pairs in (8, 16), f"{loop}: loads of 128 bits only"
    assert loop.count("SHFL") == loop.count("BAR") == loop.count("LDL") == loop.count("STL") == 0
    assert not any(op.startswith(("DADD", "DMUL", "DFMA")) for op in loop.ops)
