"""Every instruction set forced in turn, in a process of its own, against float64."""

from __future__ import annotations

import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cases
import oracle
import pytest
import torch
from torch import Tensor

import fusedkl
from fusedkl import _library
from fusedkl.backends import BACKENDS

WHY_NOT = BACKENDS["cpu"].why_not(torch.device("cpu"))
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
NAMES = ["portable", "avx2", "avx512", "avx512_bf16"]
VARIABLE = "FUSEDKL_CPU_ISA"
# What each needs, as the system names it; a machine without is the only reason to skip one.
FLAGS = {"avx2": ["avx2", "fma", "f16c"], "avx512": ["avx512f"], "avx512_bf16": ["avx512_bf16"]}
# Part of a vector, a vector and one, a block and one, two segments.
WIDTHS = [1, 7, 33, 2049, pytest.param(70_001, marks=pytest.mark.slow)]
NOT_THERE = "names an instruction set that this machine or build lacks"


def rows(width: int, holes: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Near, middling and far rows [3, V], with -inf where `holes` says."""
    policy = 3 * torch.randn(3, width, dtype=torch.float64)
    noise = torch.randn(3, width, dtype=torch.float64)
    reference = policy + noise * torch.tensor([[0.02], [0.7], [5.0]])
    hidden = torch.rand(3, width) < 0.4
    hidden[:, -1] = False
    if holes in ("both", "policy"):
        policy[hidden] = -torch.inf
    if holes in ("both", "reference"):
        reference[hidden] = -torch.inf
    return policy.to(dtype), reference.to(dtype)


def divergences(policy: Tensor, reference: Tensor, kind: str, **options: object) -> list[Tensor]:
    x, y = policy.clone().requires_grad_(), reference.clone().requires_grad_()
    value = fusedkl.divergence(x, y, kind, **options)
    # A loss scale: float16 cannot hold the small elements of a gradient otherwise.
    value.backward(torch.full_like(value, 2.0**10))
    assert x.grad is not None and y.grad is not None
    return [value.detach(), x.grad, y.grad]


@pytest.mark.parametrize("holes", ["none", "both", "policy", "reference"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_numbers_of_divergences(dtype: torch.dtype, width: int, holes: str) -> None:
    policy, reference = rows(width, holes, dtype)
    mask = torch.tensor([True, True, True])
    for kind in cases.KINDS:
        for temperature in (1.0, torch.tensor([0.7, 1.0, 2.5])):
            options = {"temperature": temperature, "mask": mask}
            found = divergences(policy, reference, kind, backend="cpu", **options)
            true = divergences(
                policy.double(), reference.double(), kind, backend="reference", **options
            )
            error = oracle.relative_error(found[0], true[0], 1e-12)
            assert error <= oracle.VALUE_TOLERANCE[found[0].dtype], f"{kind}: {error:.1e}"
            for a, b in zip(found[1:], true[1:], strict=True):
                error = oracle.relative_l2(a, b, 2.0**10 * 1e-9)
                assert error <= oracle.GRADIENT_TOLERANCE[dtype], f"d {kind}: {error:.1e}"
        spoilt = policy.clone(), reference.clone()
        spoilt[0][1], spoilt[1][1] = torch.nan, torch.nan
        mask[1] = False
        whole = divergences(policy, reference, kind, backend="cpu")
        for a, b in zip(divergences(*spoilt, kind, backend="cpu", mask=mask), whole, strict=True):
            assert torch.equal(a[::2].nan_to_num(7), b[::2].nan_to_num(7))
            assert torch.equal(a[1], torch.zeros_like(a[1]))


@pytest.mark.slow
@pytest.mark.parametrize("holes", ["none", "both", "policy"])
@pytest.mark.parametrize("width", [*WIDTHS[:-1], pytest.param(70_001, marks=pytest.mark.full)])
@pytest.mark.parametrize("dtype", [d for d in cases.DTYPES if d != torch.float64], ids=str)
def test_numbers_under_a_softcap(dtype: torch.dtype, width: int, holes: str) -> None:
    """Caps from nearly the identity to one that most logits have reached, at any temperature."""
    policy, reference = rows(width, holes, dtype)
    temperature = torch.tensor([0.7, 1.0, 2.5])
    for softcap, kind in itertools.product((1.0, 8.0, 1e3), ("jeffreys", "jsd", "tvd")):
        options = {"softcap": softcap, "temperature": temperature}
        found = divergences(policy, reference, kind, backend="cpu", **options)
        exact = policy.double(), reference.double()
        true = divergences(*exact, kind, backend="reference", **options)
        error = oracle.relative_error(found[0], true[0], 1e-12)
        assert error <= oracle.VALUE_TOLERANCE[found[0].dtype], f"{kind}, {softcap}: {error:.1e}"
        for a, b in zip(found[1:], true[1:], strict=True):
            error = oracle.relative_l2(a, b, 2.0**10 * 1e-9)
            assert error <= oracle.GRADIENT_TOLERANCE[dtype], f"d {kind}, {softcap}: {error:.1e}"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_numbers_of_one_distribution(dtype: torch.dtype, width: int) -> None:
    logits, _ = rows(width, "both", dtype)
    ids = torch.tensor([[width - 1, 0]]).expand(3, 2)
    for temperature in (1.0, 0.7):
        for name in ("entropy", "logsumexp", "logprob", "log_softmax"):
            found = []
            for z, backend in ((logits, "cpu"), (logits.double(), "reference")):
                leaf = z.clone().requires_grad_()
                if name == "log_softmax":
                    out = fusedkl.log_softmax(leaf, dtype=torch.float64, backend=backend)
                elif name == "logprob":
                    out = fusedkl.selective_log_softmax(
                        leaf, ids, temperature=temperature, backend=backend
                    )
                else:
                    function = getattr(fusedkl, name)
                    out = function(leaf, temperature=temperature, backend=backend)
                scale = 1.0 if name == "log_softmax" else 2.0**10  # what float16 can hold
                (scale * out.masked_fill(out == -torch.inf, 0)).sum().backward()
                assert leaf.grad is not None
                found.append((out.detach(), leaf.grad))
            (value, gradient), (true, true_gradient) = found
            if name in ("logprob", "log_softmax"):  # absolute below 1, relative above
                error = oracle.relative_error(value, true, 1.0)
                limit = 1e-12 if dtype == torch.float64 else 1e-6
            else:
                error = oracle.relative_error(value, true, 1e-12)
                limit = oracle.VALUE_TOLERANCE[value.dtype]
            assert error <= limit, f"{name}: {error:.1e}"
            error = oracle.relative_l2(gradient, true_gradient, 2.0**10 * 1e-6)
            assert error <= oracle.GRADIENT_TOLERANCE[dtype], f"d {name}: {error:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize("drift", [0.3, 3.0, -30.0])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_numbers_of_rows_that_drifted(dtype: torch.dtype, width: int, drift: float) -> None:
    """All logits higher by as much: nothing to a distribution, and much to 16-bit differences."""
    reference = (4 * torch.randn(3, width)).to(dtype)
    noise = torch.tensor([[0.0], [0.02], [0.7]]) * torch.randn(3, width)
    policy = (reference.float() + drift + noise).to(dtype)
    exact = policy.double(), reference.double()
    for kind in (*cases.KINDS, "jsd"):
        found = divergences(policy, reference, kind, backend="cpu")
        true = divergences(*exact, kind, backend="reference")
        error = oracle.relative_error(found[0], true[0], 1e-12)
        assert error <= oracle.VALUE_TOLERANCE[found[0].dtype], f"{kind}: {error:.1e}"
        for a, b in zip(found[1:], true[1:], strict=True):
            error = oracle.relative_l2(a, b, 2.0**10 * 1e-9)
            assert error <= oracle.GRADIENT_TOLERANCE[dtype], f"d {kind}: {error:.1e}"
    if abs(drift) == 3 and width > 1000:  # what fp32 rows of these numbers have, for its price
        wide = policy.float(), reference.float()
        for kind in cases.KINDS:
            value = fusedkl.divergence(policy, reference, kind, backend="cpu")
            assert torch.equal(value[:2], fusedkl.divergence(*wide, kind, backend="cpu")[:2])


def test_numbers_of_a_peaked_row_that_drifted() -> None:
    """The gradients of its tokens nearly cancel, which a sweep over parts of the row cannot see."""
    policy = torch.tensor([[30.0, -0.0029296875]]).bfloat16()
    reference = torch.tensor([[7.84375, 0.56640625]]).bfloat16()
    found = divergences(policy, reference, "reverse_kl", backend="cpu")
    true = divergences(policy.double(), reference.double(), "reverse_kl", backend="reference")
    for a, b in zip(found[1:], true[1:], strict=True):
        assert oracle.relative_l2(a, b) <= oracle.GRADIENT_TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("dtypes", [(0, 1), (1, 0), (2, 1), (0, 3)])
def test_numbers_of_two_dtypes(dtypes: tuple[int, int]) -> None:
    policy, reference = (
        t.to(cases.DTYPES[i])
        for t, i in zip(rows(2049, "none", torch.float32), dtypes, strict=True)
    )
    for kind in cases.KINDS:
        found = divergences(policy, reference, kind, backend="cpu")
        true = divergences(policy.double(), reference.double(), kind, backend="reference")
        assert oracle.relative_error(found[0], true[0]) <= 1e-5
        for a, b in zip(found[1:], true[1:], strict=True):
            assert oracle.relative_l2(a, b) <= oracle.GRADIENT_TOLERANCE[a.dtype]


def run(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, VARIABLE: isa, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
    )


def machine_has(isa: str) -> bool:
    """By the system's own account: a build that lost a path must not pass by skipping."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return True
    return all(flag in flags for flag in FLAGS.get(isa, []))


ASK = "import torch, fusedkl; print(torch.ops.fusedkl._cpu_isa())"


OTHERS = ("values", "gradients", "edges", "regressions", "inplace_grad")


@pytest.mark.parametrize(
    "others",
    [
        pytest.param((), marks=(pytest.mark.slow, pytest.mark.sample), id="here"),
        pytest.param(OTHERS, marks=pytest.mark.full, id="everywhere"),
    ],
)
@pytest.mark.parametrize("isa", NAMES)
def test_instruction_set(isa: str, others: tuple[str, ...]) -> None:
    """The tests of numbers above, and of the other files, again."""
    asked = run(isa, "-c", ASK)
    if NOT_THERE in asked.stderr:
        assert not machine_has(isa), "the machine has it, the build does not"
        pytest.skip(f"this machine has no {isa}")
    assert asked.stdout.strip() == isa, asked.stderr
    here = Path(__file__)
    files = [here, *(here.with_name(f"test_{name}.py") for name in others)]
    chosen = "not full", "(numbers or cpu) and not 70001"
    done = run(
        isa,
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", chosen[0], "-k", chosen[1]),
        *map(str, files),
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert int(done.stdout.split(" passed")[0].split()[-1]) > (500 if others else 20)


@pytest.mark.slow
def test_each_table_has_the_instructions_of_its_name() -> None:
    """In the library's machine code: a table compiled for less gives the same numbers, unseen."""
    objdump, library = shutil.which("objdump"), _library.find("_C")
    if objdump is None or platform.machine() != "x86_64":
        pytest.skip("no objdump" if objdump is None else "not x86-64")
    assert library is not None
    code = subprocess.run([objdump, "-d", library], capture_output=True, text=True, check=True)
    for instruction in ("vfmadd[0-9]+ps .*%ymm", "vfmadd[0-9]+ps .*%zmm", "vcvtne2ps2bf16"):
        assert re.search(instruction, code.stdout), instruction


COMPUTE = (
    "import torch, fusedkl; "
    "x = torch.randn(2, 9); print(fusedkl.forward_kl(x, x + 1, backend='cpu'))"
)


@pytest.mark.slow
@pytest.mark.parametrize(("wrong", "code"), [("avx512,avx2", ASK), ("AVX2", COMPUTE)])
def test_a_wrong_name_is_an_error_that_lists_the_right_ones(wrong: str, code: str) -> None:
    done = run(wrong, "-c", code)
    assert done.returncode == 1 and not done.stdout  # an exception, not a crash
    last = done.stderr.strip().splitlines()[-1]
    assert "Error" in last and VARIABLE in last
    assert ", ".join(NAMES) in last
