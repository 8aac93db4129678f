"""Bytes, collectives and times of sharded vocabularies: `python bench/sharding.py OUT.json`.

Runs 2 and 4 processes with gloo on this machine (a minute), and writes what they handed to the
collectives beside a model of 2 to 64 ranks. `python bench/page.py OUT.json` puts both into
docs/sharding.md.
"""

from __future__ import annotations

import datetime
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Explicit, so that it also works where PYTHONSAFEPATH keeps the script's folder off the path.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import machine
import torch
import torch.distributed as dist
from tabulate import tabulate
from torch.utils._python_dispatch import TorchDispatchMode

import fusedkl

RANKS = (2, 4)
TOKENS = (256, 1024)
VOCABULARY = 32768
# float32 numbers a token and rank, by collective: what fusedkl/shard_states.py packs.
NUMBERS = {
    "forward_kl": {"all_gather_into_tensor": 6},
    "jeffreys": {"all_gather_into_tensor": 8},
    "jsd": {"all_gather_into_tensor": 4, "all_reduce": 6},
}
MODEL = {"ranks": (2, 4, 8, 16, 32, 64), "vocabularies": (32768, 65536, 131072, 262144)}
# Stated, not measured: of a token's slice, of a link in one direction, of starting a collective.
ASSUMED = {
    "tokens": 8192,
    "bytes_per_logit": 2,
    "memory_GB_per_s": 3350,
    "link_GB_per_s_up_to_8_ranks": 450,
    "link_GB_per_s_beyond": 50,
    "latency_us_per_collective": 20,
}


class _Sent(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}
        self.buffer = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "_c10d_functional" and func._opname != "wait_tensor":
            sent = args[0].numel() * args[0].element_size()
            self.calls[func._opname] = self.calls.get(func._opname, 0) + sent
            self.buffer = max(self.buffer, out.numel() * out.element_size())
        return out


def _measured(kind: str, tokens: int, group: dist.ProcessGroup) -> dict[str, Any]:
    ranks = group.size()
    torch.manual_seed(group.rank())
    x, y = (torch.randn(tokens, VOCABULARY // ranks, requires_grad=i == 0) for i in range(2))
    with _Sent() as sent:
        fusedkl.divergence(x, y, kind, group=group).sum().backward()
    times: dict[str, list[float]] = {"forward_ms": [], "alone_ms": [], "backward_ms": []}

    def timed(name: str, run: Any) -> Any:
        dist.barrier()
        begin = time.perf_counter()
        out = run()
        times[name].append(1e3 * (time.perf_counter() - begin))
        return out

    for _ in range(7):
        x.grad = None
        timed("alone_ms", lambda: fusedkl.divergence(x.detach(), y, kind))
        value = timed("forward_ms", lambda: fusedkl.divergence(x, y, kind, group=group).sum())
        timed("backward_ms", value.backward)
    return {
        "kind": kind,
        "ranks": ranks,
        "tokens": tokens,
        "sent_bytes": sent.calls,
        "largest_buffer_bytes": sent.buffer,
        **{name: round(statistics.median(all_), 3) for name, all_ in times.items()},
    }


def _rank(folder: Path, rank: int, ranks: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/{ranks}.store",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=60),
    )
    group = dist.group.WORLD
    assert group is not None
    rows = [_measured(kind, tokens, group) for tokens in TOKENS for kind in NUMBERS]
    if rank == 0:
        (folder / f"{ranks}.json").write_text(json.dumps(rows))
    dist.barrier()


def measure() -> list[dict[str, Any]]:
    """What rank 0 of each world sent and how long it took."""
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for ranks in RANKS:
            children = []
            for rank in range(ranks):
                child = os.fork()
                if child == 0:
                    code = 1
                    try:
                        _rank(folder, rank, ranks)
                        code = 0
                    finally:
                        os._exit(code)
                children.append(child)
            failed = [child for child in children if os.waitpid(child, 0)[1]]
            if failed:
                raise RuntimeError(f"{len(failed)} of {ranks} processes failed")
            found += json.loads((folder / f"{ranks}.json").read_text())
    return found


def volume(numbers: dict[str, int], tokens: int, ranks: int) -> dict[str, float]:
    """What a rank sends and receives, its largest buffer, and its collectives; bytes."""
    payload = 4.0 * tokens * numbers["all_gather_into_tensor"]
    reduced = 4.0 * tokens * numbers.get("all_reduce", 0)
    share = (ranks - 1) / ranks
    if ranks <= fusedkl.distributed._GATHERED_BY:
        sent, received, held, calls = payload, payload * (ranks - 1), payload * ranks, 1
    else:  # rows exchanged, then what was merged of them gathered
        sent, received = payload * share + payload / ranks, 2 * payload * share
        held, calls = payload, 2
    # a ring: reduce-scatter and all-gather
    return {
        "sent": sent + 2 * reduced * share,
        "received": received + 2 * reduced * share,
        "held": max(held, reduced),
        "collectives": calls + bool(reduced),
    }


def model() -> list[dict[str, Any]]:
    """Products of NUMBERS and ASSUMED; nothing of it is measured."""
    rows = []
    for kind, numbers in NUMBERS.items():
        for ranks in MODEL["ranks"]:
            v = volume(numbers, int(ASSUMED["tokens"]), ranks)
            near = ranks <= 8
            link = ASSUMED["link_GB_per_s_up_to_8_ranks" if near else "link_GB_per_s_beyond"]
            wire = v["received"] / (link * 1e3)  # us
            start = v["collectives"] * ASSUMED["latency_us_per_collective"]
            read = {
                str(vocabulary): 2 * ASSUMED["tokens"] * ASSUMED["bytes_per_logit"]
                * vocabulary / ranks / (ASSUMED["memory_GB_per_s"] * 1e3)
                for vocabulary in MODEL["vocabularies"]
            }  # fmt: skip
            times = {"time_us": wire + start, "read_us": read}
            rows.append({"kind": kind, "ranks": ranks, **v, **times})
    return rows


def _table(rows: list[list[str]], columns: list[str]) -> str:
    return tabulate(rows, columns, tablefmt="github", disable_numparse=True)


def section(content: dict[str, Any]) -> str:
    """The tables for docs/sharding.md."""
    measured = [
        [
            *(str(r[name]) for name in ("kind", "ranks", "tokens")),
            " + ".join(f"{size:,}" for size in r["sent_bytes"].values()),
            f"{r['largest_buffer_bytes']:,}",
            *(f"{r[name]:.2f}" for name in ("alone_ms", "forward_ms", "backward_ms")),
        ]
        for r in content["sharding"]
    ]
    columns = ["kind", "processes", "tokens", "bytes sent by a rank", "largest buffer, bytes"]
    columns += ["its slice alone, ms", "forward, ms", "backward, ms"]
    vocabularies = list(content["model"][0]["read_us"])
    modelled = [
        [
            *(str(r[name]) for name in ("kind", "ranks", "collectives")),
            *(f"{r[name] / 2**20:.2f}" for name in ("sent", "received", "held")),
            f"{r['time_us']:.0f}",
            *(f"{r['read_us'][v]:.0f}" for v in vocabularies),
        ]
        for r in content["model"]
    ]
    assumed = content["assumed"]
    names = ["kind", "ranks", "collectives", "sent, MiB", "received, MiB", "largest buffer, MiB"]
    names += ["collectives, µs", *(f"reading, V = {v}, µs" for v in vocabularies)]
    return (
        f"Measured, with gloo over the loopback of that machine, float32 logits, V = "
        f"{content['vocabulary']}, one thread a process:\n\n{_table(measured, columns)}\n\n"
        f"Modelled, not measured: {assumed['tokens']} tokens; a link of "
        f"{assumed['link_GB_per_s_up_to_8_ranks']} GB/s in one direction up to 8 ranks and of "
        f"{assumed['link_GB_per_s_beyond']} GB/s beyond, and "
        f"{assumed['latency_us_per_collective']} µs to start a collective; reading: a rank's "
        f"slices of {assumed['bytes_per_logit']}-byte logits, once, at "
        f"{assumed['memory_GB_per_s']} GB/s. These are assumptions about a GPU, and none was "
        f"used.\n\n{_table(modelled, names)}\n"
    )


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    out = Path(arguments[0])
    content = {
        "schema": 1,
        "suite": "sharding",
        "command": f"python bench/sharding.py {out}",
        "commit": machine.commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "isa": machine.instruction_set(),
        "versions": machine.versions(),
        "vocabulary": VOCABULARY,
        "assumed": ASSUMED,
        "sharding": measure(),
        "model": model(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
