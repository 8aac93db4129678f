"""Vocabularies sharded over 2 and 4 real processes; the cases: sharding_*.py."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

TESTS = Path(__file__).resolve().parent
# Read, not imported: only the processes need what the cases import.
_FILES = ("cases", "families", "calls", "dtensors", "groups", "linear", "linear_calls", "megatron")
_SOURCES = [ast.parse((TESTS / f"sharding_{name}.py").read_text()) for name in _FILES]
CASES = [
    node.name
    for source in _SOURCES
    for node in source.body
    if isinstance(node, ast.FunctionDef)
    and any(isinstance(d, ast.Name) and d.id == "case" for d in node.decorator_list)
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo"
    ),
]
Found = dict[str, dict[int, dict[str, Any]]]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """world -> rank -> case -> what it found; all worlds from one start of the interpreter."""
    out = tmp_path_factory.mktemp("worlds")
    command = [sys.executable, str(TESTS / "sharding_worlds.py"), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: Found = {}
    for file in out.glob("*.json"):
        world, rank = file.stem.split(".")
        found.setdefault(world, {})[int(rank)] = json.loads(file.read_text())
    return found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_rank(ranks: int, name: str, worlds: Found) -> None:
    found = worlds[str(ranks)]
    assert sorted(found) == list(range(ranks))
    wrong = {
        rank: cases[name]["failed"] for rank, cases in found.items() if "failed" in cases[name]
    }
    assert not wrong, "\n".join(f"rank {rank}: {text}" for rank, text in wrong.items())


def test_a_dead_rank_is_an_error_and_no_hang(worlds: Found) -> None:
    found = worlds["dead"]
    assert sorted(found) == [0, 2]  # rank 1 ended before the call
    for cases in found.values():
        assert cases["alone"]["error"] == "RuntimeError" and cases["alone"]["seconds"] < 60


def test_a_rank_that_dies_later_is_an_error_and_no_hang(worlds: Found) -> None:
    found = worlds["dies"]
    assert sorted(found) == [0, 2]
    for cases in found.values():
        assert cases["dies"]["error"] == "RuntimeError" and cases["dies"]["seconds"] < 60


def test_a_call_that_only_one_rank_makes(worlds: Found) -> None:
    found = worlds["apart"]
    assert sorted(found) == [0, 1]
    for rank, cases in found.items():
        case = cases["apart"]
        assert case["error"] in ("ValueError", "RuntimeError") and case["seconds"] < 60
        # the one that waits for a collective learns what the other one came with
        assert "12" in case["said"] if rank == 0 else "rank 0" in case["said"]
