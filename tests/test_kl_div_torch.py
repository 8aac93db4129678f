"""kl_div in the rest of torch: modes, subclasses, autocast, fake tensors, compile, export."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kl_div_cases import counted, needs_kernel, outcome, pair, quiet, same_meta
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fusedkl
from fusedkl import KLDivLoss, kl_div
from fusedkl.kl_div_ops import observed

both_targets = pytest.mark.parametrize("log_target", [False, True], ids=["prob", "log"])
all_reductions = pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])

Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


class Recording(torch.Tensor):
    calls: list[Call] = []  # noqa: RUF012  shared on purpose

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.kl_div:
            cls.calls.append((func, args, kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})


class RecordingMode(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.kl_div:
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("which", [0, 1])
def test_torch_function_of_a_subclass(which: int) -> None:
    x, t = pair((3, 5), torch.float32, False, grad=False)
    found = []
    for function in (kl_div, F.kl_div):
        given = [x, t]
        given[which] = given[which].as_subclass(Recording)
        Recording.calls = []
        found.append((outcome(function, *given, None, None, "batchmean"), Recording.calls))
    (ours, our_calls), (theirs, their_calls) = found
    assert type(ours.value) is type(theirs.value) is Recording
    assert len(our_calls) == len(their_calls) == 1
    for (function, args, kwargs), (_, their_args, their_kwargs) in zip(
        our_calls, their_calls, strict=True
    ):
        assert function is F.kl_div  # a table made from torch's names finds it
        assert len(args) == len(their_args) == 2
        assert kwargs == their_kwargs
        assert list(kwargs) == ["size_average", "reduce", "reduction", "log_target"]


class Wrapping(torch.Tensor):
    """A wrapper as distributed and quantised tensors are: no data of its own, its own dispatch."""

    inner: Tensor
    seen: list[str] = []  # noqa: RUF012  shared on purpose

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapping:
        outer: Wrapping = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        outer.inner = inner
        return outer

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        cls.seen.append(str(func))
        bare = [a.inner if isinstance(a, Wrapping) else a for a in args]
        return cls(func(*bare, **(kwargs or {})))


def test_torch_dispatch_of_a_subclass() -> None:
    x, t = pair((3, 5), torch.float32, False, grad=False)
    seen = []
    for function in (kl_div, F.kl_div):
        Wrapping.seen = []
        value = function(Wrapping(x), Wrapping(t), reduction="sum")
        assert type(value) is Wrapping
        torch.testing.assert_close(value.inner, F.kl_div(x, t, reduction="sum"))
        seen.append(Wrapping.seen)
    assert seen[0] == seen[1]


def test_torch_function_may_answer_itself() -> None:
    class Answering(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, *args: Any, **kwargs: Any) -> Any:
            return "answer"

    assert kl_div(torch.ones(2), torch.ones(2).as_subclass(Answering)) == "answer"


def test_torch_function_mode() -> None:
    x, t = pair((3, 5), torch.float32, False)
    for function in (kl_div, F.kl_div):
        with RecordingMode() as mode:
            assert torch.equal(function(x, t, reduction="sum"), F.kl_div(x, t, reduction="sum"))
        assert len(mode.calls) == (1 if function is kl_div else 2) + (function is kl_div)


def test_dispatch_modes_see_torchs_operations() -> None:
    x, t = pair((3, 5), torch.float32, False)
    seen = []
    for function in (kl_div, F.kl_div):
        with Operations() as mode:
            torch.autograd.grad(function(x, t, reduction="batchmean"), (x, t))
        seen.append(mode.seen)
    assert seen[0] == seen[1]


@needs_kernel
def test_mode_entered_between_forward_and_backward() -> None:
    x, t = pair((3, 5), torch.float32, False)
    loss = kl_div(x, t, reduction="sum")
    with Operations() as mode:
        loss.backward()
    assert not any("fusedkl" in name for name in mode.seen)


@all_reductions
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float16),
    ],
    ids=str,
)
def test_autocast(dtypes: tuple[torch.dtype, torch.dtype], reduction: str) -> None:
    """float32 inside and out for half inputs, whose gradients come back in half."""
    x, t = pair((3, 50), dtypes[0], True)[0], pair((3, 50), dtypes[1], True)[1]
    found = []
    for function in (kl_div, F.kl_div):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = quiet(function, x, t, reduction=reduction, log_target=True)
        found.append((value, *torch.autograd.grad(value.sum(), (x, t))))
    assert found[0][0].dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)
    for ours, theirs in zip(*found, strict=True):
        same_meta(ours, theirs)
        torch.testing.assert_close(ours, theirs)


@needs_kernel
def test_autocast_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    x, t = pair((3, 5), torch.bfloat16, True)
    with counted(monkeypatch) as kernels, torch.autocast("cpu", dtype=torch.bfloat16):
        kl_div(x, t, reduction="sum", log_target=True).backward()
    assert (kernels.forward, kernels.backward) == (1, 1)


@all_reductions
def test_meta_and_fake(reduction: str) -> None:
    x, t = pair((3, 5), torch.float32, False)
    meta = [torch.empty(3, 5, device="meta", requires_grad=True) for _ in range(2)]
    mode = FakeTensorMode()
    fake = [mode.from_tensor(v) for v in (x, t)]
    for args in (meta, fake):
        out = quiet(kl_div, *args, reduction=reduction)
        same_meta(out, quiet(F.kl_div, *args, reduction=reduction))
        for g, v in zip(torch.autograd.grad(out.sum(), args), args, strict=True):
            assert (g.shape, g.device, type(g)) == (v.shape, v.device, type(v))


def test_observers_are_noticed() -> None:
    """The private names of torch that `observed` reads still mean what they did."""
    seen = []

    def note(v: Tensor) -> Tensor:
        seen.append(observed())
        return v * 1

    x = torch.ones(2, 3)
    assert not observed()
    torch.vmap(note)(x)
    torch.func.grad(lambda v: note(v).sum())(x)
    quiet(torch.func.jvp, note, (x,), (x,))  # torch warns of its own use of torch.jit
    torch.func.functionalize(note)(x)
    with forward_ad.dual_level():
        note(x)
    with Operations():
        note(x)
    make_fx(note)(x)
    with pytest.warns(Warning, match="deprecated"):
        torch.jit.trace(note, (x,), check_trace=False)
    assert len(seen) >= 7
    assert all(seen)
    assert not observed()


@both_targets
@all_reductions
def test_compile(reduction: str, log_target: bool) -> None:
    """fullgraph, one graph for all sizes, the same numbers, torch's function its only node."""
    graphs: list[list[Any]] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append([n.target for n in graph.graph.nodes if n.op == "call_function"])
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda a, b: kl_div(a, b, reduction=reduction, log_target=log_target),
        fullgraph=True,
        dynamic=True,
        backend=backend,
    )
    for shape in ((3, 5), (4, 6), (7, 11)):
        x, t = pair(shape, torch.float64, log_target)
        ours = quiet(compiled, x, t)
        theirs = quiet(F.kl_div, x, t, reduction=reduction, log_target=log_target)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(
            torch.autograd.grad(ours.sum(), (x, t)), torch.autograd.grad(theirs.sum(), (x, t))
        )
    assert graphs == [[F.kl_div]]
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("module", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_training_step(backend: str, module: bool) -> None:
    torch._dynamo.reset()
    loss: Callable[..., Tensor] = (
        KLDivLoss(reduction="batchmean") if module else lambda x, t: kl_div(x, t, reduction="mean")
    )

    def step(a: Tensor, b: Tensor) -> Tensor:
        return loss(F.log_softmax(a, -1), F.softmax(b, -1))

    a, b = (torch.randn(6, 50, requires_grad=True) for _ in range(2))
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    found = []
    for function in (compiled, step):
        value = quiet(function, a, b)
        found.append((value, *torch.autograd.grad(value, (a, b))))
    torch.testing.assert_close(*found)
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_autograd() -> None:
    x, t = pair((3, 5), torch.float32, False)
    wanted = torch.autograd.grad(F.kl_div(x, t, reduction="sum"), (x, t))
    torch._dynamo.reset()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        loss = kl_div(x, t, reduction="sum")
        loss.backward()
    torch.testing.assert_close((x.grad, t.grad), wanted)
    torch._dynamo.reset()


def test_make_fx_and_export() -> None:
    x, t = pair((3, 5), torch.float32, False, grad=False)
    wanted = F.kl_div(x, t, reduction="batchmean")

    class Loss(torch.nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return kl_div(a, b, reduction="batchmean")

    traced = make_fx(lambda a, b: kl_div(a, b, reduction="batchmean"))(x, t)
    exported = torch.export.export(Loss(), (x, t))
    for graph in (traced.graph, exported.graph):
        assert not any("fusedkl" in str(n.target) for n in graph.nodes)
    torch.testing.assert_close(traced(x, t), wanted)
    torch.testing.assert_close(exported.module()(x, t), wanted)


@both_targets
def test_torchscript(log_target: bool) -> None:
    x, t = pair((3, 5), torch.float64, log_target)
    with pytest.warns(Warning, match="deprecated"):
        function = torch.jit.script(kl_div)
        module = torch.jit.script(KLDivLoss(reduction="batchmean", log_target=log_target))
        traced = torch.jit.trace(
            lambda a, b: kl_div(a, b, reduction="batchmean", log_target=log_target), (x, t)
        )
    wanted = F.kl_div(x, t, reduction="batchmean", log_target=log_target)
    for found in (
        function(x, t, reduction="batchmean", log_target=log_target),
        module(x, t),
        traced(x, t),
    ):
        torch.testing.assert_close(found, wanted)
    assert "PythonOp" not in str(traced.graph) and "^" not in str(traced.graph)


def test_fx_symbolic_trace_keeps_torchs_name() -> None:
    graph = torch.fx.symbolic_trace(lambda a, b: kl_div(a, b, reduction="sum")).graph
    assert [n.target for n in graph.nodes if n.op == "call_function"] == [F.kl_div]


def test_anomaly_mode_and_profiler() -> None:
    x, t = pair((3, 5), torch.float32, False)
    with (
        pytest.warns(UserWarning, match="Anomaly Detection"),
        torch.autograd.detect_anomaly(),
    ):
        kl_div(x, t, reduction="sum").backward()


def test_names() -> None:
    assert sys.modules["fusedkl.kl_div"].kl_div is fusedkl.kl_div
    assert fusedkl.kl_div.__name__ == "kl_div"
