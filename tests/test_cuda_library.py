"""The CUDA library as a whole, for every target, on a machine without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_modules import nvcc

pytestmark = pytest.mark.full

ROOT = Path(__file__).resolve().parent.parent
MOST_BYTES = 12 << 20
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


@pytest.mark.skipif(torch.version.cuda is None, reason="this PyTorch has no CUDA")
def test_it_links_loads_and_is_small(tmp_path: Path) -> None:
    if nvcc.toolkit("bin/nvcc", "include/cuda_runtime.h") is None:
        pytest.skip("no CUDA toolkit")
    environment = dict(os.environ, FUSEDKL_BUILD_CUDA="1")
    build = ["build_ext", "--build-lib", tmp_path, "--build-temp", ROOT / "build" / "cuda_library"]
    done = subprocess.run(
        [sys.executable, "setup.py", *map(str, build)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    (library,) = tmp_path.glob("fusedkl/_C_cuda*")
    size = library.stat().st_size
    print(f"{library.name}: {size / 2**20:.1f} MiB")
    assert size <= MOST_BYTES, f"{size / 2**20:.1f} MiB"
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", LOADS, library], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
