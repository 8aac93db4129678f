"""The kernels whose machine code bench/static.py counts: ours, torch.compile's, liger-kernel's."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import capture
import inductor_code
import nvcc
import sass
import torch
from torch import Tensor

from fusedkl import reference

V = 128256
# A segment of the CUDA kernels holds at most so many tokens (csrc/row_math.h), for 128 threads.
CUDA_SEGMENT, CUDA_THREADS = 65536, 128
# Rows of V bf16 pairs take a cluster of 4 blocks with 512 threads (csrc/cuda/rows.cu, cluster.cuh).
CLUSTER_THREADS = 4 * 512


@dataclass(frozen=True)
class Found:
    """One kernel's hot loop and resources."""

    registers: int
    stack: int
    loop: sass.HotLoop


@dataclass(frozen=True)
class Case:
    """A kernel to count. Bytes are of one pair of logits, one of each row."""

    name: str
    find: Callable[[int], Found]  # by architecture
    read_bytes: float  # that must move from memory; what is written is counted
    load_bytes: float  # that the hot loop's load instructions ask for
    per_lane: float = 0.0  # pairs of a lane between the moves of the centre; 0: it has none
    ideal: float = 4.0  # bytes per pair that the task needs, read and written
    since: int = 80  # the first architecture that has it


# ---- CUDA


@functools.cache
def _cuda_code(source: str, architecture: int) -> sass.Cubin:
    target = {90: "90a"}.get(architecture, str(architecture))
    return sass.Cubin(nvcc.cubin(source, target)[0])


def _of_cuda(pattern: str, source: str = "bf16") -> Callable[[int], Found]:
    def find(architecture: int) -> Found:
        code = _cuda_code(source, architecture)
        name = code.kernel(pattern)
        return Found(*code.registers_and_stack(name), code.loops(name)[0])

    return find


# The second sweep has a loop for rows with most of their mass on one token and one for others, as
# the most and the fewest instructions tell them apart. What its tokens allow decides the way
# through it: without a logarithm, with one, or with divisions too.
def _second_sweep(
    which: Callable[..., sass.HotLoop], first: Callable[[int], Found], by_way_of: str
) -> Callable[[int], Found]:
    """A forward's trip, and as many pairs of the second sweep: one kernel has both on chip."""

    def find(architecture: int) -> Found:
        forward = first(architecture)
        code = _cuda_code("family_bf16", architecture)
        name = code.kernel(r"family_sums_kernelILNS_6FamilyE1E")
        loops = code.loops(name, by_way_of=by_way_of)
        wide = [loop for loop in loops if min(loop.hot.load_bits) >= 128]
        sweep = which(wide, key=lambda loop: loop.hot.instructions / loop.hot.loaded)
        hot = forward.loop.hot
        trips, rest = divmod(hot.loaded, sweep.hot.loaded)
        if rest:
            raise ValueError(f"trips of {hot.loaded} and {sweep.hot.loaded} bytes")
        registers, stack = code.registers_and_stack(name)
        loop = _one_after_another((1, forward.loop), (trips, sweep), cold=forward.loop.cold)
        return Found(max(registers, forward.registers), stack + forward.stack, loop)

    return find


def _one_after_another(*trips: tuple[int, sass.HotLoop], cold: sass.Counts) -> sass.HotLoop:
    """So many trips through each of several loops, as if they were one's."""
    code = [instruction for times, loop in trips for instruction in times * loop.code]
    return sass.HotLoop(0, sass.Counts.of(code), cold, code)


def _one_launch(architecture: int) -> Found:
    """Of a cluster: both rows copied to shared memory, the sweep there, the gradient from there."""
    code = _cuda_code("bf16", architecture)
    name = code.kernel(r"cluster_kernelILi0ELb1E")
    on_chip = [loop for loop in code.loops(name, sass.SHARED_LOADS) if loop.hot.load_bits == {128}]
    sweep = on_chip[0]
    (gradient,) = (loop for loop in on_chip if loop.hot.stored)
    copies = code.loops(name)[:2]  # one of each row; beside them, what an unrolled one leaves
    served = [(loop.hot.loaded // 2, loop) for loop in copies]  # pairs of a trip
    served += [(loop.hot.loaded // 4, loop) for loop in (sweep, gradient)]
    most = max(pairs for pairs, _ in served)
    trips = [(most // pairs, loop) for pairs, loop in served]
    loop = _one_after_another(*trips, cold=sweep.cold)
    if loop.hot.loaded != 4 * most:
        raise ValueError(f"{loop.hot.loaded} bytes copied for {most} pairs")
    return Found(*code.registers_and_stack(name), loop)


def _pairs_per_lane(vocab: int) -> float:
    return vocab / -(-vocab // CUDA_SEGMENT) / CUDA_THREADS


def cuda() -> list[Case]:
    """Ours in CUDA C++, on bfloat16."""

    def forward(name: str, mode: int, anywhere: int = 0) -> Case:
        find = _of_cuda(rf"forward_kernelILi{mode}E\w*Lb{anywhere}EEEv")
        # an unaligned chunk is put together from two vectors, the second of which is in cache
        lane = _pairs_per_lane(50257 if anywhere else V)
        return Case(f"CUDA {name}", find, 4, 8 if anywhere else 4, lane)

    gradient = _of_cuda(r"gradient_kernelILb1E\w*Lb0EEEv")
    return [
        forward("forward_kl", 0),
        # one kernel for both: chunks are put together wherever the rows lie
        forward("forward_kl, V = 50257, rows misaligned alike", 0, 1),
        forward("forward_kl, V = 50257, rows misaligned differently", 0, 1),
        forward("both directions", 1),
        forward("forward_kl and entropy", 2),
        forward("token_stats, every field", 7),
        Case("CUDA backward of forward_kl", gradient, 4, 4, ideal=6),
        Case(
            "CUDA forward_kl and its gradient, one launch",
            *(_one_launch, 4, 4, V / CLUSTER_THREADS),
            ideal=6,
            since=90,
        ),
    ]


def cuda_family() -> list[Case]:
    """Divergences of a second sweep, in CUDA C++: the rows on chip, as a cluster has them."""
    lane = _pairs_per_lane(V)
    first = _of_cuda(r"forward_kernelILi2E\w*Lb0EEEv")
    gradient = _of_cuda(r"family_gradient_kernelILNS_6FamilyE1E", "family_bf16")
    return [
        # twice the bytes are asked for: the second time of shared memory
        *(
            Case(f"CUDA jsd, {name}", _second_sweep(which, first, by_way_of), 4, 8, lane)
            for name, which, by_way_of in (
                ("differences within 1 nat", min, ""),
                ("differences within 27 nats", min, "MUFU.LG2"),
                ("the same, most of the mass on one token", max, "MUFU.LG2"),
                ("any difference and beta", min, "MUFU.RCP"),
            )
        ),
        Case("CUDA backward of jsd, to both", gradient, 4, 4, ideal=8),
    ]


# ---- Triton


def _of_triton(kernel: str, call: Callable[[], object]) -> Callable[[int], Found]:
    def find(architecture: int) -> Found:
        with capture.capture(f"cuda:{architecture}") as launches:
            call()
        launch = next(found for found in launches if found.name == kernel)
        return of_cubin(launch.cubin)

    return find


def of_cubin(cubin: bytes) -> Found:
    """The one kernel of a file."""
    code = sass.Cubin(cubin)
    name = code.kernel("")
    return Found(*code.registers_and_stack(name), code.loops(name)[0])


def _rows(dtype: torch.dtype, vocab: int = V) -> Tensor:
    return torch.empty(4, vocab, dtype=dtype)


# All that token_stats returns.
STATS = (
    *("logprob", "ref_logprob", "entropy", "ref_entropy", "logsumexp", "ref_logsumexp"),
    *("forward_kl", "reverse_kl", "log_ratio"),
)


def _parameter(fields: tuple[str, ...]) -> float | None:
    return 0.5 if {"jsd", "skew_kl"} & {*fields} else None


def _forward(*fields: str, vocab: int = V) -> Callable[[], object]:
    from fusedkl.kernels import backend

    x, y = _rows(torch.bfloat16, vocab), _rows(torch.bfloat16, vocab)
    ids = torch.zeros(4, 1, dtype=torch.int64) if "logprob" in fields else None
    given = (ids, list(fields), _parameter(fields), None, None, None, None)
    return lambda: backend.row_stats(x, y, *given)


def _backward(*fields: str, both: bool = False) -> Callable[[], object]:
    from fusedkl.kernels import backend

    x, y = _rows(torch.bfloat16), _rows(torch.bfloat16)
    state = torch.empty(4, len(reference.STATE), dtype=torch.float64)
    grad = torch.empty(len(fields), 4)
    return lambda: backend.row_stats_backward(
        grad, x, y, None, state, list(fields), _parameter(fields), None, None, None, True, both
    )


def triton_calls() -> dict[str, tuple[str, Callable[[], object]]]:
    """Calls of ours in Triton, and for each the launch to look at."""
    one, two = ("forward_kl",), ("forward_kl", "reverse_kl")
    return {
        "forward_kl": ("sweep_pair", _forward(*one)),
        "forward_kl, V = 50257": ("sweep_pair", _forward(*one, vocab=50257)),
        "both directions": ("sweep_pair", _forward(*two)),
        "forward_kl and entropy": ("sweep_pair", _forward(*one, "entropy")),
        "backward of forward_kl": ("gradients", _backward(*one)),
        "backward of both, to both": ("gradients", _backward(*two, both=True)),
        "token_stats": ("sweep_pair", _forward(*STATS)),
        "jsd, second sweep": ("sweep_family", _forward("jsd")),
        "backward of jsd, to both": ("gradients", _backward("jsd", both=True)),
    }


def other_calls() -> list[Callable[[], object]]:
    """Calls of ours in Triton that no table counts, which have to compile all the same."""
    from fusedkl.kernels import backend

    x, y = _rows(torch.bfloat16), _rows(torch.float32)
    ids = torch.zeros(4, 3, dtype=torch.int64)
    state = torch.empty(4, len(reference.STATE), dtype=torch.float64)
    rest = torch.empty(4, 4, dtype=torch.float64)
    capped = (["renyi", "logprob", "mean_logprob"], 2.0, None)

    def statistics() -> object:
        _, found = backend.row_stats(x, y, ids, *capped, None, None, 30.0)
        grad = torch.empty(5, 4)
        return backend.row_stats_backward(grad, x, y, ids, found, *capped, None, 30.0, True, True)

    return [
        statistics,
        *(_forward(field) for field in ("skew_kl", "tvd", "hellinger")),
        lambda: backend.row_stats(x, None, None, ["mean_logprob"], *(None,) * 4, 30.0),
        lambda: backend.row_sums(x, y, state, "tvd", *(None,) * 5),
        lambda: backend.topk_logprobs(x, ids, None, None),
        lambda: backend.topk_logprobs_backward(rest, x, ids, rest, None),
    ]


def triton() -> list[Case]:
    """Ours in Triton, on bfloat16."""
    from fusedkl.kernels.launch import choose

    dtypes = (torch.bfloat16, torch.bfloat16)
    found = []
    for name, (kernel, call) in triton_calls().items():
        ideal = 6.0 if "backward" in name else 4.0
        if "to both" in name:
            ideal = 8.0
        # the task needs one read; where two sweeps share it, half of it is each one's
        if "second sweep" in name:
            ideal /= 2
        vocab = 50257 if "50257" in name else V
        # one warp works on a segment
        centred = "backward" not in name and "second sweep" not in name
        lane = choose(vocab, dtypes, 90).segment / 32 if centred else 0.0
        find = _of_triton(kernel, call)
        found.append(Case(f"Triton {name}", find, 4, 4, lane, ideal=ideal))
    return found


def ours() -> list[Case]:
    """All that have budgets."""
    return [*cuda(), *cuda_family(), *triton()]


# ---- others


def inductor() -> list[Case]:
    """What torch.compile makes of the two lines: one kernel with two loops over both rows."""

    def loop(number: int) -> Callable[[int], Found]:
        def find(architecture: int) -> Found:
            code = sass.Cubin(inductor_code.kl_kernel(architecture))
            name = code.kernel("")
            loops = sorted(code.loops(name), key=lambda found: found.at)[:2]
            return Found(*code.registers_and_stack(name), loops[number])

        return find

    return [Case(f"torch.compile of F.kl_div, loop {i + 1} of 2", loop(i), 4, 4) for i in range(2)]


def liger() -> list[Case]:
    """liger-kernel's, as its launchers launch them; they start from log-probabilities.

    kl_div on float32: its kernel does not compile for a bfloat16 target.
    """
    if not importlib.util.find_spec("liger_kernel"):
        return []
    from liger_kernel.ops import jsd, kl_div

    x, low = _rows(torch.float32), _rows(torch.bfloat16)
    return [
        Case(
            "liger-kernel kl_div",
            _of_triton(
                "_kldiv_kernel_forward",
                lambda: kl_div.kldiv_forward_triton(x, x, True, "batchmean", 1e-10),
            ),
            8,
            8,
        ),
        Case(
            "liger-kernel kl_div, backward",
            _of_triton(
                "_kldiv_kernel_backward",
                lambda: kl_div.kldiv_backward_triton(x, torch.ones(()), torch.empty_like(x), True),
            ),
            4,
            4,
            ideal=6,
        ),
        Case(
            "liger-kernel jsd, beta = 0 (forward KL, with its gradient)",
            _of_triton("_jsd_kernel", lambda: jsd.jsd_forward(low, low, None, 0.0, -100, False)),
            4,
            4,
            ideal=6,
        ),
    ]
