"""The shared suite of values, gradients and edge cases, on interpreted Triton kernels.

A process of its own: where Triton interprets, it compiles nothing.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).resolve().parent
# By name: the files, and how many tests must have run in a sample and in the larger one.
SUITE = {
    "values": (("test_triton.py", "test_values.py", "test_offsets64.py"), 25, 80),
    "gradients": (
        (
            *("test_edges.py", "test_gradients.py", "test_inplace_grad.py", "test_token_stats.py"),
            "test_review_findings.py",
        ),
        *(20, 80),
    ),
    "more": (("test_family.py", "test_controls.py", "test_topk.py"), 8, 30),
    "losses": (
        (
            *("test_distillation.py", "test_reductions.py"),
            *("test_autograd.py::test_hessian_vector_products", "test_compile.py::test_opcheck"),
        ),
        *(8, 30),
    ),
}
# Of those, only in the larger sample: mostly autograd's and the compiler's own work.
MORE = {
    "losses": (
        "test_autograd.py",
        "test_compile.py::test_fullgraph_and_dynamic_without_recompiling",
    )
}


def run(files: tuple[str, ...], marks: str, least: int) -> None:
    """A pytest of these files; fails with its output, or if it ran fewer tests than `least`."""
    command = [sys.executable, "-I", "-m", "pytest", "-q", "-m", marks]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", *(str(HERE / name) for name in files)],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=HERE.parent,
    )
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) >= least, done.stdout


@pytest.mark.sample
@pytest.mark.slow
@pytest.mark.parametrize("name", SUITE)
def test_a_sample_of_the_suite(name: str) -> None:
    files, least, _ = SUITE[name]
    run(files, "not full", least)


@pytest.mark.full
@pytest.mark.parametrize("name", SUITE)
def test_a_fifth_of_the_suite(name: str) -> None:
    files, _, least = SUITE[name]
    run((*files, *MORE.get(name, ())), "", least)
