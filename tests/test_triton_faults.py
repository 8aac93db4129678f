"""The checks of the Triton kernels can fail: faults planted in a copy of them are found.

By the interpreter's values, or by ttsem, which runs Triton's intermediate code on a CPU and stops
at an access out of bounds, at two programs that touch one place of which one writes, and at memory
that nobody wrote.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parent / "kernels"


def check(
    folder: Path, cache: Path, sanitized: bool, scope: str = "all"
) -> subprocess.CompletedProcess[str]:
    script = str(HERE / "triton_check.py")
    command = [sys.executable, script, str(folder)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(HERE),
        # What it compiles stays out of the user's cache: it prints kernels in a form of its own.
        "TRITON_CACHE_DIR": str(cache),
    }
    environment.pop("TRITON_INTERPRET", None)
    if sanitized:
        if importlib.util.find_spec("ttsem") is None:
            pytest.skip("the sanitizer ttsem is not installed: `make test` does it")
        command = [sys.executable, "-m", "ttsem.sanitize", script, "--", scope, str(folder)]
    else:
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200)


@pytest.mark.full
@pytest.mark.parametrize("sanitized", [False, True], ids=["interpreter", "ttsem"])
def test_nothing_to_report(tmp_path: Path, sanitized: bool) -> None:
    shutil.copytree(KERNELS, tmp_path / "copied")
    done = check(tmp_path / "copied", tmp_path / "cache", sanitized)
    assert done.returncode == 0 and done.stdout.count(" ok") == 4, done.stdout + done.stderr


# what is planted -> (file, text, what replaces it, whether ttsem must find it, what is said)
FAULTS = {
    "a token too many": (
        "layout.py",
        'tl.where(offsets < end, found, float("-inf"))',
        'tl.where(offsets <= end, found, float("-inf"))',
        False,
        "WRONG",
    ),
    "a load beyond the row": (
        "layout.py",
        "mask=offsets < end",
        "mask=offsets <= end",
        True,
        "past the end",
    ),
    "a tile too many": (
        "sweep.py",
        "whole = size // (2 * HALF) * (2 * HALF)",
        "whole = (size // (2 * HALF) + 1) * (2 * HALF)",
        True,
        "past the end",
    ),
    "a centre that moved without its sums": (
        "sweep.py",
        "a = f * moved",
        "a = f * a",
        False,
        "WRONG",
    ),
    "weights that stay where the anchor was": (
        "sweep.py",
        "            s = f * kept_s\n",
        "            s = kept_s\n",
        False,
        "WRONG",
    ),
    "a wrong merge": (
        "formulas.py",
        "_kl_of_shares(pb, qb, bf, bps, bqs, lb)",
        "_kl_of_shares(pb, qa, bf, bps, bqs, lb)",
        False,
        "WRONG",
    ),
    "segments that write to one place": (
        "sweep.py",
        "out = parts + part * COLUMNS * n + row",
        "out = parts + row",
        True,
        "race",
    ),
}


def plant(tmp_path: Path, file: str, text: str, instead: str) -> Path:
    folder = tmp_path / "planted"
    shutil.copytree(KERNELS, folder)
    source = (folder / file).read_text()
    assert source.count(text) == 1, "the text that the fault replaces is no longer there"
    (folder / file).write_text(source.replace(text, instead))
    return folder


@pytest.mark.full
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(tmp_path: Path, fault: str) -> None:
    file, text, instead, sanitized, says = FAULTS[fault]
    done = check(plant(tmp_path, file, text, instead), tmp_path / "cache", sanitized)
    assert done.returncode != 0 and says in done.stdout + done.stderr, done.stdout + done.stderr


@pytest.mark.sample
@pytest.mark.slow
def test_a_sample_is_clean_and_its_race_is_found(tmp_path: Path) -> None:
    """The sanitizer on two short rows; then where both rows leave their sums in one place."""
    clean = check(KERNELS, tmp_path / "cache", sanitized=True, scope="some")
    said = clean.stdout + clean.stderr
    # no launch was too large to be looked at for races
    assert clean.returncode == 0 and " ok" in said and "too large" not in said, said
    out = "out = parts + part * COLUMNS * n"
    folder = plant(tmp_path, "sweep.py", out + " + row", out)
    done = check(folder, tmp_path / "cache", sanitized=True, scope="some")
    assert done.returncode != 0 and "race: " in done.stdout, done.stdout + done.stderr
