"""What GPU kernels cost, counted in their machine code, for GPUs that are not there.

    python bench/static.py              our kernels, torch.compile's and liger-kernel's for sm_80,
                                        sm_90 and sm_100, as a table
    python bench/static.py --write      the same into bench/results/static.json and docs/gpu.md
    python bench/static.py --check      ours against the budgets; exit status 1 beyond one

Nothing here runs on a GPU. A ceiling is what the busiest pipe of the SM leaves of the memory
bandwidth if everything overlaps: an upper bound, never a measurement (docs/gpu.md).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import machine
import nvcc
import static_cases
from static_cases import Case, Found

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "bench" / "results" / "static.json", ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- static:begin -->\n", "<!-- static:end -->\n"
# What one warp pays for moving its centre is counted this many times.
CENTRES = 2


@dataclass(frozen=True)
class Machine:
    """A GPU's data sheet: SMs, clock it sustains (assumed), bandwidth, lanes per clock and SM."""

    name: str
    sms: int
    ghz: float
    tb_per_s: float
    fp32: int
    alu: int = 64
    special: int = 16
    memory: int = 32
    issue: int = 128


MACHINES = {
    80: Machine("A100", 108, 1.41, 2.04, 64),
    90: Machine("H100", 132, 1.70, 3.35, 128),
    100: Machine("B200", 148, 1.85, 8.0, 128),
}


@dataclass(frozen=True)
class Row:
    """The counts of one kernel on one architecture; those of the hot loop per pair of logits."""

    kernel: str
    architecture: int
    registers: int
    spills: int  # in the loop, or bytes of stack
    load_bits: tuple[int, ...]
    instructions: float
    fp32_lanes: float
    alu: float
    special: float
    memory: float
    shuffles: int
    barriers: int
    float64: int
    centring: float  # instructions per pair that moving the centre adds
    bytes_per_pair: float
    ideal: float

    @classmethod
    def of(cls, case: Case, architecture: int, found: Found) -> Row:
        hot = found.loop.hot
        pairs = hot.loaded / case.load_bytes
        moved = case.read_bytes + hot.stored / pairs
        if moved < case.ideal:
            raise ValueError(f"{case.name}, sm_{architecture}: the trip counted leaves out stores")
        return cls(
            case.name,
            architecture,
            found.registers,
            hot.spills or found.stack,
            tuple(sorted(hot.load_bits)),
            hot.instructions / pairs,
            hot.fp32_lanes / pairs,
            hot.alu / pairs,
            hot.special / pairs,
            hot.memory / pairs,
            hot.shuffles,
            hot.barriers,
            hot.float64,
            CENTRES * found.loop.cold.instructions / case.per_lane if case.per_lane else 0.0,
            moved,
            case.ideal,
        )

    @property
    def issued(self) -> float:
        return self.instructions + self.centring

    def ceiling(self) -> float:
        """Share of the memory bandwidth that the busiest pipe allows."""
        m = MACHINES[self.architecture]
        rate = m.tb_per_s * 1e3 / (m.sms * m.ghz) / self.bytes_per_pair  # pairs a clock and SM
        busy = (
            self.issued / m.issue,
            self.fp32_lanes / m.fp32,
            self.alu / m.alu,
            self.special / m.special,
            self.memory / m.memory,
        )
        return min(1.0, 1 / (rate * max(busy)))

    def cells(self) -> tuple[str, ...]:
        """A line of the table."""
        return (
            self.kernel,
            f"sm_{self.architecture}",
            str(self.registers),
            str(self.spills),
            "/".join(map(str, self.load_bits)),
            f"{self.instructions:.1f}",
            f"{self.issued:.1f}",
            f"{self.special:.2f}",
            f"{self.bytes_per_pair:g}",
            f"{100 * self.ceiling():.0f}%",
            f"{100 * self.ceiling() * self.ideal / self.bytes_per_pair:.0f}%",
        )


HEAD = (
    *("kernel", "target", "registers", "spills", "load bits", "instr/pair", "with centring"),
    *("special/pair", "bytes/pair", "ceiling", "of ideal bytes"),
)


@dataclass(frozen=True)
class Budget:
    """Per pair: most instructions, by architecture; least share of the bandwidth; most bytes."""

    instructions: dict[int, float]
    ceiling: dict[int, float]
    bytes: float = 4


_FORWARD_CEILING = {80: 0.95, 90: 0.95, 100: 0.85}
_BOTH = Budget({90: 35, 100: 24}, {})
_ENTROPY = Budget({90: 30}, {})
_BACKWARD = Budget({90: 19, 100: 15.5}, {}, 6)
BUDGETS = {
    "CUDA forward_kl": Budget({90: 28, 100: 19}, _FORWARD_CEILING),
    "CUDA forward_kl, V = 50257, rows misaligned alike": Budget({}, {80: 0.9, 90: 0.9, 100: 0.9}),
    "CUDA forward_kl, V = 50257, rows misaligned differently": Budget(
        {}, {80: 0.45, 90: 0.45, 100: 0.45}
    ),
    "CUDA both directions": _BOTH,
    "CUDA forward_kl and entropy": _ENTROPY,
    "CUDA token_stats, every field": Budget({}, {90: 0.7}),
    "CUDA backward of forward_kl": _BACKWARD,
    "CUDA forward_kl and its gradient, one launch": Budget({}, {}, 6),
    "CUDA jsd, differences within 1 nat": Budget({}, {90: 0.45}),
    "CUDA jsd, differences within 27 nats": Budget({}, {90: 0.45}),
    "CUDA jsd, the same, most of the mass on one token": Budget({}, {90: 0.45}),
    "CUDA jsd, any difference and beta": Budget({}, {90: 0.45}),
    "Triton forward_kl": Budget({90: 29, 100: 22}, _FORWARD_CEILING),
    "Triton forward_kl, V = 50257": Budget({}, {80: 0.9, 90: 0.9, 100: 0.9}),
    "Triton both directions": _BOTH,
    "Triton forward_kl and entropy": _ENTROPY,
    "Triton backward of forward_kl": _BACKWARD,
    "Triton token_stats": Budget({}, {90: 0.7}),
    # with the first sweep at full bandwidth, 45% of the 4 bytes that jsd needs
    "Triton jsd, second sweep": Budget({}, {90: 0.82}),
}


# Whose logits are loaded one by one, at any alignment.
ONE_BY_ONE = {"Triton forward_kl, V = 50257"}


@dataclass(frozen=True)
class Missed:
    """A budget that is not kept, where it stands instead, and why."""

    instructions: float
    ceiling: float
    why: str


MISSED: dict[tuple[str, int], Missed] = {
    ("CUDA forward_kl, V = 50257, rows misaligned alike", 100): Missed(
        25.5,
        0.68,
        "Putting chunks together from two vectors each costs 5 instructions per pair, also where "
        "rows are misaligned alike: aligned chunks behind a few first tokens would move the tiles, "
        "and with them a row's last bits, with its place in the batch.",
    ),
    ("Triton forward_kl, V = 50257", 100): Missed(
        28.5,
        0.6,
        "Rows that are misaligned alike could be read in vectors behind a few first tokens, but "
        "that moves the tiles, and with them a row's last bits, with its place in the batch. So "
        "logits are loaded one by one, 2 loads per pair and as much again for their addresses.",
    ),
    ("CUDA jsd, the same, most of the mass on one token", 90): Missed(
        90.0,
        0.37,
        "The sweep also adds up p - q, as exactly as the divergence: another polynomial per pair.",
    ),
    ("CUDA jsd, any difference and beta", 90): Missed(
        156.0,
        0.2,
        "Chunks with a token that only one row has, or none, or with a difference beyond 27 nats, "
        "and beta below 0.1 or above 0.9: two logarithms, two divisions and three exponentials.",
    ),
}


def violations(row: Row, budget: Budget) -> Iterator[str]:
    """What of a row of ours is beyond its budget, in words."""
    where = f"{row.kernel} on sm_{row.architecture}"
    if row.spills:
        yield f"{where}: {row.spills} spills, or bytes of stack"
    if row.float64:
        yield f"{where}: {row.float64} float64 instructions in the hot loop"
    if row.shuffles or row.barriers:
        yield f"{where}: {row.shuffles} shuffles, {row.barriers} barriers in the hot loop"
    if row.kernel not in ONE_BY_ONE and min(row.load_bits) < 128:
        yield f"{where}: loads of {min(row.load_bits)} bits"
    if row.bytes_per_pair > budget.bytes:
        yield f"{where}: {row.bytes_per_pair:g} bytes per pair, {budget.bytes:g} allowed"
    most = budget.instructions.get(row.architecture)
    if most is not None and round(row.issued, 2) > most:
        yield f"{where}: {row.issued:.1f} instructions per pair, {most:g} allowed"
    least = budget.ceiling.get(row.architecture)
    if least is not None and row.ceiling() < least:
        yield f"{where}: ceiling at {row.ceiling():.1%} of the bandwidth, {least:.0%} wanted"


def beyond(row: Row) -> list[str]:
    """What is wrong with a row of ours: its budget's, or where MISSED lets it stand, that one's."""
    budget = BUDGETS.get(row.kernel, Budget({}, {}, math.inf))
    missed = MISSED.get((row.kernel, row.architecture))
    if missed is None:
        return list(violations(row, budget))
    at = row.architecture
    if not any(violations(row, budget)):
        return [f"{row.kernel} on sm_{at} is within its budget: take it out of MISSED"]
    now = Budget({at: missed.instructions}, {at: missed.ceiling}, budget.bytes)
    return list(violations(row, now))


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = [HEAD, tuple("---" for _ in HEAD), *(row.cells() for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def count(cases: Iterable[Case], *architectures: int) -> list[Row]:
    """Compiles the cases, for all machines or for these, and reads their hot loops."""
    wanted = architectures or tuple(MACHINES)
    return [Row.of(case, at, case.find(at)) for case in cases for at in wanted if at >= case.since]


def _versions() -> dict[str, str]:
    names = ("torch", "triton", "liger-kernel")
    found = {name: metadata.version(name) for name in names}
    home = nvcc.toolkit("bin/nvcc")
    if home is not None:
        found["nvcc"] = nvcc.version(home)
    return found


def rows_of(content: dict[str, Any]) -> list[Row]:
    """Of a results' file."""
    return [Row(**{**entry, "load_bits": tuple(entry["load_bits"])}) for entry in content["rows"]]


def section(content: dict[str, Any]) -> str:
    """The Markdown between the marks of docs/gpu.md."""
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    missed = "\n".join(
        f"- {name} on sm_{at}: {missed.instructions:g} instructions per pair, ceiling "
        f"{missed.ceiling:.0%}. {missed.why}"
        for (name, at), missed in MISSED.items()
    )
    return (
        f"From `bench/results/static.json`, written by `{content['command']}` at commit "
        f"{content['commit']} on {content['date']} with {versions}.\n\n"
        f"{table(rows_of(content))}\n\nBudgets of `bench/static.py` that are not kept, and how "
        f"far they are let go:\n\n{missed}\n"
    )


def write(rows: list[Row]) -> None:
    """The results' file, and what docs/gpu.md shows of it."""
    content = {
        "command": "python bench/static.py --write",
        "commit": machine.commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": _versions(),
        "rows": [asdict(row) for row in rows],
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + section(content) + END + rest.split(END)[1])


def main(arguments: list[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="ours only, against the budgets")
    parser.add_argument("--write", action="store_true", help="into the results and docs/gpu.md")
    options = parser.parse_args(arguments)
    rows = count(static_cases.ours())
    if options.check:
        print(table(rows))
        for (name, at), missed in MISSED.items():
            print(f"not kept, by name: {name} on sm_{at}. {missed.why}")
        wrong = [text for row in rows for text in beyond(row)]
        print("\n".join(wrong) or "every other budget is kept")
        return 1 if wrong else 0
    rows += count([*static_cases.inductor(), *static_cases.liger()])
    print(table(rows))
    if options.write:
        write(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
