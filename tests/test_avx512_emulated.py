"""The AVX-512 kernels on a machine without AVX-512: their own code on instructions written in AVX2.

avx512_on_avx2/intrinsics.h has the instructions. They are held against definitions in numpy, and
against the machine's own where it has them; then the library is built on them once more, into a
copy that comes before the installed one, for the tests of numbers.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import building
import numpy as np
import pytest
from test_instruction_sets import ASK, OTHERS, machine_has

CXX = shutil.which("g++")  # whose extensions the emulation is written in
HERE = building.ROOT / "tests"
EMULATION = HERE / "avx512_on_avx2"

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(CXX is None, reason="no g++"),
    pytest.mark.skipif(sys.platform != "linux", reason="the machine's flags are read as Linux's"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="not x86-64"),
    pytest.mark.skipif(not machine_has("avx2"), reason="the machine lacks avx2, fma or f16c"),
]


def edit(file: Path, *changes: tuple[str, str]) -> None:
    text = file.read_text()
    for old, new in changes:
        assert old in text, f"{file.name} has no {old!r}"
        text = text.replace(old, new)
    file.write_text(text)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One in which `import fusedkl` finds the library whose AVX-512 is emulated."""
    tree = building.checkout(tmp_path_factory.mktemp("emulated"))
    isa = '#include "../../tests/avx512_on_avx2/isa.cpp"\n'
    (tree / "csrc/cpu/isa_avx512.cpp").write_text(isa)
    (tree / "csrc/cpu/isa_avx512_bf16.cpp").write_text("#define EMULATE_BF16\n" + isa)
    begin = "namespace kl_avx512 {\n"
    edit(
        tree / "csrc/cpu/kl_div.cpp",
        ("avx512f,avx512bw,avx512dq,avx512vl,", ""),
        (begin, begin + isa.replace("isa.cpp", "intrinsics.h")),
    )
    edit(tree / "setup.py", ('"-O3"', '"-O1"'))  # compiling is most of the time
    command = (sys.executable, "setup.py", "build", "--build-lib", "emulated")
    building.run(*command, cwd=tree, FUSEDKL_BUILD_CUDA="0", CXX="g++")
    return dict(os.environ, PYTHONPATH=str(tree / "emulated"), OMP_NUM_THREADS="1")


def numbers() -> np.ndarray:
    """x, y and z [3, V, 16]: every pair of edge inputs, and random bits, of numbers near too."""
    bits = [0, 1, 0x7FFFFF, 0x800000, 0x800001, 0x33000000, 0x387FC000, 0x477FEFFF, 0x477FF000]
    bits += [0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x7FC12345, 0x7F812345, 0x3F808000, 0x3F818000]
    edges = np.array(bits, np.uint32).view(np.float32)
    plain = [0.5, 1, 1.5, 2, 2.5, 3, 1e-9, 0.1, 126, 127.5, 149, 150.5, 300, 1e4, 8388607.5, 1e10]
    edges = np.concatenate([edges, np.array(plain, np.float32)])
    edges = np.concatenate([edges, (edges.view(np.uint32) | 0x80000000).view(np.float32)])
    x, y = (a.ravel() for a in np.meshgrid(edges, edges))
    random = np.random.default_rng(0)
    z = random.permutation(x)
    near = random.standard_normal((3, 4096)) * [[20.0], [20.0], [1.0]]
    wild = random.integers(0, 2**32, (3, 4096), np.uint32).view(np.float32)
    all_of_it = np.concatenate([np.stack([x, y, z]), near.astype(np.float32), wild], axis=1)
    return np.ascontiguousarray(all_of_it.reshape(3, -1, 16))


SIGN, QUIET, TINY = 0x80000000, 0x00400000, np.float32(2.0**-126)


def real(a: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(a, np.uint32).view(np.float32)


def bits(a: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(a, np.float32).view(np.uint32)


def nan_of(a: np.ndarray) -> np.ndarray:
    return real(bits(a) | QUIET)


def without_denormals(a: np.ndarray) -> np.ndarray:
    return real(np.where(bits(a) << 1 < bits(TINY) << 1, bits(a) & SIGN, bits(a)))


def scalef(x: np.ndarray, y: np.ndarray, flushed: bool) -> np.ndarray:
    """Intel's table of special operands, below the rest."""
    exponent = np.clip(np.floor(np.nan_to_num(y, posinf=600, neginf=-600)), -600, 600).astype(int)
    exact = np.ldexp(x.astype(np.float64), exponent)
    if flushed:  # also what would round up to the smallest normal number
        exact = np.where(np.abs(exact) < TINY, np.copysign(0.0, exact), exact)
    r = exact.astype(np.float32)
    quiet_x = np.isnan(x) & (bits(x) & QUIET != 0)
    undefined = (x == 0) & (y == np.inf) | np.isinf(x) & (y == -np.inf)
    r = np.where(undefined, real(np.uint32(0xFFC00000)), r)
    r = np.where(np.isnan(y), nan_of(y), r)
    r = np.where(np.isnan(x), nan_of(x), r)
    return np.where(quiet_x & np.isinf(y), np.where(y > 0, y, np.float32(0)), r)


def getexp(x: np.ndarray) -> np.ndarray:
    r = np.frexp(x.astype(np.float64))[1].astype(np.float32) - 1
    r = np.where(np.isinf(x), np.float32(np.inf), np.where(x == 0, np.float32(-np.inf), r))
    return np.where(np.isnan(x), nan_of(x), r)


def largest_magnitude(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    r = np.where(np.isnan(x) & ~np.isnan(y) | (np.abs(y) > np.abs(x)), np.abs(y), np.abs(x))
    for a in (y, x):  # a signalling NaN of the first comes before one of the second
        r = np.where(np.isnan(a) & (bits(a) & QUIET == 0), nan_of(a), r)
    return r


def fraction(x: np.ndarray) -> np.ndarray:
    """x - floor(x) rounded down, -0 for 0; of infinity +0."""
    exact = x.astype(np.longdouble) - np.floor(x.astype(np.longdouble))
    r = exact.astype(np.float32)
    r = np.where((r > exact) | (x < 0) & (r == 1), np.nextafter(r, np.float32(0)), r)
    r = np.where(r == 0, np.float32(-0.0), np.where(np.isinf(x), np.float32(0), r))
    return np.where(np.isnan(x), nan_of(x), r)


def bf16(x: np.ndarray) -> np.ndarray:
    v = bits(without_denormals(x)).astype(np.uint64)
    rounded = (v + 0x7FFF + (v >> 16 & 1)) >> 16
    return np.where(np.isnan(x), v >> 16 | 0x40, rounded).astype(np.uint16)


def tree(x: np.ndarray, function: object) -> np.ndarray:
    """Halves onto halves, in every lane; gcc's header has the upper one first until 4 are left."""
    for width in (8, 4, 2, 1):
        low, high = x[:, :width], x[:, width : 2 * width]
        x = function(high, low) if width > 2 else function(low, high)
    return np.broadcast_to(x, (len(x), 16))


def greater(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.where(x > y, x, y)  # the second where one is NaN, and of two zeros


def mask(m: np.ndarray) -> np.ndarray:
    whole = np.packbits(m, axis=1, bitorder="little").view(np.uint16).astype(np.uint32)
    return np.broadcast_to(whole, m.shape)


def halves(a: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(a).view(np.uint16)


def expected(x: np.ndarray, y: np.ndarray, z: np.ndarray, flushed: bool) -> dict[str, np.ndarray]:
    """The results [V, 16] of each operation, in the order of avx512_on_avx2/operations.h."""
    i, j = bits(x), bits(y)
    raw, u, v = halves(i), x, y
    if flushed:  # denormal operands of arithmetic; moves and integers have the others
        x, y, z = map(without_denormals, (x, y, z))

    def out(a: np.ndarray) -> np.ndarray:
        return without_denormals(a) if flushed else a

    wide = [a.astype(np.float64) for a in (x, y, z)]
    m = x <= y
    both = np.where(np.arange(32) % 2, halves(j), raw)
    half = raw[:, :16].view(np.float16).astype(np.float32)
    h = raw[:, :16].astype(np.uint32)
    half = np.where(np.isnan(half), real((h & 0x8000) << 16 | 0x7FC00000 | (h & 0x1FF) << 13), half)
    double = np.ascontiguousarray(u).view(np.float64)

    def to_half(a: np.ndarray) -> np.ndarray:
        b = bits(a)
        nan = (b >> 16 & 0x8000 | 0x7E00 | b >> 13 & 0x1FF).astype(np.uint16)
        return np.where(np.isnan(a), nan, a.astype(np.float16).view(np.uint16))

    return {
        "fmadd": (wide[0] * wide[1] + wide[2]).astype(np.float32),
        "fnmadd": (wide[2] - wide[0] * wide[1]).astype(np.float32),
        "max": greater(x, y),
        "min": np.where(x < y, x, y),
        "abs": np.abs(u),
        "range": largest_magnitude(x, y),
        "roundscale": np.where(np.isnan(x), nan_of(x), np.rint(x)),
        "reduce": fraction(x),
        "scalef": scalef(x, y, flushed),
        "getexp": getexp(x),
        "reduce_add": tree(x, lambda a, b: out(a + b)),
        "reduce_max": tree(x, greater),
        "equal": mask(x == y),
        "at most": mask(m),
        "unordered": mask(np.isnan(x) | np.isnan(y)),
        "kortestc": np.broadcast_to((m | (y <= x)).all(1, keepdims=True), x.shape),
        "mask_mov": np.where(m, j, i),
        "maskz_mov": np.where(m, i, 0),
        "mask_mov_epi32": np.where(m, j, i),
        "mask_mov_epi16": both.view(np.uint32),
        "add_epi32": i + j,
        "and": i & j,
        "slli": i << 16,
        "srli": i >> 16,
        "permutexvar": np.take_along_axis(halves(j), raw & 31, 1).view(np.uint32),
        "cvtps_ph": np.concatenate([to_half(x), to_half(y)], 1).view(np.uint32),
        "cvtph_ps": half,
        "maskz_cvtph_ps": half,
        "fmadd_pd": np.ascontiguousarray(double * double + double).view(np.uint32),
        "cvtne2ps_pbh": np.concatenate([bf16(v), bf16(u)], 1).view(np.uint32),
    }


# Which of several NaNs is left, the compiler chooses by the order of operands.
SEVERAL_NANS = {"fmadd": np.float32, "fnmadd": np.float32, "reduce_add": np.float32}
SEVERAL_NANS |= {"fmadd_pd": np.float64}


@pytest.fixture(scope="module")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("instructions") / "check.so"
    flags = ("-std=c++20", "-O1", "-ffp-contract=off", "-w", "-shared", "-fPIC")
    building.run(CXX, *flags, EMULATION / "check.cpp", "-o", library, cwd=EMULATION)
    return ctypes.CDLL(str(library))


def results(function: object, inputs: np.ndarray, flushed: bool) -> tuple[np.ndarray, int]:
    """[V, operation, 16], and what the function returns."""
    count = inputs.shape[1]
    found = np.zeros((count, 30, 16), np.uint32)
    aligned = np.zeros(inputs.size + 16, np.float32)  # one of the operations asks for it
    aligned = aligned[-aligned.ctypes.data % 64 // 4 :][: inputs.size].reshape(inputs.shape)
    aligned[:] = inputs
    at = [ctypes.c_void_p(a.ctypes.data) for a in (*aligned, found)]
    mxcsr = 0x8040 if flushed else 0
    return found, function(*at[:3], ctypes.c_size_t(count), ctypes.c_uint(mxcsr), at[3])


@pytest.mark.parametrize("flushed", [False, True], ids=["denormals", "flushed"])
def test_instructions_are_as_defined(instructions: ctypes.CDLL, flushed: bool) -> None:
    inputs = numbers()
    found, _ = results(instructions.run_emulated, inputs, flushed)
    with np.errstate(all="ignore"):
        wanted = expected(*inputs, flushed)
    for k, (name, true) in enumerate(wanted.items()):
        a = np.ascontiguousarray(found[:, k])
        b = bits(true) if true.dtype == np.float32 else np.ascontiguousarray(true, np.uint32)
        same = a == b
        if name in SEVERAL_NANS:  # and numpy rounds twice
            p, q = (v.view(SEVERAL_NANS[name]) for v in (a, b))
            same = np.isclose(p, q, rtol=3e-7, atol=1e-37, equal_nan=True)
        wrong = np.argwhere(~same)
        assert not len(wrong), (
            f"{name}, at {wrong[0]} of {len(wrong)}: {explain(inputs, wrong[0], a, b)}"
        )


def explain(inputs: np.ndarray, at: np.ndarray, found: np.ndarray, wanted: np.ndarray) -> str:
    row, lane = at
    x, y = (hex(bits(a)[row, lane % 16]) for a in inputs[:2])
    return f"{x}, {y} give {hex(found[row, lane])}, not {hex(wanted[row, lane])}"


def one_nan(name: str, result: np.ndarray) -> np.ndarray:
    result = np.ascontiguousarray(result)
    if name not in SEVERAL_NANS:
        return result
    numbers_ = result.view(SEVERAL_NANS[name])
    return np.where(np.isnan(numbers_), numbers_.dtype.type(np.nan), numbers_).view(np.uint32)


@pytest.mark.parametrize("flushed", [False, True], ids=["denormals", "flushed"])
def test_instructions_are_those_of_the_machine(instructions: ctypes.CDLL, flushed: bool) -> None:
    """Bit for bit, but for which NaN."""
    inputs = numbers()
    found, _ = results(instructions.run_emulated, inputs, flushed)
    true, there = results(instructions.run_real, inputs, flushed)
    if there == 0:
        pytest.skip("this machine has no AVX-512")
    with np.errstate(all="ignore"):
        names = list(expected(*inputs, flushed))
    for k, name in enumerate(names if there == 2 else names[:-1]):
        a, b = (one_nan(name, each[:, k]) for each in (found, true))
        wrong = np.argwhere(a != b)
        assert not len(wrong), f"{name}: {explain(inputs, wrong[0], a, b)}"


def call(environment: dict[str, str], isa: str, *command: str) -> str:
    """Not from the project's folder, whose `fusedkl` is the one without the emulation."""
    done = subprocess.run(
        [sys.executable, *command],
        env=environment | {"FUSEDKL_CPU_ISA": isa}, cwd=HERE, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("isa", ["avx512", "avx512_bf16"])
def test_the_kernels_on_them(environment: dict[str, str], isa: str) -> None:
    where = call(environment, isa, "-c", ASK + "; print(fusedkl.__file__)").split()
    assert where[0] == isa and where[1].startswith(environment["PYTHONPATH"])
    of_kl_div = "forced or length or logarithm or long_sum or half_numbers or special_values"
    suites = [
        (("instruction_sets", *OTHERS), "(numbers or cpu) and not 70001", 500),
        (("kl_div_kernel", "kl_div"), of_kl_div, 30),
    ]
    for files, chosen, least in suites:
        pytest_ = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not full", "-k", chosen)
        summary = call(environment, isa, *pytest_, *(str(HERE / f"test_{f}.py") for f in files))
        assert int(summary.split(" passed")[0].split()[-1]) > least
