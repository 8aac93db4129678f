"""Starts worlds of processes that each hold a slice of a vocabulary, and writes what they found.

    python tests/sharding_worlds.py OUT [CASE ...]

imports torch once and forks: 2 and 4 ranks that run every case of sharding_cases, _families,
_findings, _calls, _dtensors, _groups, _linear, _linear_calls and _megatron.py, and worlds that go
wrong on purpose.
OUT/<world>.<rank>.json: the name of a case -> None or what went wrong.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sharding_calls
import sharding_cases
import sharding_dtensors  # noqa: F401 - its cases
import sharding_families
import sharding_findings  # noqa: F401
import sharding_groups  # noqa: F401
import sharding_linear  # noqa: F401
import sharding_linear_calls  # noqa: F401
import sharding_megatron  # noqa: F401
import sharding_tools
import torch
import torch.distributed as dist


def _rank(
    out: Path, world: str, rank: int, ranks: int, cases: dict[str, Callable[..., Any]], seconds: int
) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{out}/{world}.store",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=seconds),
    )
    found: dict[str, Any] = {}
    for name, case in cases.items():
        torch.manual_seed(0)
        begin = time.perf_counter()
        try:
            found[name] = case(dist.group.WORLD)
        except Exception:
            found[name] = {"failed": traceback.format_exc()}
        found[name] = {"seconds": time.perf_counter() - begin, **(found[name] or {})}
        if "failed" in found[name]:  # the ranks are no longer in step
            found |= {n: {"failed": f"after {name}"} for n in cases if n not in found}
        (out / f"{world}.{rank}.json").write_text(json.dumps(found))
        if "failed" in found[name]:
            return


def run(
    out: Path, world: str, ranks: int, cases: dict[str, Callable[..., Any]], seconds: int = 60
) -> None:
    """Fork the ranks of one world and wait for them."""
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            try:
                _rank(out, world, rank, ranks, cases, seconds)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


def main(out: Path) -> None:
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    sharding_cases.prepare()
    sharding_families.prepare()
    chosen = {n: c for n, c in sharding_tools.CASES.items() if len(sys.argv) < 3 or n in sys.argv}
    for ranks in (2, 4):
        run(out, str(ranks), ranks, chosen)
    if len(sys.argv) > 2:
        return
    run(out, "dead", 3, {"alone": sharding_calls.alone}, seconds=4)
    run(out, "dies", 3, {"dies": sharding_calls.dies}, seconds=20)
    run(out, "apart", 2, {"apart": sharding_calls.apart}, seconds=4)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
