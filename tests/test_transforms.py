"""Export, AOTInductor, compiled autograd, torch.func, FSDP2 and fake CUDA tensors."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kl_div_cases import needs_kernel
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transform_cases import FORWARD_ONLY, FUNCTIONS, KINDS, K, N, V

import fusedkl
from fusedkl import contents, deferred_kl

pytestmark = [
    # torch's own tracing warns of its own deprecations.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
    # log_softmax's backward has no batching rule: torch loops over the batch, and says so.
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]
# Straight lines: their second derivative is 0.
STRAIGHT = {"kl_estimate k1", "nats_to_bits"}
FORWARD_MODE = {"kl_div", "kl_estimate k2", *STRAIGHT}
NO_VMAP = {"linear_divergence", "linear_token_stats"}
# Of the tests that compile: one of each way through the package, and the others.
QUICK = ("forward_kl", "entropy", "kl_div")
LATER = [pytest.param(n, marks=pytest.mark.slow) for n in FUNCTIONS if n not in QUICK]


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """Off here: deterministic mode would change what the compiler does."""


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def logits(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x, y = torch.randn(2, N, V, dtype=dtype)
    return x.clone(), y.clone()


def total(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: FUNCTIONS[name](x, y).sum()


def by_autograd(name: str, x: Tensor, y: Tensor) -> Tensor:
    (g,) = torch.autograd.grad(total(name)(x.requires_grad_(), y), x)
    return g


def test_every_public_function_is_among_them() -> None:
    public = {name for name in fusedkl.__all__ if name[0].islower()}
    without_tensors = {"backends", "explain", "inductor", "patch", "unpatch"}
    assert public - without_tensors == {name.split()[0] for name in {**FUNCTIONS, **FORWARD_ONLY}}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_torch_func_grad_and_vmap(name: str) -> None:
    x, y = logits()
    wanted = by_autograd(name, x.clone(), y)
    assert bool((wanted != 0).any())
    torch.testing.assert_close(torch.func.grad(total(name))(x, y), wanted)

    def row(a: Tensor, b: Tensor) -> Tensor:
        return FUNCTIONS[name](a[None], b[None])[0]

    if name in NO_VMAP:
        with pytest.raises(RuntimeError, match=r"no torch.vmap.*give them in one call"):
            torch.func.vmap(row)(x, y)
        return
    singly = [(row(a, b), torch.func.grad(row)(a, b)) for a, b in zip(x, y, strict=True)]
    values, grads = (torch.stack(parts) for parts in zip(*singly, strict=True))
    torch.testing.assert_close(torch.func.vmap(row)(x, y), values)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(row))(x, y), grads)


def test_a_batch_with_checks_of_contents() -> None:
    """topk_divergence reads its ids' contents, which under vmap it cannot."""
    x, y = logits()
    ids = torch.arange(N * K).view(N, K)
    logprobs = torch.log_softmax(y, -1).gather(-1, ids)
    batch = torch.func.vmap(lambda a, i, q: fusedkl.topk_divergence(a[None], i[None], q[None])[0])
    torch.testing.assert_close(
        batch(x, ids, logprobs), fusedkl.topk_divergence(x, ids, logprobs), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_hessian(name: str) -> None:
    """Reverse over reverse works; torch.func.hessian is forward over reverse and says that."""
    x, y = (t[:1].clone() for t in logits())
    found = torch.func.jacrev(torch.func.jacrev(total(name)))(x, y).reshape(V, V)
    if name in STRAIGHT:
        assert not found.any() and not torch.func.hessian(total(name))(x, y).any()
        return
    (g,) = torch.autograd.grad(total(name)(x.requires_grad_(), y), x, create_graph=True)
    columns = [torch.autograd.grad(g[0, i], x, retain_graph=True)[0][0] for i in range(V)]
    torch.testing.assert_close(found, torch.stack(columns).detach())
    assert bool((found != 0).any())
    x = x.detach()
    if name in FORWARD_MODE:
        torch.testing.assert_close(torch.func.hessian(total(name))(x, y).reshape(V, V), found)
    else:
        with pytest.raises(NotImplementedError, match="Reverse mode works twice"):
            torch.func.hessian(total(name))(x, y)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_mode_works_or_says_why_not(name: str) -> None:
    x, y = logits()
    tangent = torch.randn_like(x)
    if name in FORWARD_MODE:
        _, found = torch.func.jvp(lambda a: total(name)(a, y), (x,), (tangent,))
        torch.testing.assert_close(found, (by_autograd(name, x.clone(), y) * tangent).sum())
    else:
        with pytest.raises(NotImplementedError, match="Reverse mode works twice"):
            torch.func.jvp(lambda a: total(name)(a, y), (x,), (tangent,))
        # what has no tangent is not refused: it may stand beside what has one
        _, found = torch.func.jvp(lambda a: a.sum() + total(name)(x, y), (x,), (tangent,))
        torch.testing.assert_close(found, tangent.sum())


class Module(torch.nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return FUNCTIONS[self.name](x, y)


@pytest.mark.parametrize("name", [*QUICK, *LATER])
def test_export(name: str) -> None:
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    x, y = logits(torch.float32)
    exported = torch.export.export(Module(name), (x, y), dynamic_shapes=({0: tokens}, {0: tokens}))
    other = torch.randn(2, 9, V)
    torch.testing.assert_close(exported.module()(*other), FUNCTIONS[name](*other))


PACKAGED = ("jeffreys", "jsd", "token_stats", "topk_divergence", "distillation_loss")


class Several(torch.nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return tuple(FUNCTIONS[name](x, y) for name in PACKAGED)


@needs_kernel
@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
def test_aot_inductor(tmp_path: Path) -> None:
    x, y = logits(torch.float32)
    exported = torch.export.export(Several(), (x, y))
    package = torch._inductor.aoti_compile_and_package(
        exported, package_path=str(tmp_path / "model.pt2")
    )
    found = torch._inductor.aoti_load_package(package)(x, y)
    for name, value in zip(PACKAGED, found, strict=True):
        torch.testing.assert_close(value, FUNCTIONS[name](x, y), msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*QUICK, *LATER])
def test_compiled_autograd(name: str) -> None:
    x, y = logits(torch.float32)
    wanted = by_autograd(name, x.clone(), y)
    x.requires_grad_()
    compiler = functools.partial(torch.compile, backend="aot_eager")
    value = total(name)(x, y)
    with torch._dynamo.compiled_autograd._enable(compiler):
        value.backward()
    torch.testing.assert_close(x.grad, wanted)


@pytest.mark.parametrize("name", {**FUNCTIONS, **FORWARD_ONLY})
def test_no_host_synchronisation(name: str) -> None:
    """A fake CUDA tensor has no contents: whatever reads one, .item() or a branch, raises.

    That is what a CUDA graph needs of the Python around the kernels.
    """
    with FakeTensorMode():
        x = torch.empty(N, V, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        y = torch.empty(N, V, device="cuda")
        value = {**FUNCTIONS, **FORWARD_ONLY}[name](x, y)
        # Forward only: autograd's engine asks the driver for the device of the gradients.
        assert value.device.type == "cuda" and value.requires_grad is (name in FUNCTIONS)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("inplace", [False, True], ids=["out of place", "inplace_grad"])
def test_masks_weights_and_reductions_without_synchronisation(
    reduction: str, inplace: bool
) -> None:
    with FakeTensorMode():
        x = torch.empty(N, V, device="cuda", requires_grad=True)
        y = torch.empty(N, V, device="cuda")
        hidden = x * 1 if inplace else x  # a leaf's logits, or those of a model
        rows = torch.empty(N, device="cuda")
        options: dict[str, Any] = dict(
            temperature=rows, weight=rows, mask=rows > 0, labels=rows.long(), reduction=reduction
        )
        for kind in KINDS:
            parameter = {"alpha": 0.7} if kind == "renyi" else {}
            value = fusedkl.divergence(
                hidden, y, kind, inplace_grad=inplace, **parameter, **options
            )
            assert value.device.type == "cuda" and value.requires_grad


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
def test_a_patched_loss_without_synchronisation(
    reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """patch() leaves traced code and subclasses to torch; fake tensors are here to see a look."""
    monkeypatch.setattr(deferred_kl.kl_div_ops, "observed", lambda: False)
    monkeypatch.setattr(deferred_kl, "_backend", lambda *logits: "triton")
    fused: list[Any] = []
    sources = deferred_kl._sources
    monkeypatch.setattr(deferred_kl, "_sources", lambda *plan: fused.append(1) or sources(*plan))
    with FakeTensorMode():
        x = torch.empty(8, 4096, device="cuda", requires_grad=True)
        y = torch.empty(8, 4096, device="cuda")
        p, q = (
            deferred_kl.softmax_of(name, logits, -1, None)
            for name, logits in (("log_softmax", x), ("softmax", y))
        )
        assert p is not None and q is not None
        value = deferred_kl.fused_kl_div(p, q, reduction, False)
        assert value is not None
        value = value.sum(-1) if reduction == "none" else value
        assert fused == [1] and value.device.type == "cuda" and value.requires_grad


@pytest.mark.parametrize("asked", [True, False])
def test_contents_are_asserted_by_the_device_if_asked(
    asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FUSEDKL_CHECK=1; the assertions themselves are run on a CPU, where they raise."""
    monkeypatch.setenv(contents.ENVIRONMENT, str(int(asked)))
    monkeypatch.setattr(
        torch, "_assert_async", lambda holds, text: raised.append((holds.device.type, text))
    )
    raised: list[Any] = []
    with FakeTensorMode():
        x = torch.empty(N, V, device="cuda")
        ids = torch.zeros(N, 1, dtype=torch.int64, device="cuda")
        contents.row_stats(x, ids, torch.ones(N, device="cuda"), None, None)
    assert [device for device, _ in raised] == (["cuda", "cuda"] if asked else [])


def test_what_the_device_would_assert() -> None:
    ids, mask = torch.tensor([[3], [9], [-2]]), torch.tensor([True, False, False])
    inverse = torch.tensor([1.0, 0.0, math.nan])
    contents._assert_on_device(3, ids, inverse, mask)
    with pytest.raises(RuntimeError, match="a token id is not from 0 to 2"):
        contents._assert_on_device(2, ids, inverse, mask)
    with pytest.raises(RuntimeError, match="a temperature is not positive and finite"):
        contents._assert_on_device(3, ids, inverse, None)


def test_labels_on_a_cpu_are_not_looked_at_where_they_hold_nothing() -> None:
    with FakeTensorMode():
        x, ids = torch.empty(N, V), torch.zeros(N, dtype=torch.int64)
        assert fusedkl.distillation_loss(x, x, ids, reduction="none").shape == (N,)
        linear = fusedkl.linear_token_stats(x, torch.empty(9, V), token_ids=ids)
        assert linear.logprob is not None and linear.logprob.shape == (N,)
    x, y = logits(torch.float32)
    ids = torch.randint(0, V, (3, N))
    found = torch.func.vmap(lambda i: fusedkl.distillation_loss(x, y, i, temperature=2.0))(ids)
    one_by_one = [fusedkl.distillation_loss(x, y, i, temperature=2.0) for i in ids]
    torch.testing.assert_close(found, torch.stack(one_by_one))


def test_a_host_synchronisation_would_be_seen() -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        bool((torch.empty(3, device="cuda") > 0).all())


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist: Any = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_fsdp2_and_checkpointing_change_nothing(one_process: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.utils.checkpoint import checkpoint

    hidden, teacher = torch.randn(6, 8), torch.randn(6, V)
    grads = []
    for shard in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, V))
        if shard:
            fully_shard(model, mesh=init_device_mesh("cpu", (1,)))

        def step(h: Tensor, model: Any = model) -> Tensor:
            return fusedkl.forward_kl(model(h), teacher, reduction="mean")

        loss = checkpoint(step, hidden, use_reentrant=False) if shard else step(hidden)
        loss.backward()
        found = [p.grad for p in model.parameters()]
        grads.append([getattr(g, "full_tensor", lambda g=g: g)() for g in found])
    torch.testing.assert_close(grads[0], grads[1])
