"""Deferred softmaxes as tensors: grad mode, changes, errors, threads, transforms, copies."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kl_div_cases import needs_kernel, outcome
from patch_cases import (  # noqa: F401 (fixtures)
    LOSSES,
    Calls,
    N,
    V,
    both,
    logits,
    nothing_left_behind,
    poisoned_memory,
)
from torch import Tensor
from torch.overrides import TorchFunctionMode

import fusedkl
from fusedkl.deferred import Deferred, plan_of
from fusedkl.deferred_kl import SMALLEST

pytestmark = needs_kernel


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def test_small_ones_are_not_deferred() -> None:
    with fusedkl.patch():
        assert type(F.softmax(torch.randn(1, SMALLEST - 1), -1)) is Tensor
        assert type(F.softmax(torch.randn(1, SMALLEST), -1)) is Deferred


def test_metadata_costs_nothing_and_a_value_is_computed_once() -> None:
    x, _ = logits()
    with fusedkl.patch():
        p = F.log_softmax(x, -1)
        assert (p.shape, p.dtype, p.dim(), p.requires_grad) == (x.shape, x.dtype, 2, True)
        assert len(p) == N and p.numel() == N * V and p.device == x.device
        assert isinstance(p, Tensor) and plan_of(p) is not None
        assert torch.equal(p, torch.log_softmax(x, -1)) and plan_of(p) is None
        assert p[0].data_ptr() == p.data_ptr()
        p.data[0] = 7
        assert p[0, 3] == 7


def _assigned(q: Tensor) -> None:
    q.data = torch.zeros(3, 2)


CHANGES: dict[str, Callable[[Tensor], object]] = {
    "squeeze_": lambda q: q.squeeze_(0),
    "t_": lambda q: q.squeeze_(0).t_(),
    "resize_": lambda q: q.resize_(2, 3),
    "data": _assigned,
    "requires_grad_": lambda q: q.requires_grad_(),
    "detach_": lambda q: q.detach_(),
}


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("name", CHANGES)
def test_metadata_that_is_changed_in_place(name: str, grad: bool) -> None:
    x = torch.randn(1, N, V, requires_grad=True)

    def seen() -> Any:
        with torch.set_grad_enabled(grad):
            q = F.softmax(x, -1)
        table = {q: 1}
        CHANGES[name](q)
        found = (q.shape, q.size(), q.dim(), q.ndim, len(q), q.numel(), q.nelement())
        return *found, torch.numel(input=q), q.requires_grad, q.is_leaf, table[q]

    plain = outcome(seen)
    with fusedkl.patch():
        patched = outcome(seen)
    assert (patched.value, patched.error) == (plain.value, plain.error)


def test_kl_div_before_metadata_is_changed_in_place() -> None:
    x, y = logits(torch.float32, 1, N, V)
    wanted = F.kl_div(F.log_softmax(x, -1), F.softmax(y, -1), reduction="none")
    with fusedkl.patch():
        q, graphless = F.softmax(y, -1), F.softmax(y, -1)
        p = F.log_softmax(x, -1)
        first, second = (F.kl_div(p, t, reduction="none") for t in (q, graphless))
        q.data = torch.zeros(3, 2)
        graphless.requires_grad_()
        p.detach_()
        assert torch.equal(first * 1, wanted)
        (second * 1).sum().backward()
    assert graphless.grad is None and x.grad is not None
    torch.testing.assert_close(x.grad, torch.autograd.grad(wanted.sum(), x)[0])


def test_logits_that_require_a_gradient_later_get_none() -> None:
    _, y = logits()
    with fusedkl.patch():
        q = F.softmax(y, -1)
        y.requires_grad_()
        assert not q.requires_grad and not (q * 1).requires_grad


def test_a_parameter_is_made_of_a_detached_result() -> None:
    _, y = logits()
    with fusedkl.patch():
        q = F.softmax(y, -1)
        with pytest.raises(RuntimeError, match=r"detach\(\) returns an instance of the same type"):
            torch.nn.Parameter(q)
        assert torch.equal(torch.nn.Parameter(q.detach()), torch.softmax(y, -1))


WITHOUT_MEMORY = """
import torch, fusedkl
import torch.nn.functional as F
from torch.utils.dlpack import to_dlpack
x = torch.randn(4, 8192)
wanted = torch.softmax(x, -1)
names = {"softmax": lambda t: F.softmax(t, -1), "log_softmax": lambda t: t.log_softmax(-1),
         "kl_div": lambda t: F.kl_div(t.log_softmax(-1), t.softmax(-1), reduction="none")}
def assigned(value):
    w = torch.nn.Parameter(torch.randn(2, 3))
    w.data = value
    return w
with fusedkl.patch():
    for grad in (False, True):
        for name, function in names.items():
            uses = [lambda t: assigned(t).sum(), lambda t: assigned(t)[0, 0].item()]
            for use in uses if grad else [*uses, to_dlpack]:  # which takes none with a gradient
                try:
                    use(function(x.clone().requires_grad_(grad)))
                except RuntimeError as error:
                    assert f"what {name} returned" in str(error), error
                else:
                    raise AssertionError(name)
    assert torch.equal(assigned(F.softmax(x, -1).detach()), wanted)
    assert torch.equal(torch.from_dlpack(to_dlpack(F.softmax(x, -1).detach())), wanted)
"""


@pytest.mark.slow
def test_code_that_reads_the_memory_gets_an_error_and_no_null_pointer() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_MEMORY], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])


def test_a_written_result_is_not_fused() -> None:
    x, y = logits()
    with fusedkl.patch():
        q = F.softmax(y, -1)
        alias = q
        q[:, 0] = 0
        q *= 2
        assert (alias[:, 0] == 0).all()
        patched = F.kl_div(F.log_softmax(x, -1), alias, reduction="sum")
    q = F.softmax(y, -1)
    q[:, 0] = 0
    torch.testing.assert_close(patched, F.kl_div(F.log_softmax(x, -1), q * 2, reduction="sum"))


def test_a_result_written_after_kl_div_does_not_change_it() -> None:
    x, y = logits()
    wanted = F.kl_div(F.log_softmax(x, -1), F.softmax(y, -1), reduction="none")
    with fusedkl.patch():
        q = F.softmax(y, -1)
        elements, row = (F.kl_div(F.log_softmax(x, -1), q, reduction="none") for _ in range(2))
        q.zero_()
        assert torch.equal(elements * 1, wanted)
        torch.testing.assert_close(row.sum(-1), wanted.sum(-1), rtol=1e-5, atol=0)


def test_no_grad_at_creation_holds_for_the_teacher() -> None:
    x, y = logits()
    y.requires_grad_()
    with fusedkl.patch():
        with torch.no_grad():
            q, copy_of_q = F.softmax(y, -1), F.softmax(y, -1)
        loss = F.kl_div(F.log_softmax(x, -1), q, reduction="batchmean")
        assert not q.requires_grad and not (copy_of_q * 1).requires_grad
        loss.backward()
        assert y.grad is None and x.grad is not None
        with torch.no_grad():
            unreduced = F.kl_div(F.log_softmax(x, -1), q, reduction="none")
        assert not unreduced.sum(-1).requires_grad
        p = F.log_softmax(x, -1)
        with torch.no_grad():
            assert (p * 1).grad_fn is None and p.grad_fn is not None


@pytest.mark.parametrize("use", ["kl_div", "anything"])
@pytest.mark.parametrize("change", ["add_", "resize_", "set_"])
def test_changed_logits_raise(change: str, use: str) -> None:
    x, y = logits()
    with fusedkl.patch():
        p, q = F.log_softmax(x, -1), F.softmax(y, -1)
        {
            "add_": lambda: y.add_(1),
            "resize_": lambda: y.resize_(N, V - 1),
            "set_": lambda: y.set_(torch.randn(N, V)),
        }[change]()
        with pytest.raises(
            RuntimeError,
            match=r"given to softmax were changed in place or resized|"
            r"given to kl_div were changed",
        ):
            if use == "kl_div":
                F.kl_div(p, q, reduction="sum")
            else:
                q * 2


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("who", ["policy", "teacher"])
def test_changed_between_forward_and_backward_raises(who: str, reduction: str) -> None:
    x, y = logits()
    with fusedkl.patch():
        z = x * 1
        loss = F.kl_div(F.log_softmax(z, -1), F.softmax(y, -1), reduction=reduction)
        loss = loss if reduction == "sum" else loss.sum(-1).sum()
        (z.detach() if who == "policy" else y).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_autocast_state_of_creation() -> None:
    x, y = logits(torch.bfloat16)

    def loss(a: Tensor, b: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            p, q = F.log_softmax(a, -1), F.softmax(b, -1)
            inside = F.kl_div(p, q, reduction="batchmean")
        return inside + F.kl_div(p, q, reduction="batchmean")

    results = both(loss, x, y)
    assert results[0][0].dtype == results[1][0].dtype == torch.float32
    with fusedkl.patch(), torch.autocast("cpu", torch.bfloat16):
        p = F.kl_div(F.log_softmax(x, -1), F.softmax(y, -1), reduction="none")
        assert p.dtype == torch.float32
    assert (p * 1).dtype == torch.float32  # computed outside, as if inside


def test_warnings_and_errors_are_torchs() -> None:
    x, y = logits()

    def mean(reduction: str, **kwargs: Any) -> Any:
        return F.kl_div(F.log_softmax(x, -1), F.softmax(y, -1), reduction=reduction, **kwargs)

    for arguments in (
        {"reduction": "mean"},
        {"reduction": "avg"},
        {"reduction": "sum", "log_target": 1},
    ):
        plain = outcome(mean, **arguments)
        with fusedkl.patch():
            patched = outcome(mean, **arguments)
        assert (patched.error, patched.warned, patched.where) == (
            plain.error,
            plain.warned,
            plain.where,
        )


def test_torch_func_and_copies() -> None:
    x, y = logits()
    with fusedkl.patch():
        q = F.softmax(y, -1)
        found = torch.func.grad(lambda a: (a * q).sum())(x.detach())
        assert torch.equal(found, torch.softmax(y, -1) * 1)
        assert torch.equal(q * 1, found)  # computed inside, usable outside
        again = torch.func.grad(lambda a: LOSSES["sum"](a, y))(x.detach())
        for made in (
            copy.deepcopy(F.softmax(y, -1)),
            pickle.loads(pickle.dumps(F.softmax(y, -1))),
            torch.from_numpy(F.softmax(y, -1).numpy()),
        ):
            assert type(made) is Tensor and torch.equal(made, found)
    torch.testing.assert_close(again, torch.softmax(x, -1) - found, rtol=1e-4, atol=1e-7)


def test_other_threads(calls: Calls) -> None:
    """As DataParallel does it: forward in threads, each with its own grad mode, and a sum."""
    x, y = logits()
    losses: list[Any] = [None] * 4

    def work(i: int) -> None:
        with torch.set_grad_enabled(i != 3):
            losses[i] = LOSSES["sum"](x, y)

    with fusedkl.patch():
        shared = F.softmax(y, -1)
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        threads += [threading.Thread(target=lambda: shared * 1) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        sum(losses).backward()
    assert calls.fused == 4 and not losses[3].requires_grad
    wanted = torch.softmax(x, -1) - torch.softmax(y, -1)
    torch.testing.assert_close(x.grad, 3 * wanted.detach(), rtol=1e-4, atol=1e-7)


def test_unpatched_in_between() -> None:
    x, y = logits()
    with fusedkl.patch():
        p, q = F.log_softmax(x, -1), F.softmax(y, -1)
        kept = torch.softmax
    torch.testing.assert_close(
        F.kl_div(p, q, reduction="sum"), LOSSES["sum"](x, y), rtol=1e-5, atol=0
    )
    assert type(kept(y, -1)) is Tensor and torch.equal(q * 1, kept(y, -1))


class Seen(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_inference_tensors_and_modes_are_left_to_torch() -> None:
    _, y = logits()
    with torch.inference_mode():
        made_inside = y * 1
    with fusedkl.patch():
        assert type(F.softmax(made_inside, -1)) is Tensor
        with torch.inference_mode():
            assert type(F.softmax(y, -1)) is Tensor
        with Seen() as mode:
            y.softmax(-1)
        assert mode.names == ["softmax"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript_sees_torchs_functions() -> None:
    def function(a: Tensor) -> Tensor:
        return torch.softmax(a, -1) + F.log_softmax(a, -1) + a.softmax(-1)

    _, y = logits()
    wanted = function(y)
    with fusedkl.patch():
        torch.testing.assert_close(torch.jit.script(function)(y), wanted)
        torch.testing.assert_close(torch.jit.trace(function, y)(y), wanted)


# Dynamo's own look at .grad where it resumes after a graph break.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_compiled_code_gets_torchs_functions_and_deferred_inputs() -> None:
    torch._dynamo.reset()
    x, y = logits()
    with fusedkl.patch():
        compiled = torch.compile(LOSSES["reverse"], fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, y), LOSSES["reverse"](x, y), rtol=1e-5, atol=0)
        kl = torch.compile(lambda p, q: F.kl_div(p, q, reduction="sum"), backend="aot_eager")
        loss = kl(F.log_softmax(x, -1), F.softmax(y, -1))
        loss.backward()
    torch.testing.assert_close(loss, LOSSES["sum"](x, y), rtol=1e-5, atol=0)
    assert x.grad is not None
    torch.testing.assert_close(
        x.grad, (torch.softmax(x, -1) - torch.softmax(y, -1)).detach(), rtol=1e-4, atol=1e-7
    )
    torch._dynamo.reset()
