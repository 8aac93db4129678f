"""What GPU kernels cost, counted in their machine code; `--check` holds ours to their budgets.

    python bench/static.py              our kernels, Inductor's for the same two lines, and
                                        liger-kernel's, for sm_80, sm_90 and sm_100, as a table
    python bench/static.py --check      ours against the budgets; exit status 1 beyond one

Nothing here runs on a GPU. A ceiling is what the busiest pipe of the SM leaves of the memory
bandwidth if everything overlaps: an upper bound, never a measurement (docs/gpu.md).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import capture
import sass
import torch

V = 128256
# What one warp pays for moving its centre is counted this many times per program.
CENTRES = 2


@dataclass(frozen=True)
class Machine:
    """A GPU's data sheet: SMs, clock that it sustains (assumed), bandwidth, lanes per clock per SM."""

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
    """The counts of one kernel on one architecture, per pair of logits."""

    kernel: str
    architecture: int
    registers: int
    stack: int
    hot: sass.Counts
    pairs: float  # of one thread, on one trip through the hot loop
    centring: float  # instructions per pair that moving the centre adds
    bytes_per_pair: float

    @property
    def instructions(self) -> float:
        return self.hot.instructions / self.pairs + self.centring

    @property
    def special(self) -> float:
        return self.hot.special / self.pairs

    def ceiling(self) -> float:
        """Share of the memory bandwidth that the busiest pipe allows."""
        m = MACHINES[self.architecture]
        rate = m.tb_per_s * 1e3 / (m.sms * m.ghz) / self.bytes_per_pair  # pairs a clock and SM
        busy = (
            self.instructions / m.issue,
            self.hot.fp32_lanes / self.pairs / m.fp32,
            self.hot.alu / self.pairs / m.alu,
            self.special / m.special,
            self.hot.memory / self.pairs / m.memory,
        )
        return min(1.0, 1 / (rate * max(busy)))

    def cells(self) -> list[str]:
        """A line of the table."""
        bits = "/".join(str(b) for b in sorted(self.hot.load_bits))
        return [
            self.kernel,
            f"sm_{self.architecture}",
            str(self.registers),
            str(self.hot.spills or self.stack),
            bits,
            f"{self.instructions:.1f}",
            f"{self.special:.2f}",
            f"{self.bytes_per_pair:g}",
            f"{100 * self.ceiling():.0f}%",
        ]


HEAD = ("kernel", "target", "registers", "spills", "load bits", "instr/pair", "special/pair")
HEAD += ("bytes/pair", "ceiling")


@dataclass(frozen=True)
class Case:
    """A call whose hot kernel is counted."""

    name: str
    kernel: str  # the launch to look at
    call: Callable[[], object]
    bytes_per_pair: float
    load_bytes: float = 4.0  # that the hot loop reads for one pair
    centred: bool = True


def _rows(dtype: torch.dtype, vocab: int = V) -> torch.Tensor:
    return torch.empty(4, vocab, dtype=dtype)


def _forward(fields: tuple[str, ...], vocab: int = V) -> Callable[[], object]:
    from fusedkl.kernels import backend

    x, y = _rows(torch.bfloat16, vocab), _rows(torch.bfloat16, vocab)
    return lambda: backend.row_stats(x, y, None, list(fields), None, None)


def _backward(fields: tuple[str, ...], both: bool = False) -> Callable[[], object]:
    from fusedkl.kernels import backend

    x, y = _rows(torch.bfloat16), _rows(torch.bfloat16)
    state = torch.empty(4, backend.STATE_COLUMNS.value, dtype=torch.float64)
    grad = torch.empty(len(fields), 4)
    return lambda: backend.row_stats_backward(
        grad, x, y, None, state, list(fields), None, True, both
    )


def cases() -> list[Case]:
    """Ours."""
    one, two = ("forward_kl",), ("forward_kl", "reverse_kl")
    return [
        Case("forward_kl", "sweep_pair", _forward(one), 4),
        Case("forward_kl, V = 50257", "sweep_pair", _forward(one, 50257), 4),
        Case("both directions", "sweep_pair", _forward(two), 4),
        Case("forward_kl and entropy", "sweep_pair", _forward((*one, "entropy")), 4),
        Case("backward of forward_kl", "gradients", _backward(one), 6, centred=False),
        Case("backward of both, to both", "gradients", _backward(two, True), 8, centred=False),
    ]


def count(case: Case, architecture: int) -> Row:
    """Compiles the case and reads its hot loop."""
    with capture.capture(f"cuda:{architecture}") as launches:
        case.call()
    launch = next(found for found in launches if found.name == case.kernel)
    registers, stack = sass.registers_and_stack(launch.cubin)
    hot = sass.hot_loops(*sass.disassemble(launch.cubin))[0]
    pairs = hot.hot.loaded / case.load_bytes
    centring = 0.0
    if case.centred:
        from fusedkl.kernels.launch import choose

        segment = choose(V, (torch.bfloat16, torch.bfloat16), architecture).segment
        centring = CENTRES * hot.cold.instructions / (segment / 32)
    return Row(
        case.name, architecture, registers, stack, hot.hot, pairs, centring, case.bytes_per_pair
    )


@dataclass(frozen=True)
class Budget:
    """Most instructions per pair, by architecture, and the least share of the bandwidth."""

    instructions: dict[int, float]
    ceiling: dict[int, float]


FORWARD_CEILING = {80: 0.95, 90: 0.95, 100: 0.85}
BUDGETS = {
    "forward_kl": Budget({90: 29, 100: 22}, FORWARD_CEILING),
    "forward_kl, V = 50257": Budget({}, {80: 0.9, 90: 0.9, 100: 0.45}),
    "both directions": Budget({90: 35, 100: 24}, {}),
    "forward_kl and entropy": Budget({90: 30}, {}),
    "backward of forward_kl": Budget({90: 19, 100: 15.5}, {}),
}


def violations(row: Row) -> Iterator[str]:
    """What of a row of ours is beyond its budget, in words."""
    where = f"{row.kernel} on sm_{row.architecture}"
    if row.hot.spills or row.stack:
        yield f"{where}: {row.hot.spills} spills in the loop, {row.stack} bytes of stack"
    if row.hot.float64:
        yield f"{where}: {row.hot.float64} float64 instructions in the hot loop"
    if row.hot.shuffles or row.hot.barriers:
        yield f"{where}: {row.hot.shuffles} shuffles, {row.hot.barriers} barriers in the hot loop"
    if "50257" not in row.kernel and min(row.hot.load_bits) < 128:
        yield f"{where}: loads of {min(row.hot.load_bits)} bits"
    budget = BUDGETS.get(row.kernel, Budget({}, {}))
    most = budget.instructions.get(row.architecture)
    if most is not None and row.instructions > most:
        yield f"{where}: {row.instructions:.1f} instructions per pair, {most:g} allowed"
    least = budget.ceiling.get(row.architecture)
    if least is not None and row.ceiling() < least:
        yield f"{where}: ceiling at {row.ceiling():.0%} of the bandwidth, {least:.0%} wanted"


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = [HEAD, tuple("---" for _ in HEAD), *(tuple(row.cells()) for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="ours only, against the budgets")
    options = parser.parse_args()
    rows = [count(case, architecture) for case in cases() for architecture in MACHINES]
    if not options.check:
        import static_peers

        rows += [static_peers.count(peer, a) for peer in static_peers.cases() for a in MACHINES]
        print(table(rows))
        return 0
    print(table(rows))
    beyond = [text for row in rows for text in violations(row)]
    print("\n".join(beyond) or "every budget is kept")
    return 1 if beyond else 0


if __name__ == "__main__":
    sys.exit(main())
