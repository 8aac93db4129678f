"""The operators' contracts with torch.library, and torch.compile without breaks or recompiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fusedkl
from fusedkl import shard_states
from fusedkl._library import OPERATORS

# torch's own tracing warns of its own deprecations.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


@pytest.fixture(autouse=True)
def fresh_compiler(compiler: None) -> Iterator[None]:
    # The caches on disk know an operator by its name, not by what its fake says today.
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield


def op_samples(backend: str) -> dict[str, list[tuple[Any, ...]]]:
    policy, reference = torch.randn(4, 9), torch.randn(4, 9).bfloat16()
    strided = torch.randn(2, 4, 9)[:, 1:3]
    other = torch.randn(9).expand(2, 2, 9)
    ids = torch.randint(0, 9, (4, 2))
    inverse, mask = torch.rand(4, dtype=torch.float64) + 0.5, torch.tensor([True, False] * 2)
    row_stats = [
        (policy, reference, None, ["forward_kl"], None, None),
        (policy, reference, None, ["forward_kl", "reverse_kl"], inverse, mask),
        (strided, other, ids, ["logprob", "entropy", "reverse_kl"], inverse[:1], None),
        (policy.double(), None, ids, ["logsumexp", "logprob"], None, mask),
        (policy, reference[:, :7], None, ["forward_kl"], None, mask, 6),
    ]
    row_stats = [
        (x, y, tokens, fields, None, inv, counted, next(iter(valid), None), None, backend)
        for x, y, tokens, fields, inv, counted, *valid in row_stats
        if x.dtype != torch.float64 or backend != "triton"
    ]
    backward, inplace = [], []
    for arguments in row_stats:
        x, y, tokens, fields, number, inv, _, valid, cap, name = arguments
        values, state = torch.ops.fusedkl.row_stats(*arguments)
        saved = (tokens, state, fields, number, inv, valid, cap)
        grad = torch.rand_like(values)
        for wanted in ((True, False), (False, True), (True, True)):
            if y is not None or not wanted[1]:
                backward.append((grad, x, y, *saved, *wanted, name))
        inplace.append((grad, x.clone(), y, *saved, y is not None, name))
    logits = torch.randn(2, 3, 5)
    both = (["forward_kl"], None, inverse, mask, None, None, backend)
    state = torch.ops.fusedkl.row_stats(policy, reference, None, *both)[1]
    one = torch.ones((1, 4), dtype=state.dtype)
    swept = (policy, reference, state, "jsd", 0.3, inverse, mask, None, None, backend)
    of_slice = (["forward_kl"], inverse, mask, None, None, True, False, backend)
    rest = ["forward_kl"], inverse
    gathered = shard_states.pack(state, [], ("forward_kl",), inverse, torch.float32).expand(
        2, -1, -1
    )
    return {
        "row_stats_with_gradient": [(one, policy, reference, *both)],
        "row_sums": [swept],
        "scale_gradient_": [(policy.clone(), torch.tensor(2.0), backend)],
        "merge_states": [(torch.stack([state, state]), *rest, backend)],
        "slice_state": [(policy, reference, *of_slice)],
        "merge_payload": [(gathered, *rest, backend)],
        "merge_shards": [(gathered, *rest, mask, None, backend)],
        "row_stats": row_stats,
        "row_stats_backward": backward,
        "row_stats_backward_": inplace,
        "log_softmax": [
            (logits, torch.float32, backend),
            (logits[:, :2], torch.bfloat16, backend),
            (logits.half(), torch.float64, backend),
        ],
        "log_softmax_backward": [
            (logits, logits.log_softmax(-1), torch.float32, backend),
            (logits[:, :2], logits.log_softmax(-1)[:, 1:], torch.float16, backend),
        ],
        "ordered_sum": [
            (torch.randn(7), None, backend),
            (torch.randn(7).double(), torch.rand(7).double(), backend),
            (torch.randn(0), None, backend),
        ],
    }


SLICES = ["slice_state", "merge_payload", "merge_shards"]


@pytest.mark.parametrize("name", [*OPERATORS, *SLICES])
def test_opcheck(backend: str, name: str) -> None:
    op = getattr(torch.ops.fusedkl, name).default
    for arguments in op_samples(backend)[name]:
        # Their derivative is the autograd.Function around them, tested below and in test_autograd.
        torch.library.opcheck(
            op,
            arguments,
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


def losses(backend: str) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    module = fusedkl.JeffreysLoss(temperature=2.0, reduction="mean", backend=backend)

    def everything(x: Tensor, y: Tensor, labels: Tensor) -> Tensor:
        return fusedkl.divergence(
            x * 1,
            y,
            "reverse_kl",
            temperature=0.5 + labels.abs().float(),
            labels=labels,
            ignore_index=0,
            weight=x.detach().mean(-1),
            reduction="mean",
            backend=backend,
        )

    return {
        "forward_kl": lambda x, y, _: fusedkl.forward_kl(x, y, backend=backend).sum(),
        "mean": lambda x, y, _: fusedkl.forward_kl(x, y, reduction="mean", backend=backend),
        "everything": everything,
        "module": lambda x, y, _: module(x, y),
        "in place": lambda x, y, _: fusedkl.forward_kl(
            x * 1, y, reduction="sum", inplace_grad=True, backend=backend
        ),
        "slice": lambda x, y, _: fusedkl.forward_kl(
            x[:, :-1], y[:, 1:], reduction="mean", backend=backend
        ),
        "entropy": lambda x, _, __: fusedkl.entropy(x, temperature=0.7, backend=backend).mean(),
        "logsumexp": lambda x, _, __: fusedkl.logsumexp(x, backend=backend).mean(),
        "selective": lambda x, _, labels: fusedkl.selective_log_softmax(
            x, labels, backend=backend
        ).mean(),
        "log_softmax": lambda x, y, _: (fusedkl.log_softmax(x, 1, backend=backend) * y).sum(),
    }


def make(batch: int, length: int, vocabulary: int = 33) -> tuple[Tensor, Tensor, Tensor]:
    policy, reference = torch.randn(2, batch, length, vocabulary)
    labels = torch.randint(0, 3, (batch, length))
    return policy.requires_grad_(), reference.requires_grad_(), labels


def run(
    function: Callable[[Tensor, Tensor, Tensor], Tensor],
    inputs: tuple[Tensor, Tensor, Tensor],
) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
    value = function(*leaves)
    value.backward()
    return [value.detach(), *(t.grad for t in leaves if t.grad is not None)]


@pytest.mark.parametrize("name", losses(""))
def test_fullgraph_and_dynamic_without_recompiling(backend: str, name: str) -> None:
    """One graph, forward and backward, for all shapes; the numbers of eager."""
    function = losses(backend)[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    graphs = set()
    for shape in ((2, 5), (3, 7), (4, 3, 65), (9, 4, 129)):
        inputs = make(*shape)
        for found, expected in zip(run(compiled, inputs), run(function, inputs), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
        graphs.add(counter.frame_count)
    assert len(graphs) == 1  # dynamo may analyse the first call twice; no other call compiles


@pytest.mark.slow
@pytest.mark.parametrize("name", losses(""))
def test_inductor(backend: str, name: str) -> None:
    function = losses(backend)[name]
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for shape in ((2, 5), (3, 7)):
        inputs = make(*shape)
        for found, expected in zip(run(compiled, inputs), run(function, inputs), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_temperature_may_change_without_a_graph_break(backend: str) -> None:
    def function(x: Tensor, y: Tensor, temperature: float) -> Tensor:
        return fusedkl.forward_kl(x, y, temperature=temperature, backend=backend)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    policy, reference, _ = make(2, 3)
    for temperature in (1.0, 2.0, 0.5, 3.0):
        found = compiled(policy, reference, temperature)
        expected = function(policy, reference, temperature)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_the_environment_chooses_the_backend_of_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDKL_BACKEND", "reference")
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    policy, reference, _ = make(2, 3)
    torch.compile(fusedkl.forward_kl, fullgraph=True, backend=keep)(policy, reference)
    assert len(graphs) == 1 and '"reference"' in graphs[0].print_readable(False).replace("'", '"')


def test_contents_are_checked_in_a_compiled_graph_too(backend: str) -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(x: Tensor, index: Tensor) -> Tensor:
        return fusedkl.selective_log_softmax(x, index, backend=backend)

    logits = torch.randn(2, 5)
    function(logits, torch.tensor([0, 4]))
    with pytest.raises(
        ValueError, match="index or token_ids must hold ids from 0 to 4; got 0 to 5"
    ):
        function(logits, torch.tensor([0, 5]))


def test_double_backward_through_a_compiled_graph_is_refused(backend: str) -> None:
    compiled = torch.compile(
        lambda x, y: fusedkl.forward_kl(x, y, reduction="sum", backend=backend),
        fullgraph=True,
        backend="aot_eager",
    )
    policy, reference, _ = make(2, 3)
    (g,) = torch.autograd.grad(compiled(policy, reference), policy, create_graph=True)
    # torch 2.11 gives a gradient without a graph where the reference requires one too.
    with pytest.raises(RuntimeError, match=r"double backward|does not require grad"):
        g.sum().backward()


def test_export(backend: str) -> None:
    class Step(torch.nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return fusedkl.jeffreys(x, y, temperature=2.0, reduction="mean", backend=backend)

    tokens = torch.export.Dim("tokens", min=2, max=4096)
    policy, reference = torch.randn(2, 6, 17)
    exported = torch.export.export(
        Step(), (policy, reference), dynamic_shapes=({0: tokens}, {0: tokens})
    )
    names = {str(node.target) for node in exported.graph.nodes}
    assert "fusedkl.row_stats.default" in names
    other = torch.randn(2, 11, 17)
    torch.testing.assert_close(exported.module()(*other), Step()(*other))


def test_meta_tensors_have_shapes_and_dtypes() -> None:
    policy = torch.empty(3, 5, 8, dtype=torch.bfloat16, device="meta", requires_grad=True)
    reference = torch.empty(3, 5, 8, device="meta", dtype=torch.float64)
    value = fusedkl.forward_kl(policy, reference)
    assert value.shape == (3, 5) and value.dtype == torch.float64 and value.is_meta
    value.sum().backward()
    assert policy.grad.shape == policy.shape and policy.grad.dtype == torch.bfloat16
