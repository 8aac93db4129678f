"""The vocabulary-parallel step of docs/sharding.md, run; apart, as it is of the sources."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch.distributed as dist

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo"
    ),
]
ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "vocabulary_parallel.py"


def test_the_example() -> None:
    """Four processes with a quarter of the head each, against the whole head."""
    command = [sys.executable, str(EXAMPLE), "--steps", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, *_, last = (float(loss) for loss in done.stdout.split(","))
    assert last < first


def test_the_example_is_the_one_in_the_documentation() -> None:
    page = (ROOT / "docs" / "sharding.md").read_text()
    (pasted,) = re.findall(r"^```py\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    source = EXAMPLE.read_text()
    assert len(pasted) > 500
    for part in pasted.split("...\n"):
        assert part.strip("\n") in source or textwrap.indent(part.strip("\n"), " " * 8) in source
