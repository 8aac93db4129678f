"""Reads the machine code of a compiled kernel: registers, spills, and what its hot loop issues.

The hot path of a loop is the longest way from its head to its back edge that avoids cold blocks. A
block is cold if it shuffles: the sweeps reduce across a warp only where they move their centre.
Uses cuobjdump and nvdisasm as they come with Triton. Nothing here needs a driver.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
PACKED = {"FFMA2", "FADD2", "FMUL2"}  # one issue slot, two lanes of the fp32 pipe
FMA = {"FFMA", "FADD", "FMUL", "HFMA2", "HADD2", "HMUL2", "FHADD", "FHFMA"} | PACKED
LOADS = {"LDG", "LDGSTS"}
MEMORY = LOADS | {"STG", "LDS", "STS", "LDL", "STL", "SHFL", "REDUX", "CREDUX", "ATOMG"}
SPILLS = {"LDL", "STL"}
BARRIERS = {"BAR", "SYNCS"}
SHUFFLES = {"SHFL"}
SPECIAL = {"MUFU", "F2F", "F2I", "I2F"}
# The scalar datapath and control flow: they take an issue slot and none of the pipes counted here.
CONTROL = re.compile(
    r"U[A-Z0-9]+|R2UR|S2UR|S2R|CS2R|LDC|LDCU|NOP|BRA|EXIT|BSYNC|BSSY|WARPSYNC|VOTE"
)

_INSTRUCTION = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*[A-Za-z0-9_.]*)\s*(.*?)\s*;"
)
_LABEL = re.compile(r"^\s*(\.L_x?_?\w+):")
_TARGET = re.compile(r"\.L_x?_?\w+")


@dataclass(frozen=True)
class Instruction:
    """One line of a disassembly."""

    op: str  # with its suffixes
    arguments: str
    predicate: str

    @property
    def base(self) -> str:
        return self.op.split(".")[0]

    @property
    def bytes(self) -> int:
        """Of one thread's access to memory."""
        for suffix in self.op.split(".")[1:]:
            if suffix in WIDTHS:
                return WIDTHS[suffix]
        return 4


@dataclass
class Counts:
    """What one thread issues on one trip through a piece of code."""

    instructions: int = 0
    fp32_lanes: int = 0
    alu: int = 0
    special: int = 0
    memory: int = 0
    shuffles: int = 0
    barriers: int = 0
    spills: int = 0
    float64: int = 0
    loaded: int = 0
    stored: int = 0
    load_bits: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, code: list[Instruction]) -> Counts:
        c = cls(instructions=len(code))
        for i in code:
            base = i.base
            c.shuffles += base in SHUFFLES
            c.barriers += base in BARRIERS
            c.spills += base in SPILLS
            c.float64 += base in {"DADD", "DMUL", "DFMA", "DSETP"} or i.op.endswith(".F64")
            if base in LOADS:
                c.loaded += i.bytes
                c.load_bits.add(8 * i.bytes)
            if base == "STG":
                c.stored += i.bytes
            if base in SPECIAL:
                c.special += 1
            elif base in MEMORY:
                c.memory += 1
            elif base in FMA or base == "IMAD":
                c.fp32_lanes += 2 if base in PACKED else 1
            elif not CONTROL.fullmatch(base):
                c.alu += 1
        return c


def tool(name: str) -> str:
    """The path of a disassembler inside the Triton wheel."""
    import triton

    found = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not found.is_file():
        raise FileNotFoundError(f"this Triton has no {name}")
    return str(found)


def _run(name: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool(name), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def registers_and_stack(cubin: bytes) -> tuple[int, int]:
    """Of the one kernel of a cubin: registers per thread, bytes of stack per thread."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", _run("cuobjdump", "--dump-resource-usage", cubin))
    assert found is not None
    return int(found.group(1)), int(found.group(2))


def parse(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions, and the index that each label stands for."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label.group(1)] = len(code)
        elif found := _INSTRUCTION.search(line):
            code.append(Instruction(found.group(3), found.group(4), found.group(2) or ""))
    return code, labels


def disassemble(cubin: bytes) -> tuple[list[Instruction], dict[str, int]]:
    """`parse` of the cubin's machine code."""
    return parse(_run("nvdisasm", "-c", cubin))


def _target(i: Instruction, labels: dict[str, int]) -> int | None:
    found = _TARGET.search(i.arguments) if i.base == "BRA" else None
    return labels.get(found.group(0)) if found else None


def loops(code: list[Instruction], labels: dict[str, int]) -> list[tuple[int, int]]:
    """(head, back edge) of every loop, innermost ones only."""
    found = set()
    for at, i in enumerate(code):
        head = _target(i, labels)
        if head is not None and head < at:
            found.add((head, at))
    return sorted(
        a for a in found if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in found)
    )


def _blocks(
    code: list[Instruction], labels: dict[str, int], head: int, back: int
) -> dict[int, tuple[int, list[int]]]:
    """First instruction of each basic block of a loop -> (its last one, where it may go)."""
    leaders = {head}
    for at in range(head, back + 1):
        if code[at].base in ("BRA", "EXIT"):
            leaders.add(at + 1)
            target = _target(code[at], labels)
            if target is not None:
                leaders.add(target)
    inside = sorted(at for at in leaders if head <= at <= back)
    found = {}
    for k, first in enumerate(inside):
        last = inside[k + 1] - 1 if k + 1 < len(inside) else back
        end = code[last]
        target = _target(end, labels)
        leaves = [] if target is None else [target]
        conditional = end.predicate or re.search(r"\bU?P\d", end.arguments)
        if (target is None and end.base != "EXIT") or conditional:
            leaves.append(last + 1)
        found[first] = (last, leaves)
    return found


def paths(
    code: list[Instruction], labels: dict[str, int], head: int, back: int
) -> tuple[list[list[Instruction]], list[Instruction]]:
    """All ways through a loop that avoid cold blocks, and the cold blocks' code."""
    blocks = _blocks(code, labels, head, back)
    cold = {
        first
        for first, (last, _) in blocks.items()
        if any(i.base in SHUFFLES for i in code[first : last + 1])
    }
    found: list[list[Instruction]] = []

    def follow(first: int, path: list[Instruction], seen: frozenset[int]) -> None:
        if first in cold or len(found) > 100:
            return
        last, leaves = blocks[first]
        path = path + code[first : last + 1]
        for leaf in leaves:
            if leaf == head:
                found.append(path)
            elif leaf in blocks and leaf not in seen:
                follow(leaf, path, seen | {leaf})

    follow(head, [], frozenset({head}))
    return found, [i for first in cold for i in code[first : blocks[first][0] + 1]]


@dataclass(frozen=True)
class HotLoop:
    """The loop that moves the most bytes."""

    hot: Counts
    cold: Counts
    code: list[Instruction]


def hot_loops(code: list[Instruction], labels: dict[str, int]) -> list[HotLoop]:
    """Loops that read global memory, the one that reads the most per trip first."""
    found = []
    for head, back in loops(code, labels):
        ways, cold = paths(code, labels, head, back)
        if not ways:  # every way shuffles: nothing of it is cold
            ways, cold = [code[head : back + 1]], []
        longest = max(ways, key=len)
        counts = Counts.of(longest)
        if counts.loaded:
            found.append(HotLoop(counts, Counts.of(cold), longest))
    return sorted(found, key=lambda loop: -loop.hot.loaded * min(loop.hot.load_bits))
