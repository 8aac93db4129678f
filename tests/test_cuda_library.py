"""The CUDA library as a whole, for every target, on a machine without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_modules import cuda_library, nvcc

# Loads the library beside the package that is there, and asks what it has.
LOADS = """
import sys, torch, fusedkl
from fusedkl import _library, topk_ops
torch.ops.load_library(sys.argv[1])
names = [*_library.OPERATORS, *topk_ops.ARGUMENTS]
lacking = [name for name in names if not _library.has_kernel(f"_{name}", "CUDA")]
assert not lacking, lacking
x = torch.randn(2, 9)
assert float(fusedkl.forward_kl(x, x).sum()) == 0
"""


@pytest.mark.full
@pytest.mark.skipif(torch.version.cuda is None, reason="this PyTorch has no CUDA")
def test_it_links_loads_and_is_small(tmp_path: Path) -> None:
    if nvcc.toolkit("bin/nvcc", "include/cuda_runtime.h") is None:
        pytest.skip("no CUDA toolkit")
    library = cuda_library.build(tmp_path)
    size = library.stat().st_size
    assert size <= cuda_library.MOST_BYTES, f"{size / 2**20:.1f} MiB"
    for_code = [f"sm_{target}" for target in nvcc.TARGETS]
    assert cuda_library.targets(library) == {"machine code": for_code, "PTX": for_code[-1:]}
    done = subprocess.run(
        [sys.executable, "-c", LOADS, library],
        env={**os.environ, "PYTHONPATH": str(cuda_library.ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_the_page_shows_the_library_that_was_built() -> None:
    content = json.loads(cuda_library.RESULTS.read_text())
    assert cuda_library.section(content) in cuda_library.PAGE.read_text()
    assert content["bytes"] <= cuda_library.MOST_BYTES
