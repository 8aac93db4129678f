"""The CPU kernels under AddressSanitizer, called by the fuzzer.

The library is built once more, into a copy of the package that comes before the installed one. A
tensor that claims more logits than its memory has is a fault that the check must see.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import building
import pytest

CXX = shutil.which(os.environ.get("CXX", "g++"))
PLANTED = """
import numpy, torch, fusedkl
memory = numpy.zeros(64 * 100, numpy.float32)
claims = numpy.lib.stride_tricks.as_strided(memory, (64, 101), (404, 4))
fusedkl.forward_kl(torch.from_numpy(claims), torch.zeros(64, 101))
"""

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(CXX is None, reason="no C++ compiler"),
    pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD is Linux's"),
]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One in which `import fusedkl` finds the sanitized library."""
    tree = building.checkout(tmp_path_factory.mktemp("sanitized"))
    building.run(
        sys.executable, "setup.py", "build", "--build-lib", "sanitized", cwd=tree,
        FUSEDKL_SANITIZE="1", FUSEDKL_DEBUG="1", FUSEDKL_BUILD_CUDA="0",
    )  # fmt: skip
    # the runtime comes first, and with it the library whose exceptions it watches
    assert CXX is not None
    preloaded = [
        subprocess.check_output([CXX, f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    return dict(
        os.environ,
        PYTHONPATH=str(tree / "sanitized"),
        LD_PRELOAD=" ".join(preloaded),
        ASAN_OPTIONS="detect_leaks=0",  # Python's own, at its end
        PYTHONMALLOC="malloc",
        OMP_NUM_THREADS="2",
    )


def call(environment: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        env=environment, cwd=building.ROOT / "tests", capture_output=True, text=True, timeout=900,
    )  # fmt: skip


def test_a_planted_overrun_is_seen(environment: dict[str, str]) -> None:
    done = call(environment, "-c", PLANTED)
    assert done.returncode != 0
    # "unknown-crash": a vector that begins inside of the memory and ends beyond it
    report = r"AddressSanitizer: (heap-buffer-overflow|unknown-crash).*\nREAD of size"
    assert re.search(report, done.stderr) and "csrc/cpu" in done.stderr, done.stderr


@pytest.mark.parametrize("isa", ["best", "portable"])
def test_nothing_to_report(environment: dict[str, str], isa: str) -> None:
    of = {} if isa == "best" else {"FUSEDKL_CPU_ISA": isa}
    done = call(environment | of, "fuzz.py", "--seconds", "30", "--seed", "0")
    assert done.returncode == 0 and "nothing found" in done.stdout, done.stdout + done.stderr
    where = call(environment | of, "-c", "import fusedkl; print(fusedkl.__file__)")
    assert where.stdout.startswith(environment["PYTHONPATH"]), where.stdout + where.stderr
