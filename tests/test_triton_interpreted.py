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
SUITE = (
    ("test_triton.py", "test_values.py", "test_offsets64.py"),
    ("test_edges.py", "test_gradients.py", "test_inplace_grad.py", "test_token_stats.py"),
    ("test_family.py", "test_controls.py", "test_topk.py"),
)


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
@pytest.mark.parametrize("files", SUITE, ids=["values", "gradients", "more"])
def test_a_sample_of_the_suite(files: tuple[str, ...]) -> None:
    run(files, "not full", 15 if "test_family.py" in files else 40)


@pytest.mark.full
@pytest.mark.parametrize("files", SUITE, ids=["values", "gradients", "more"])
def test_half_of_the_suite(files: tuple[str, ...]) -> None:
    run(files, "", 100 if "test_family.py" in files else 150)
