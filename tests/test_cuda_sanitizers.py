"""The CUDA kernels under ASan, UBSan and TSan, in two schedules; and that each check can fail.

The program is cuda_on_cpu/check.cpp: kernels and shim without torch, held against the CPU's
double-precision path. ASan and UBSan see every byte beyond a row's last 16, static or dynamic
shared memory, and misaligned vectors. Under TSan every CUDA thread is a fiber that only barriers
order, so a race is found whatever the schedule.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import cuda_on_cpu
import pytest

pytestmark = pytest.mark.slow

SANITIZERS = {
    "plain": ("-O1",),
    "memory": (
        "-O1",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=undefined",
        "-DSHIM_ONE_BLOCK_AT_A_TIME",
    ),
    "races": ("-O1", "-fsanitize=thread"),
}
CSRC = cuda_on_cpu.ROOT / "csrc"


def program(kind: str, csrc: Path = CSRC, *more: str) -> Path:
    sources = [cuda_on_cpu.HERE / "check.cpp"]
    sources += [csrc / "cpu" / f"{name}.cpp" for name in ("rows_f64", "family_series")]
    flags = [*SANITIZERS[kind], f"-I{csrc / 'cuda'}", *more]
    return cuda_on_cpu.build(sources, f"check-{kind}", flags, [], csrc)


def check(binary: Path, longest: int, backwards: bool = False) -> subprocess.CompletedProcess[str]:
    # one report is enough: to write down a thousand races takes minutes
    environment = dict(os.environ, ASAN_OPTIONS="detect_leaks=0", TSAN_OPTIONS="halt_on_error=1")
    environment.pop("SHIM_BACKWARDS", None)
    if backwards:
        environment["SHIM_BACKWARDS"] = "1"
    return subprocess.run(
        [binary, str(longest)], capture_output=True, text=True, env=environment, timeout=600
    )


@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("kind", SANITIZERS)
def test_nothing_to_report(kind: str, backwards: bool) -> None:
    family = ("-DCHECK_FAMILY",) if kind == "plain" else ()  # under a sanitizer that is minutes
    done = check(program(kind, CSRC, *family), 1100 if kind == "races" else 5000, backwards)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    assert done.stdout.endswith("all as expected\n")


@pytest.mark.full
@pytest.mark.parametrize("kind", SANITIZERS)
def test_every_dtype(kind: str) -> None:
    done = check(program(kind, CSRC, "-DCHECK_ALL_DTYPES", "-DCHECK_FAMILY"), 20001)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr


# what is planted -> (file, text, what replaces it, what must find it, what it must say)
FAULTS = {
    "a missing barrier": (
        "cuda/forward.cuh",
        "  __syncthreads();\n  if (warp_id() != 0) return;",
        "  if (warp_id() != 0) return;",
        "races",
        "data race",
    ),
    "a barrier that some threads miss": (
        "cuda/forward.cuh",
        "  __syncthreads();\n  if (warp_id() != 0) return;",
        "  if (warp_id() != 0) return;\n  __syncthreads();",
        "plain",
        "a barrier after a thread of the block left",
    ),
    "a chunk too many": (
        "cuda/logits.cuh",
        "/ kSizeOf<Y> : 0)) / kChunk;",
        "/ kSizeOf<Y> : 0)) / kChunk + 1;",
        "memory",
        "AddressSanitizer",
    ),
    "a shifted vector beyond the row": (
        "cuda/logits.cuh",
        "+ static_cast<int64_t>(i) * (kWordsOf<Y> / 4), shift)",
        "+ static_cast<int64_t>(i) * (kWordsOf<Y> / 4) + 1, shift)",
        "memory",
        "AddressSanitizer",
    ),
    "rows taken for aligned": (
        "cuda/logits.cuh",
        "head = (period - off_x) % period;",
        "head = (period - off_x) % period * 0;",
        "memory",
        "misaligned address",
    ),
    "a wrong mask": (
        "cuda/device.cuh",
        "kAllLanes = 0xffffffffu",
        "kAllLanes = 0x0fffffffu",
        "plain",
        "caller not in its own mask",
    ),
    "a wrong merge": (
        "row_math.h",
        "row.forward_kl += q * parts[i].forward_kl +",
        "row.forward_kl += p * parts[i].forward_kl +",
        "plain",
        "plain is",
    ),
    "a part moved the wrong way": (
        "cuda/parts.cuh",
        "const double step = (centre - p.centre) * t.inverse",
        "const double step = (p.centre - centre) * t.inverse",
        "plain",
        "plain is",
    ),
    "a shared array too small": (
        "cuda/rows.cu",
        "__shared__ double room[kFinishWarps];",
        "__shared__ double room[kFinishWarps - 1];",
        "memory",
        "AddressSanitizer",
    ),
    "a cluster that does not wait": (
        "cuda/cluster.cuh",
        "  cluster.sync();\n  if (warp_id() == 0) {",
        "  __syncthreads();\n  if (warp_id() == 0) {",
        "races",
        "data race",
    ),
    "a block that leaves while it is read": (
        "cuda/cluster.cuh",
        "  cluster.sync();  // no block may leave",
        "  __syncthreads();  // no block may leave",
        "plain",
        "after the last cluster barrier",
    ),
    "a second sweep that does not wait": (
        "cuda/family_cluster.cuh",
        "cluster.sync();  // before the sums are written again",
        "__syncthreads();  // before the sums are written again",
        "plain",
        "after the last cluster barrier",
    ),
    "slopes exchanged": (
        "family_terms.h",
        "return {value, c.weight_p * of_p, c.weight_q * of_q};",
        "return {value, c.weight_q * of_q, c.weight_p * of_p};",
        "plain",
        "family's gradient",
    ),
    "given tokens counted": (
        "cuda/topk.cuh",
        "if (bits >> 2 * j & 1) x[j].x = -INFINITY;",
        "",
        "plain",
        "the rest is",
    ),
    "tokens marked without an atomic operation": (
        "cuda/topk.cuh",
        "atomicOr(given + at / 32, 1u << at % 32) >> at % 32 & 1",
        "(given[at / 32] |= 1u << at % 32, false)",
        "races",
        "data race",
    ),
    "a chunk too many for the forward": (
        "cuda/logits.cuh",
        "chunks(length_ / kChunk)",
        "chunks(length_ / kChunk + 1)",
        "memory",
        "AddressSanitizer",
    ),
    "absent tokens counted": (
        "cuda/forward.cuh",
        "which.live[k] = 2 * i + k < count && !(a == -INFINITY && b == -INFINITY);",
        "which.live[k] = 2 * i + k <= count && !(a == -INFINITY && b == -INFINITY);",
        "plain",
        "is",
    ),
}


# What only the sweeps of the family or over given tokens show: compiling those takes longer.
OF_FAMILY = ("a second sweep that does not wait", "slopes exchanged", "given tokens counted")
OF_FAMILY += ("tokens marked without an atomic operation",)
# One of each check in `make test`.
QUICK = ("a missing barrier", "a chunk too many for the forward", "a wrong mask")


@pytest.mark.parametrize(
    "fault",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.full) for name in FAULTS],
)
def test_a_planted_fault_is_found(tmp_path: Path, fault: str) -> None:
    file, text, instead, kind, says = FAULTS[fault]
    csrc = tmp_path / "csrc"
    shutil.copytree(CSRC, csrc)
    source = (csrc / file).read_text()
    assert source.count(text) >= 1, "the text that the fault replaces is no longer there"
    (csrc / file).write_text(source.replace(text, instead))
    more = ("-O0", *(("-DCHECK_FAMILY",) if fault in OF_FAMILY else ()))
    done = check(program(kind, csrc, *more), 300 if kind == "races" else 5000)
    assert done.returncode != 0 and says in done.stdout + done.stderr, done.stdout + done.stderr
