"""The kl_div kernels: accuracy, ends of loops, threads, instruction sets, and their absence."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mpmath
import pytest
import torch
import torch.nn.functional as F
from kl_div_cases import DTYPES, needs_kernel, pair
from torch import Tensor

import fusedkl
from fusedkl import kl_div_ops

both_targets = pytest.mark.parametrize("log_target", [False, True], ids=["prob", "log"])
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
pytestmark = needs_kernel

SUM = torch.ops.fusedkl.kl_div_sum.default
BACKWARD = torch.ops.fusedkl.kl_div_backward.default


def flat(n: int, dtype: torch.dtype, log_target: bool) -> tuple[Tensor, Tensor]:
    """n elements of rows of 50, whose probabilities float16 can still hold."""
    x, t = pair((n // 50 + 1, 50), dtype, log_target, grad=False)
    return x.flatten()[:n], t.flatten()[:n]


def everything(x: Tensor, t: Tensor, log_target: bool, divisor: float = 3.0) -> list[Tensor]:
    """The value and the gradients to input alone, to target alone, and to both."""
    grad = torch.full((), -0.75, dtype=x.dtype)
    alone = BACKWARD(grad, None, t, log_target, divisor, True, False)
    other = BACKWARD(grad, x, t, log_target, divisor, False, True)
    both = BACKWARD(grad, x, t, log_target, divisor, True, True)
    assert alone[1].shape == other[0].shape == (0,)
    assert torch.equal(alone[0], both[0]) and torch.equal(other[1], both[1])
    return [SUM(x, t, log_target, divisor), *both]


@both_targets
@all_dtypes
def test_every_length(dtype: torch.dtype, log_target: bool) -> None:
    """Ends of vectors, of 32-lane steps, of folds (512) and of chunks (16384), against float64."""
    long_x, long_t = flat(2 * 16384 + 70, dtype, log_target)
    lengths = [*range(1, 70), 511, 512, 513, 543, 16383, 16384, 16385, 32768, 2 * 16384 + 70]
    for n in lengths:
        x, t = long_x[:n], long_t[:n]
        exact = everything(x.double(), t.double(), log_target)
        terms = F.kl_div(x.double(), t.double(), reduction="none", log_target=log_target)
        wanted = [terms.sum() / 3, *_gradients(x.double(), t.double(), log_target)]
        for a, b in zip(exact, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
        for a, b in zip(everything(x, t, log_target), exact, strict=True):
            torch.testing.assert_close(a, b.to(dtype), atol=2e-6, rtol=torch.finfo(dtype).eps)


def _gradients(x: Tensor, t: Tensor, log_target: bool) -> list[Tensor]:
    g = -0.75 / 3
    if log_target:
        return [-g * t.exp(), g * t.exp() * (t - x + 1)]
    return [-g * t, g * (t.log() + 1 - x)]


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_logarithm_and_exponential(dtype: torch.dtype) -> None:
    """Within 1.5 units in the last place (of 60 digits), subnormal numbers included."""
    info = torch.finfo(dtype)
    steps = torch.randn(400, dtype=torch.float64)
    spread = steps * (12 if dtype == torch.float32 else 90)
    extremes = [info.smallest_normal, info.smallest_normal / 8, info.max, info.eps, 1.0, 2.0, 0.5]
    near_one = 1 + steps * torch.tensor([1e-3, 1e-6]).repeat(200)
    for t in torch.cat([spread.exp(), near_one, torch.tensor(extremes, dtype=torch.float64)]).to(
        dtype
    ):
        # x = 0 leaves t log t
        _close(SUM(t.new_zeros(1), t[None], False, 1.0), t, "t log t")
    ends = [-103.0, -88.0, 88.7] if dtype == torch.float32 else [-744.0, -709.0, 709.7]
    one = torch.ones((), dtype=dtype)
    for t in torch.cat([spread, steps, torch.tensor([*ends, 0.0, -0.0, 1e-30])]).to(dtype):
        if ends[0] <= t <= ends[2]:
            _close(-BACKWARD(one, None, t[None], True, 1.0, True, False)[0], t, "exp")


def test_approximations_have_no_bias() -> None:
    """Where a reduced argument is largest, an approximation's own error shows in the mean."""
    one, eps = torch.ones(()), torch.finfo(torch.float32).eps
    for low, high in ((0.7072, 0.75), (1.33, 1.4142)):
        t = torch.linspace(low, high, 200_000)
        found = BACKWARD(one, torch.zeros_like(t), t, False, 1.0, False, True)[1]  # log t + 1
        wanted = t.double().log() + 1
        assert (found - wanted).mean().abs() < 0.05 * eps
    for low, high in ((-0.346, -0.3), (0.3, 0.346)):
        t = torch.linspace(low, high, 200_000)
        found = -BACKWARD(one, None, t, True, 1.0, True, False)[0]
        assert (found - t.double().exp()).mean().abs() < 0.05 * eps


def _close(found: Tensor, argument: Tensor, what: str) -> None:
    a = mpmath.mpf(float(argument))
    with mpmath.workdps(60):
        exact = a * mpmath.log(a) if what == "t log t" else mpmath.exp(a)
        info = torch.finfo(found.dtype)
        if abs(exact) > info.max:
            assert found.isinf()
            return
        unit = mpmath.mpf(info.smallest_normal) * info.eps
        if exact != 0:
            exponent = mpmath.floor(mpmath.log(abs(exact), 2))
            unit = max(unit, mpmath.mpf(2) ** exponent * info.eps)
        assert abs(mpmath.mpf(float(found)) - exact) <= 1.5 * unit, (what, float(argument))


@both_targets
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_long_sum(dtype: torch.dtype, log_target: bool) -> None:
    """The error does not grow with the length: two million elements, no worse than torch."""
    x, t = pair((16, 131072), dtype, log_target, grad=False)
    exact = F.kl_div(x.double(), t.double(), reduction="sum", log_target=log_target)
    if dtype == torch.float64:
        terms = F.kl_div(x, t, reduction="none", log_target=log_target).flatten()
        exact = terms.view(-1, 128).sum(1).sort().values.sum()
    ours = (SUM(x, t, log_target, 1.0).double() - exact).abs() / exact
    assert ours <= 0.6 * torch.finfo(dtype).eps * (1 if dtype == torch.float32 else 8)


def test_equal_terms_do_not_drift() -> None:
    """float32 lanes are emptied into float64 before rounding errors of one sign add up."""
    n = 1 << 20
    for term in (0.1, 1 / 3, 0.7):
        x = torch.full((n,), -term)
        total = SUM(x, torch.ones(n), False, 1.0).double()
        assert abs(total / (n * -x[0].double()) - 1) < 3e-7
        total = SUM(x, torch.zeros(n), True, 1.0).double()
        assert abs(total / (n * -x[0].double()) - 1) < 3e-7


@both_targets
@all_dtypes
def test_same_bits_for_any_number_of_threads(dtype: torch.dtype, log_target: bool) -> None:
    x, t = flat(350_005, dtype, log_target)
    found = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        found.append(everything(x, t, log_target))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@both_targets
@all_dtypes
def test_same_bits_at_any_address(dtype: torch.dtype, log_target: bool) -> None:
    x, t = flat(1003, dtype, log_target)
    wanted = everything(x, t, log_target)
    for offset in (1, 3, 7):
        moved = [torch.cat([v.new_full((offset,), torch.nan), v])[offset:] for v in (x, t)]
        found = everything(moved[0], moved[1], log_target)
        assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_all_half_numbers(dtype: torch.dtype) -> None:
    """Every one of the 65536 is read and, rounded to nearest even, written as torch does."""
    bits = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype)
    grad = torch.full((), -1.0, dtype=dtype)
    (same, _) = BACKWARD(grad, None, bits, False, 1.0, True, False)
    assert torch.equal(same.nan_to_num(7), bits.nan_to_num(7))
    assert torch.equal(same.isnan(), bits.isnan())
    (scaled, _) = BACKWARD(grad, None, bits, False, 3.0, True, False)
    wanted = (bits.float() * torch.tensor(1 / 3)).to(dtype)
    assert torch.equal(scaled.nan_to_num(7), wanted.nan_to_num(7))
    if dtype == torch.float16:
        (overflow, _) = BACKWARD(grad, None, bits, False, 0.25, True, False)
        assert torch.equal(overflow.nan_to_num(7), (bits.float() * 4).to(dtype).nan_to_num(7))


@both_targets
@all_dtypes
def test_kernels_match_their_compositions(dtype: torch.dtype, log_target: bool) -> None:
    x, t = pair((3, 50), dtype, log_target, grad=False)
    grad = torch.full((), -0.75, dtype=dtype)
    tolerance: dict[str, Any] = {"atol": 2e-6, "rtol": torch.finfo(dtype).eps * 2}
    torch.testing.assert_close(
        SUM(x, t, log_target, 3.0), kl_div_ops._composed_sum(x, t, log_target, 3.0), **tolerance
    )
    for wanted in ((True, False), (False, True), (True, True), (False, False)):
        options = (grad, x, t, log_target, 3.0, *wanted)
        torch.testing.assert_close(
            BACKWARD(*options), kl_div_ops._composed_backward(*options), **tolerance
        )


def test_operators_refuse_what_they_cannot_read() -> None:
    x, t = pair((4, 6), torch.float32, False, grad=False)
    one = torch.ones(())
    for bad, match in (
        ((x, t.double()), "one dtype"),
        ((x, t[:2]), "one shape"),
        ((x, t.flatten()), "one shape"),
        ((x[:, ::2], t[:, ::2]), "contiguous"),
        ((x[:1].expand(4, 6), t), "contiguous"),
        ((x.T, t.T), "contiguous"),
        ((x.int(), t.int()), "must be float32"),
    ):
        with pytest.raises(RuntimeError, match=match):
            SUM(*bad, False, 1.0)
        with pytest.raises(RuntimeError, match=match):
            BACKWARD(one.to(bad[1].dtype), *bad, False, 1.0, True, True)
    with pytest.raises(RuntimeError, match="needs input"):
        BACKWARD(one, None, t, False, 1.0, False, True)
    for grad in (one.double(), torch.ones(2)):
        with pytest.raises(RuntimeError, match="grad must be one number"):
            BACKWARD(grad, x, t, False, 1.0, True, True)


@both_targets
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype, log_target: bool) -> None:
    x, t = pair((4, 6), dtype, log_target, grad=False)
    grad = torch.ones((), dtype=dtype)
    torch.library.opcheck(SUM, (x, t, log_target, 2.0))
    for given, wanted in ((None, (True, False)), (x, (False, True)), (x, (True, True))):
        torch.library.opcheck(BACKWARD, (grad, given, t, log_target, 2.0, *wanted))


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    """Offsets are 64-bit. The pages are never written but for the last: reading takes no memory."""
    torch.use_deterministic_algorithms(False)  # which would fill, and so touch, what empty() gives
    n = 2**31 + 40
    x, t = torch.empty(2, n, dtype=torch.bfloat16).unbind()
    x[-1], t[-1] = -3.0, 0.5
    x[-33], t[-33] = -1.0, 1.0
    assert SUM(x, t, False, 1.0) == torch.tensor(0.5 * (3 - 0.6931471805599453) + 1).bfloat16()


@pytest.mark.parametrize(
    "isa",
    [
        pytest.param("portable", marks=pytest.mark.slow),
        *(pytest.param(isa, marks=pytest.mark.full) for isa in ("avx2", "avx512", "avx512_bf16")),
    ],
)
def test_instruction_sets(isa: str) -> None:
    """The numerical tests again, each instruction set forced in a process of its own."""
    here = Path(__file__)
    names = "forced or length or logarithm or long_sum or address or half_numbers or special_values"
    files = [str(here), str(here.with_name("test_kl_div.py"))]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *files, "-qx", "-p", "no:cacheprovider", "-k", names],
        env={**os.environ, "FUSEDKL_CPU_ISA": isa, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        cwd=here.parents[1],
    )
    if "names an instruction set that this machine" in done.stdout + done.stderr:
        pytest.skip(f"this machine or build has no {isa}")
    assert done.returncode == 0, done.stdout[-3000:]


def test_forced_instruction_set_runs() -> None:
    runs = torch.ops.fusedkl._cpu_isa()
    assert runs == os.environ.get("FUSEDKL_CPU_ISA", runs)


WITHOUT_LIBRARY = """
import torch, fusedkl
import torch.nn.functional as F
from fusedkl import kl_div_ops
assert not kl_div_ops.HAS_CPU_KERNEL
x = torch.log_softmax(torch.randn(3, 5), -1).requires_grad_()
t = torch.softmax(torch.randn(3, 5), -1).requires_grad_()
for reduction in ("none", "sum", "batchmean"):
    ours, theirs = (f(x, t, reduction=reduction) for f in (fusedkl.kl_div, F.kl_div))
    assert torch.equal(ours, theirs)
    grads = [torch.autograd.grad(v.sum(), (x, t)) for v in (ours, theirs)]
    assert all(torch.equal(a, b) for a, b in zip(*grads))
with fusedkl.patch():
    assert torch.equal(F.kl_div(x, t, reduction="batchmean"), theirs)
value = torch.ops.fusedkl.kl_div_sum(x.detach(), t.detach(), False, 3.0)
torch.testing.assert_close(value, theirs.detach())
got = torch.ops.fusedkl.kl_div_backward(torch.ones(()), x, t.detach(), False, 3.0, True, True)
torch.testing.assert_close(list(got), list(grads[1]))
print("done")
"""


@pytest.mark.slow
def test_without_the_library(tmp_path: Path) -> None:
    """In a copy of the package without it: torch's composition, also behind the operators."""
    source = Path(fusedkl.__file__).parent
    ignore = shutil.ignore_patterns("_C*", "__pycache__")
    shutil.copytree(source, tmp_path / "fusedkl", ignore=ignore)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_LIBRARY],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.stdout.strip() == "done", done.stderr
