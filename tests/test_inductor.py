"""enable() with the real compiler: numbers, memory, recompilations, caches, other passes."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._functorch.config
import torch._inductor.config as config
import torch.nn.functional as F
from inductor_cases import MARKS, gradients
from test_memory import peak
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import fusedkl
from fusedkl.inductor.passes import is_ours

pytestmark = [*MARKS, pytest.mark.slow]


@pytest.fixture(autouse=True)
def fresh(compiler: None) -> Iterator[None]:
    fusedkl.inductor.report(clear=True)
    with (
        config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield
    assert not fusedkl.inductor.disable() and config.pre_grad_custom_pass is None


def distil(x: Tensor, y: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(x / 2, -1), F.softmax(y / 2, -1), reduction="batchmean") * 4


def make(rows: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x, y = torch.randn(2, rows, vocabulary).to(dtype)
    return x.clone().requires_grad_(), y.clone()


def test_a_training_step_is_rewritten_and_allocates_its_gradient() -> None:
    x, y = make(8, 20_000)

    def step(function: Any) -> object:
        return torch.autograd.grad(function(x, y), x)

    with fusedkl.inductor.enable():
        compiled = torch.compile(distil, fullgraph=True)
        (value, grads), (wanted, wanted_grads) = gradients(compiled, x, y), gradients(distil, x, y)
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=0)
        torch.testing.assert_close(grads, wanted_grads, rtol=1e-4, atol=1e-9)
        report = fusedkl.inductor.report()
        assert [r.kinds for r in report.rewritten] == ["forward_kl"] and report.missed == ()
        assert f"{Path(__file__).name}:" in report.rewritten[0].where
        assert peak(lambda: step(compiled)) < x.numel() * 4 + 16_384


def keeping_state(x: Tensor, y: Tensor, steps: Tensor, average: Tensor, log: Tensor) -> Tensor:
    """A training step that counts, averages, logs, pads logits in place and reuses memory."""
    steps.add_(1)
    z = x / 2
    z[..., 250:] = -50.0
    loss = F.kl_div(F.log_softmax(z, -1), F.softmax(y / 2, -1), reduction="none").sum(-1)
    average.mul_(0.9).add_(0.1 * loss.detach())
    z.mul_(2)
    again = F.kl_div(F.log_softmax(z, -1), F.softmax(y / 2, -1), reduction="none").sum(-1)
    torch.sub(log, loss.detach(), out=log)
    return loss.sum() + 3 * again.sum()


def test_what_a_step_writes_is_written() -> None:
    x, y = make(8, 300)

    def run(function: Any) -> list[Tensor]:
        state = [torch.zeros(()), torch.ones(8), torch.ones(8)]
        value = function(x, y, *state)
        return [value, *state, *torch.autograd.grad(value, x)]

    with fusedkl.inductor.enable():
        found = run(torch.compile(keeping_state, fullgraph=True))
        report = fusedkl.inductor.report()
    # Backward of the first would read z, which is another by then.
    assert len(report.rewritten) == len(report.missed) == 1
    assert "before backward would read it" in report.missed[0].reason
    torch.testing.assert_close(found, run(keeping_state), rtol=1e-4, atol=1e-7)


def checkpointed(x: Tensor, y: Tensor) -> Tensor:
    value: Tensor = checkpoint(distil, x, y, use_reentrant=False)
    return value * 2


def changed_after_the_checkpoint(x: Tensor, y: Tensor) -> Tensor:
    z = x * 2
    value = checkpointed(z, y)
    z.add_(1)
    return value + z.square().sum()


def test_a_checkpoint_is_rewritten_inside() -> None:
    """Its body is a graph of its own, to which the compiler applies the passes."""
    x, y = make(8, 300)
    with fusedkl.inductor.enable():
        found = gradients(torch.compile(checkpointed, fullgraph=True), x, y)
        report = fusedkl.inductor.report()
        assert [r.kinds for r in report.rewritten] == ["forward_kl"] and report.missed == ()
        # No pass sees what is done to its inputs outside: then as in eager code, and not wrong.
        for function in (torch.compile(changed_after_the_checkpoint), changed_after_the_checkpoint):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                function(x, y).backward()
    wanted = gradients(checkpointed, x, y)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-4, atol=1e-9)


def one_sequence(x: Tensor, y: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(x, -1), F.softmax(y, -1), reduction="none").sum(-1).mean()


@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "default"])
def test_compilations_over_sequence_lengths(dynamic: bool | None) -> None:
    counter = CompileCounterWithBackend("inductor")
    with fusedkl.inductor.enable():
        compiled = torch.compile(one_sequence, fullgraph=True, dynamic=dynamic, backend=counter)
        for length in range(2, 12):
            x, y = make(length, 300)
            torch.testing.assert_close(compiled(x, y), one_sequence(x, y), rtol=1e-5, atol=0)
    assert counter.frame_count == (1 if dynamic else 2)
    assert len(fusedkl.inductor.report().rewritten) == counter.frame_count


def annealed(x: Tensor, y: Tensor, t: float) -> Tensor:
    return F.kl_div(F.log_softmax(x / t, -1), F.softmax(y / t, -1), reduction="batchmean")


def test_compilations_over_temperatures() -> None:
    """As many as without the pass: of the first one, and of any other."""
    counter = CompileCounterWithBackend("inductor")
    x, y = make(4, 300)
    with fusedkl.inductor.enable():
        compiled = torch.compile(annealed, fullgraph=True, backend=counter)
        for t in (2.0, 2.5, 3.0, 3.5, -1.0):
            torch.testing.assert_close(compiled(x, y, t), annealed(x, y, t), rtol=1e-5, atol=0)
    assert counter.frame_count == len(fusedkl.inductor.report().rewritten) == 2


def test_enable_counts_and_ends_in_any_order_and_thread() -> None:
    assert config.pre_grad_custom_pass is None
    first, second = fusedkl.inductor.enable(), fusedkl.inductor.enable()
    ours = config.pre_grad_custom_pass
    assert ours is not None
    thread = threading.Thread(target=first.end)
    thread.start()
    thread.join()
    first.end()
    assert second.active and not first.active and config.pre_grad_custom_pass is ours
    assert fusedkl.inductor.disable() and config.pre_grad_custom_pass is None
    assert not fusedkl.inductor.disable()
    with pytest.raises(ZeroDivisionError), fusedkl.inductor.enable():
        raise ZeroDivisionError
    assert config.pre_grad_custom_pass is None


def test_other_passes_keep_running() -> None:
    seen: list[int] = []

    def other(graph: torch.fx.Graph) -> None:
        seen.append(len(graph.nodes))

    with config.patch(pre_grad_custom_pass=other):
        with fusedkl.inductor.enable():
            torch.compile(lambda x: x.exp().sum())(torch.randn(3))
        assert config.pre_grad_custom_pass is other and len(seen) == 1
    assert fusedkl.inductor.report().graphs == 1

    with fusedkl.inductor.enable():
        config.pre_grad_custom_pass = other
    assert config.pre_grad_custom_pass is other  # set by somebody else meanwhile: left alone
    config.pre_grad_custom_pass = None


def other(graph: torch.fx.Graph) -> None:
    """A pass of somebody else."""


@pytest.mark.parametrize("put", [None, other], ids=["taken out", "replaced"])
def test_enable_installs_what_somebody_took_out(put: Any) -> None:
    first = fusedkl.inductor.enable()
    config.pre_grad_custom_pass = put
    assert not first.active
    with fusedkl.inductor.enable() as second:
        assert first.active and second.active and is_ours(config.pre_grad_custom_pass)
    assert first.active
    first.end()
    assert config.pre_grad_custom_pass is put
    config.pre_grad_custom_pass = None


def test_active_only_as_long_as_the_configuration_has_it() -> None:
    with config.patch(pre_grad_custom_pass=None):
        enabled = fusedkl.inductor.enable()
        assert enabled.active
    assert not enabled.active
    enabled.end()


def test_in_the_list_of_somebody_else() -> None:
    enabled = fusedkl.inductor.enable()
    ours = config.pre_grad_custom_pass
    config.pre_grad_custom_pass = [ours, other]
    graph = torch.fx.symbolic_trace(distil).graph
    keys = []
    for on in (True, False):
        assert enabled.active == on
        fusedkl.inductor.report(clear=True)
        ours(graph)
        assert fusedkl.inductor.report().graphs == int(on)
        keys.append(ours.uuid())
        enabled.end()
    assert keys[0] != keys[1]
    with fusedkl.inductor.enable() as again:
        assert again.active and config.pre_grad_custom_pass == [ours, other]
    config.pre_grad_custom_pass = None


CACHED = """
import sys, torch, fusedkl
import torch.nn.functional as F
from torch._dynamo.utils import counters
if sys.argv[1] == "on":
    fusedkl.inductor.enable()
x, y = torch.arange(40.0).sin().view(4, 10).requires_grad_(), torch.arange(40.0).cos().view(4, 10)
def loss(x, y):
    return F.kl_div(F.log_softmax(x, -1), F.softmax(y, -1), reduction="batchmean")
value = torch.compile(loss)(x, y)
value.backward()
from torch.profiler import profile
with profile() as seen:
    torch.compile(loss)(x, y)
fused = any("fusedkl::row_stats" in e.name for e in seen.events())
torch.testing.assert_close(value, loss(x, y))
hits = counters["aot_autograd"]["autograd_cache_hit"]
print(fused, hits > 0, len(fusedkl.inductor.report().rewritten))
"""


@pytest.mark.full
def test_kept_across_the_compile_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def run(state: str) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", CACHED, state],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.strip()

    # fused, from the cache, in the report
    assert run("on") == "True False 1"
    assert run("on") == "True True 0"
    assert run("off") == "False False 0"
