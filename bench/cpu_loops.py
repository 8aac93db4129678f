"""Count what the inner loops of the AVX-512 kernels issue, today and when they were last measured.

    python bench/cpu_loops.py bench/results/cpu-loops.json

compiles those kernels of the working tree, and of the commit that bench/results/cpu-avx512.json was
measured at, and reads the machine code: no AVX-512 is needed, and nothing is run. Needs git's
history, g++ (or CXX) and objdump. `python bench/page.py` puts the table into docs/performance.md.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

# Explicit, so that it also works where PYTHONSAFEPATH keeps the script's folder off the path.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ROOT / "bench" / "results" / "cpu-avx512.json"
# As in setup.py, and what setuptools adds.
FLAGS = ["-O3", "-std=c++20", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-fwrapv"]
PAIRS = 32  # two vectors of each row: what a trip through any of these loops takes
DTYPES = {"float32": 0, "bfloat16": 1}
# Template arguments after the dtype; "entropies too" came to the sweeps after the measurement.
LOOPS = {
    "forward KL, differences up to 0.5": r"poly_block<{}, 4, false(, false)?, false>",
    "up to 1": r"poly_block<{}, 6, false(, false)?, false>",
    "up to 2": r"poly_block<{}, 8, false(, false)?, false>",
    "beyond": r"split_block<{}, false(, false)?, false>",
    "up to 0.5, masked": r"poly_block<{}, 4, false(, false)?, true>",
    "both directions, up to 0.5": r"poly_block<{}, 4, true(, false)?, false>",
    "gradient of forward KL": r"forward_gradient<{}>",
}
# Of each source, the loops that are counted, and of which elements.
SOURCES = {
    "isa_avx512.cpp": (LOOPS, ["float32", "bfloat16"]),
    "isa_avx512_bf16.cpp": (
        {"the same with AVX512-BF16": LOOPS["gradient of forward KL"]},
        ["bfloat16"],
    ),
}


class Instruction(NamedTuple):
    address: int
    name: str
    arguments: str


def functions(disassembly: str) -> dict[str, list[Instruction]]:
    """What `objdump -dC --no-show-raw-insn` prints, by function."""
    found: dict[str, list[Instruction]] = {}
    here: list[Instruction] = []
    for line in disassembly.splitlines():
        if head := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            here = found.setdefault(head[1], [])
        elif code := re.match(r"\s*([0-9a-f]+):\s+(\S+)\s*(.*)$", line):
            here.append(Instruction(int(code[1], 16), code[2], code[3]))
    return found


def main_loop(code: list[Instruction]) -> list[Instruction]:
    """The shortest way back that has eight vector multiply-adds and does not leave the function."""
    at = {each.address: i for i, each in enumerate(code)}
    best: list[Instruction] = []
    for i, each in enumerate(code):
        target = re.match(r"[0-9a-f]+", each.arguments) if each.name.startswith("j") else None
        begin = at.get(int(target[0], 16), i + 1) if target else i + 1
        body = code[begin : i + 1]
        fused = [b for b in body if re.match(r"vfn?madd", b.name) and "zmm" in b.arguments]
        leaves = any(
            b.name.startswith(("ret", "call")) or b.arguments.endswith(",%rsp") for b in body
        )
        if len(fused) >= 8 and not leaves and (not best or len(body) < len(best)):
            best = body
    return best


def counts(csrc: Path) -> dict[str, tuple[int, int]]:
    """ "loop; elements" -> instructions of a trip: of vectors, and all but prefetches."""
    found = {}
    for source, (loops, elements) in SOURCES.items():
        code = functions(compiled(csrc, source))
        for (loop, pattern), dtype in itertools.product(loops.items(), elements):
            wanted = pattern.format(rf"\(fusedkl::DType\){DTYPES[dtype]}")
            (name,) = (name for name in code if re.search(wanted, name))
            body = [each for each in main_loop(code[name]) if "prefetch" not in each.name]
            found[f"{loop}; {dtype}"] = (sum("zmm" in b.arguments for b in body), len(body))
    return found


def compiled(csrc: Path, name: str) -> str:
    """The disassembly of one file of kernels."""
    from torch.utils.cpp_extension import include_paths

    includes = [f"-I{path}" for path in (csrc, *include_paths())]
    source = str(csrc / "cpu" / name)
    with tempfile.TemporaryDirectory() as folder:
        target = str(Path(folder) / "kernels.o")
        compiler = os.environ.get("CXX", "g++")
        subprocess.run([compiler, *FLAGS, *includes, "-c", source, "-o", target], check=True)
        command = ["objdump", "-dC", "--no-show-raw-insn", target]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def at_commit(commit: str) -> dict[str, tuple[int, int]]:
    """The counts of an earlier commit."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["git", "-C", str(ROOT), "archive", commit, "csrc"]
        archive = subprocess.run(command, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
        return counts(Path(folder) / "csrc")


def section(content: dict[str, Any]) -> str:
    """The table of docs/performance.md."""
    rows = []
    for name, then in content["then"].items():
        now = content["now"][name]
        rows.append((*name.split("; "), then[0], now[0], then[1], now[1]))
    headers = ("loop", "elements", "vector, then", "now", "all, then", "now")
    return (
        f"Instructions for {PAIRS} pairs of logits, counted in the machine code and not run: "
        f'"then" is commit {content["measured"][:7]}, at which the table above was measured. '
        "Prefetches are left out.\n\n"
        f"{tabulate(rows, headers, tablefmt='github', disable_numparse=True)}\n"
    )


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    import machine

    measured = json.loads(MEASURED.read_text())["commit"]
    out = Path(arguments[0])
    content = {
        "schema": 1,
        "suite": "cpu-loops",
        "command": f"python bench/cpu_loops.py {out}",
        "commit": machine.commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": machine.versions(),
        "measured": measured,
        "then": at_commit(measured),
        "now": counts(ROOT / "csrc"),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n")
    print(section(content))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
