"""Reads the machine code of a compiled kernel: registers, spills, and what its hot loop issues.

A trip through a loop is the shortest way from its head back to it that makes all of the loop's
stores of whole vectors and does not shuffle: the sweeps reduce across a warp only where they move
their centre, which is the cold rest of the loop.
Its range of addresses says nothing, cold blocks stand inside and outside of it. Uses cuobjdump and
nvdisasm as they come with Triton. Nothing here needs a driver.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import deque
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
PACKED = {"FFMA2", "FADD2", "FMUL2"}  # one issue slot, two lanes of the fp32 pipe
FMA = {"FFMA", "FADD", "FMUL", "HFMA2", "HADD2", "HMUL2", "FHADD", "FHFMA"} | PACKED
LOADS = {"LDG", "LDGSTS"}  # of global memory; the second copies to shared memory
SHARED_LOADS = {"LDS"}
STORES = {"STG", "ST"}  # the second where the compiler cannot tell that it is not shared memory
MEMORY = LOADS | SHARED_LOADS | STORES
MEMORY |= {"LD", "STS", "LDL", "STL", "SHFL", "REDUX", "CREDUX", "ATOMG"}
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
    def of(cls, code: Iterable[Instruction], reads: Set[str] = LOADS) -> Counts:
        """`reads`: the instructions whose bytes count as loaded."""
        c = cls()
        for i in code:
            base = i.base
            c.instructions += 1
            c.shuffles += base in SHUFFLES
            c.barriers += base in BARRIERS
            c.spills += base in SPILLS
            c.float64 += base in {"DADD", "DMUL", "DFMA", "DSETP"} or i.op.endswith(".F64")
            if base in reads:
                c.loaded += i.bytes
                c.load_bits.add(8 * i.bytes)
            if base in STORES:
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


class Cubin:
    """What the disassemblers say of one file of machine code, by its kernels' names."""

    def __init__(self, content: bytes) -> None:
        resources = _run("cuobjdump", "--dump-resource-usage", content)
        self._resources = {
            name: (int(registers), int(stack))
            for name, registers, stack in re.findall(
                r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", resources
            )
        }
        parts = re.split(r"(?m)^\.text\.(\S+):", _run("nvdisasm", "-c", content))
        self._text = {
            name: body.split(".section")[0]
            for name, body in zip(parts[1::2], parts[2::2], strict=True)
        }

    def kernel(self, pattern: str) -> str:
        """The name of the one kernel whose (mangled) name the pattern matches somewhere."""
        found = [name for name in self._text if re.search(pattern, name)]
        if len(found) != 1:
            raise LookupError(f"{len(found)} kernels match {pattern!r}: {sorted(self._text)}")
        return found[0]

    def registers_and_stack(self, kernel: str) -> tuple[int, int]:
        """Registers per thread, bytes of stack per thread."""
        return self._resources[kernel]

    def loops(self, kernel: str, reads: Set[str] = LOADS, by_way_of: str = "") -> list[HotLoop]:
        """`hot_loops` of it."""
        return hot_loops(*parse(self._text[kernel]), reads, by_way_of)


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


def _successors(code: list[Instruction], labels: dict[str, int]) -> list[list[int]]:
    found = []
    for at, i in enumerate(code):
        after = [at + 1] if at + 1 < len(code) else []
        if i.base == "BRA":
            name = _TARGET.search(i.arguments)
            to = [labels[name.group(0)]] if name and name.group(0) in labels else []
            conditional = i.predicate or re.search(r"\bU?P\d|DIV", i.arguments + i.op)
            after = to + (after if conditional else [])
        elif i.base in ("EXIT", "RET") and not i.predicate:
            after = []
        found.append(after)
    return found


def _body(before: list[list[int]], head: int, tails: list[int]) -> set[int]:
    """The natural loop: what reaches a back edge without passing the head."""
    inside, queue = {head}, deque(tails)
    while queue:
        at = queue.popleft()
        if at not in inside:
            inside.add(at)
            queue.extend(before[at])
    return inside


def _way(after: list[list[int]], start: int, end: int, allowed: set[int]) -> list[int]:
    """The shortest way from one instruction to another, without the latter; [] if there is none."""
    came: dict[int, int] = {}
    queue = deque([start])
    while queue:
        at = queue.popleft()
        for to in after[at]:
            if to == end:
                path = [at]
                while path[-1] != start:
                    path.append(came[path[-1]])
                return path[::-1]
            if to in allowed and to not in came:
                came[to] = at
                queue.append(to)
    return []


def _trip(
    after: list[list[int]], head: int, allowed: set[int], through: Sequence[int] = ()
) -> list[int]:
    """The shortest way from the head back to it by way of some; [] if there is none."""
    ends = [*through, head]
    parts = [
        _way(after, start, end, allowed) for start, end in zip([head, *through], ends, strict=True)
    ]
    return [at for part in parts for at in part] if all(parts) else []


@dataclass(frozen=True)
class HotLoop:
    """One trip through a loop, and all else that is in the loop."""

    at: int  # index of its head
    hot: Counts
    cold: Counts
    code: list[Instruction]


def hot_loops(
    code: list[Instruction],
    labels: dict[str, int],
    reads: Set[str] = LOADS,
    by_way_of: str = "",
) -> list[HotLoop]:
    """Loops that read memory (`reads`: by which instructions), the hottest first.

    `by_way_of`: an instruction that trips are to issue, of loops that have it.
    """
    after = _successors(code, labels)
    before: list[list[int]] = [[] for _ in code]
    for at, leaves in enumerate(after):
        for to in leaves:
            before[to].append(at)
    tails: dict[int, list[int]] = {}
    for at, leaves in enumerate(after):
        for to in leaves:
            if to <= at and code[at].base == "BRA":
                tails.setdefault(to, []).append(at)
    found = []
    for head, ends in tails.items():
        body = _body(before, head, ends)
        quiet = {at for at in body if code[at].base not in SHUFFLES}
        stores = [at for at in sorted(quiet) if code[at].base in STORES and code[at].bytes >= 16]
        marked = [at for at in sorted(quiet) if code[at].op.startswith(by_way_of)]
        if by_way_of and not marked:
            continue
        ways = [_trip(after, head, quiet, [at]) for at in marked] if by_way_of else []
        trip = (
            min(filter(None, ways), key=len, default=[])
            or _trip(after, head, quiet, stores)
            or _trip(after, head, quiet)
            or _trip(after, head, body)
        )
        rest = body.difference(trip)
        loop = HotLoop(
            head,
            Counts.of((code[at] for at in trip), reads),
            Counts.of((code[at] for at in sorted(rest)), reads),
            [code[at] for at in trip],
        )
        if loop.hot.loaded:
            found.append(loop)
    # The hot loop loads in the widest words. A loop around it, or inside of its cold part, has
    # fewer exponentials for what it loads.
    width = max((min(loop.hot.load_bits) for loop in found), default=0)
    wide = [loop.hot for loop in found if min(loop.hot.load_bits) == width]
    densest = max((hot.special / hot.loaded for hot in wide), default=0.0)

    def coldness(loop: HotLoop) -> tuple[bool, int, bool, int, int]:
        hot = loop.hot
        sparse = hot.special / hot.loaded < 0.9 * densest
        return hot.shuffles > 0, -min(hot.load_bits), sparse, -hot.loaded, hot.instructions

    return sorted(found, key=coldness)
