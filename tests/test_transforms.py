"""Export, AOTInductor, compiled autograd, torch.func, FSDP2 and fake CUDA tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kl_div_cases import needs_kernel
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import fusedkl

pytestmark = [
    # torch's own tracing warns of its own deprecations.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
    # log_softmax's backward has no batching rule: torch loops over the batch, and says so.
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]
N, V = 4, 23
FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": fusedkl.forward_kl,
    "reverse_kl": functools.partial(fusedkl.reverse_kl, temperature=2.0),
    "jeffreys": fusedkl.jeffreys,
    "entropy": lambda x, _: fusedkl.entropy(x),
    "logsumexp": lambda x, _: fusedkl.logsumexp(x),
    "log_softmax": lambda x, y: (fusedkl.log_softmax(x) * y).sum(-1),
    "selective": lambda x, _: fusedkl.selective_log_softmax(x, torch.arange(len(x)) % V),
    "kl_div": lambda x, y: fusedkl.kl_div(
        torch.log_softmax(x, -1), torch.softmax(y, -1), reduction="none"
    ).sum(-1),
}


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


@pytest.mark.parametrize("name", FUNCTIONS)
def test_torch_func_grad_and_vmap(name: str) -> None:
    x, y = logits()
    wanted = by_autograd(name, x.clone(), y)
    torch.testing.assert_close(torch.func.grad(total(name))(x, y), wanted)
    if name != "selective":  # its index has the rows of x
        rows = torch.func.vmap(torch.func.grad(lambda a, b: total(name)(a[None], b[None])))
        torch.testing.assert_close(rows(x, y), wanted)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_hessian(name: str) -> None:
    """Reverse over reverse works; torch.func.hessian is forward over reverse and says that."""
    x, y = (t[:1, :5].clone() for t in logits())
    hessian = torch.func.jacrev(torch.func.jacrev(total(name)))(x, y).reshape(5, 5)
    (g,) = torch.autograd.grad(total(name)(x.requires_grad_(), y), x, create_graph=True)
    columns = [torch.autograd.grad(g[0, i], x, retain_graph=True)[0][0] for i in range(5)]
    torch.testing.assert_close(hessian, torch.stack(columns).detach())
    if name == "kl_div":
        found = torch.func.hessian(total(name))(x.detach(), y).reshape(5, 5)
        torch.testing.assert_close(found, hessian)
    else:
        with pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward"):
            torch.func.hessian(total(name))(x.detach(), y)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_mode_works_or_says_why_not(name: str) -> None:
    x, y = logits()
    tangent = torch.randn_like(x)
    if name == "kl_div":
        _, found = torch.func.jvp(lambda a: total(name)(a, y), (x,), (tangent,))
        torch.testing.assert_close(found, (by_autograd(name, x.clone(), y) * tangent).sum())
    else:
        with pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward"):
            torch.func.jvp(lambda a: total(name)(a, y), (x,), (tangent,))


class Module(torch.nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return FUNCTIONS[self.name](x, y)


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n != "selective"])
def test_export(name: str) -> None:
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    x, y = logits(torch.float32)
    exported = torch.export.export(Module(name), (x, y), dynamic_shapes=({0: tokens}, {0: tokens}))
    other = torch.randn(2, 9, V)
    torch.testing.assert_close(exported.module()(*other), FUNCTIONS[name](*other))


@needs_kernel
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_aot_inductor(tmp_path: Path) -> None:
    x, y = logits(torch.float32)
    exported = torch.export.export(Module("jeffreys"), (x, y))
    package = torch._inductor.aoti_compile_and_package(
        exported, package_path=str(tmp_path / "model.pt2")
    )
    found = torch._inductor.aoti_load_package(package)(x, y)
    torch.testing.assert_close(found, fusedkl.jeffreys(x, y))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_autograd(name: str) -> None:
    x, y = logits(torch.float32)
    wanted = by_autograd(name, x.clone(), y)
    x.requires_grad_()
    compiler = functools.partial(torch.compile, backend="aot_eager")
    value = total(name)(x, y)
    with torch._dynamo.compiled_autograd._enable(compiler):
        value.backward()
    torch.testing.assert_close(x.grad, wanted)


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n != "kl_div"])
def test_no_host_synchronisation(name: str) -> None:
    """A fake CUDA tensor has no contents: whatever reads one, .item() or a branch, raises."""
    with FakeTensorMode():
        x = torch.empty(N, V, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        y = torch.empty(N, V, device="cuda")
        mask = torch.empty(N, device="cuda", dtype=torch.bool)
        function = FUNCTIONS[name]
        if name == "selective":
            index = torch.empty(N, device="cuda", dtype=torch.int64)
            value = fusedkl.selective_log_softmax(x, index)
        elif name.endswith("kl"):
            value = fusedkl.divergence(
                x, y, name, mask=mask, weight=torch.empty(N, device="cuda"), reduction="mean"
            )
        else:
            value = function(x, y)
        # Forward only: autograd's engine asks the driver for the device of the gradients.
        assert value.device.type == "cuda" and value.requires_grad


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
