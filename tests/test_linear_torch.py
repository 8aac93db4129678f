"""linear_divergence as a citizen of PyTorch: compile, autocast, checkpointing, opcheck, memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import linear_cases
import pytest
import torch
from linear_cases import TILE, Heads, heads
from test_memory import peak
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import fusedkl
from fusedkl import linear_products
from fusedkl.linear_arguments import Inputs
from fusedkl.linear_plan import tiles

OPS = torch.ops.fusedkl


def loss(hidden: Tensor, weight: Tensor, other: Heads, **options: Any) -> Tensor:
    t = other.tensors
    return fusedkl.linear_divergence(
        hidden, weight, t["ref_hidden"], t["ref_weight"], reduction="mean", **options
    )


def gradients(value: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return (value.detach(), *torch.autograd.grad(value, leaves))


@pytest.mark.slow
def test_compiles_whole_and_not_for_each_shape(backend: str) -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    h = heads(torch.float32)

    def step(hidden: Tensor, weight: Tensor, mask: Tensor, ref: Tensor) -> Tensor:
        return fusedkl.linear_divergence(
            hidden, weight, ref, h.tensors["ref_weight"], mask=mask, reduction="mean", tile=TILE,
            backend=backend,
        )  # fmt: skip

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for tokens in (linear_cases.T, 21, 30):
        hidden = h.tensors["hidden"][:tokens].clone().requires_grad_()
        weight = h.tensors["weight"].clone().requires_grad_()
        mask, ref = torch.rand(tokens) < 0.7, h.tensors["ref_hidden"][:tokens].clone()
        got = gradients(compiled(hidden, weight, mask, ref), hidden, weight)
        want = gradients(step(hidden, weight, mask, ref), hidden, weight)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
        counts.append(counter.frame_count)
    assert counts[1] == counts[2] <= 2  # the first shape may be taken for a constant one


@pytest.mark.slow
@pytest.mark.parametrize("what", ["divergence", "top-k", "statistics"])
def test_compiles_where_nothing_needs_a_gradient(what: str, backend: str) -> None:
    torch.compiler.reset()
    h = heads(torch.float32)
    log_q, ids = fusedkl.log_softmax(h.logits("ref_")).topk(4, -1)

    def step(hidden: Tensor) -> Tensor:
        options = {"tile": TILE, "backend": backend}
        rows, other = h.tensors["weight"], (h.tensors["ref_hidden"], h.tensors["ref_weight"])
        if what == "divergence":
            return fusedkl.linear_divergence(hidden, rows, *other, **options)
        if what == "top-k":
            return fusedkl.linear_divergence(hidden, rows, ref_topk=(ids, log_q), **options)
        stats = fusedkl.linear_token_stats(
            hidden, rows, *other, ids, fields=["log_ratio"], **options
        )
        assert stats.log_ratio is not None
        return stats.log_ratio

    hidden = h.tensors["hidden"]
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    assert torch.equal(compiled(hidden), step(hidden))
    with torch.no_grad():
        assert torch.equal(compiled(hidden.clone().requires_grad_()), step(hidden))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_inductor(kind: str, backend: str, compiler: None) -> None:
    """Its generated code around the operators gives the numbers of eager, at two sizes."""
    h = heads(torch.float32)

    def step(hidden: Tensor, weight: Tensor, ref: Tensor, mask: Tensor) -> Tensor:
        other = Heads(h.tensors | {"ref_hidden": ref})
        return loss(hidden * 1.5, weight, other, kind=kind, mask=mask, tile=TILE, backend=backend)

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for tokens in (linear_cases.T, 21):
        leaves = h.tensors["hidden"][:tokens].clone(), h.tensors["weight"].clone()
        for leaf in leaves:
            leaf.requires_grad_()
        rest = h.tensors["ref_hidden"][:tokens].clone(), torch.arange(tokens) % 3 != 0
        got = gradients(compiled(*leaves, *rest), *leaves)
        want = gradients(step(*leaves, *rest), *leaves)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)


def test_autocast_casts_as_a_linear_layer_does() -> None:
    h = heads(torch.float32)
    leaves = h.leaves("hidden", "weight")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(*leaves, h)
    low = {name: t.detach().bfloat16().requires_grad_() for name, t in h.tensors.items()}
    want = loss(low["hidden"], low["weight"], Heads(low))
    assert value.dtype == torch.float32 and torch.equal(value, want)
    got = torch.autograd.grad(value, leaves)
    for a, e in zip(got, torch.autograd.grad(want, [low["hidden"], low["weight"]]), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, e.float())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool, backend: str) -> None:
    h = heads(torch.float32)
    leaves = h.leaves("hidden", "weight")

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        return loss(hidden, weight, h, backend=backend)

    again = checkpoint(step, *leaves, use_reentrant=reentrant)
    plain = torch.autograd.grad(step(*leaves), leaves)
    if reentrant:
        again.backward()
        got = [leaf.grad for leaf in leaves]
    else:
        got = list(torch.autograd.grad(again, leaves))
    for a, e in zip(got, plain, strict=True):
        assert a is not None and torch.equal(a, e)


def arguments(backend: str, **changed: Any) -> Inputs:
    t = heads(torch.float32).tensors
    given = Inputs(
        t["hidden"], t["weight"], None, t["ref_hidden"], t["ref_weight"], None, None, None, None,
        None, ["forward_kl"], None, None, None, [1.0, 1.0], [0.0, 0.0], False, list(TILE), backend,
    )  # fmt: skip
    return given._replace(**changed)


@pytest.mark.slow
@pytest.mark.parametrize("of_slice", [False, True])
def test_opcheck(of_slice: bool, backend: str) -> None:
    mask = torch.rand(linear_cases.T) < 0.5
    inverse = torch.rand(linear_cases.T, dtype=torch.float64) + 0.5
    given = arguments(backend, mask=mask, inv_temperature=inverse)
    torch.library.opcheck(OPS.linear_stats.default, tuple(given))
    values, states = OPS.linear_stats(*given)
    wanted = [True, True, False, True, False, False, False]
    torch.library.opcheck(
        OPS.linear_stats_backward.default,
        (torch.ones_like(values), *given, states, wanted, of_slice),
    )


def test_opcheck_of_slices(backend: str) -> None:
    if backend == "reference":
        pytest.skip("it has no lm_head of slices")
    labels, mask = torch.arange(linear_cases.T), torch.rand(linear_cases.T) < 0.5
    given = arguments(backend, labels=labels, mask=mask)
    torch.library.opcheck(OPS.linear_slice.default, tuple(given))
    swept = given._replace(fields=["jsd"], parameter=0.3)
    _, states = OPS.linear_slice(*swept)
    torch.library.opcheck(OPS.linear_sums.default, (*swept, states[0]))


# -- memory --------------------------------------------------------------------------------------

TOKENS, VOCABULARY, WIDTH = 256, 20011, 64


def large(dtype: torch.dtype) -> Heads:
    """Logits of 20 MiB a side in fp32, with tiles of at most 4 MiB together."""
    made = {
        "hidden": torch.randn(TOKENS, WIDTH),
        "weight": torch.randn(VOCABULARY, WIDTH),
        "ref_hidden": torch.randn(TOKENS, WIDTH),
        "ref_weight": torch.randn(VOCABULARY, WIDTH),
    }
    return Heads({name: t.to(dtype) for name, t in made.items()})


@pytest.mark.slow
@pytest.mark.parametrize("precision", [None, "fast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_is_that_of_tiles(
    dtype: torch.dtype, precision: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_products, "multiplied_natively", lambda *_: True)
    h = large(dtype)
    full = TOKENS * VOCABULARY * 4
    leaves = h.leaves("hidden", "weight")

    def forward() -> Tensor:
        with torch.no_grad():
            return loss(*leaves, h, precision=precision, backend="cpu")

    most = (4 << 20) + (2 << 20)  # both tiles, then operands, states and odds
    assert peak(forward) < most < full / 3

    def both() -> object:
        return torch.autograd.grad(loss(*leaves, h, precision=precision, backend="cpu"), leaves)

    kept = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
    # rounded products of a tile, or widened operands; d hidden and a tile of d weight in fp32
    assert kept <= peak(both) < kept + most


@pytest.mark.parametrize("setting", ["plain", "softcap", "labels", "both sides"])
def test_memory_is_that_of_the_table(setting: str) -> None:
    """Of docs/linear.md, row by row, in float32."""
    h = large(torch.float32)
    names = tuple(h.tensors) if setting == "both sides" else ("hidden", "weight")
    leaves = h.leaves(*names)
    options: dict[str, Any] = {
        "softcap": {"softcap": 5.0, "ref_softcap": 5.0},
        "labels": {"labels": torch.randint(0, 9, (TOKENS,)), "ce_weight": 0.5},
    }.get(setting, {})
    t = h.tensors

    def forward() -> Tensor:
        return fusedkl.linear_divergence(**t, reduction="mean", backend="cpu", **options)

    def value() -> Tensor:
        with torch.no_grad():
            return forward()

    def both() -> object:
        return torch.autograd.grad(forward(), leaves)

    tile = tiles(TOKENS, VOCABULARY, 4, "cpu")
    pairs = tile.tokens * tile.vocabulary
    absent = 2 * pairs if setting == "softcap" else 0
    states = (9 if setting != "labels" else 18) * 128 * TOKENS
    odds = 128 << 10  # numbers of tokens and of a row of tiles
    assert 8 * pairs < peak(value) <= 8 * pairs + absent + states + odds
    gradient = 4 * pairs if setting != "plain" else 0
    d_hidden = 4 * TOKENS * WIDTH * len(leaves) // 2
    kept = sum(leaf.nbytes for leaf in leaves)
    most = max(8 * pairs + gradient + absent + d_hidden, 8 * pairs + absent + states - kept)
    assert kept < peak(both) <= kept + most + odds


def test_masked_tokens_make_no_products() -> None:
    """Memory grows with the tokens that count, not with those that are there."""
    h = large(torch.float32)
    mask = torch.zeros(TOKENS, dtype=torch.bool)
    mask[:4] = True

    def forward() -> Tensor:
        with torch.no_grad():
            return loss(h.tensors["hidden"], h.tensors["weight"], h, mask=mask, backend="cpu")

    assert peak(forward) < 1 << 20


@pytest.mark.parametrize("counted", [TOKENS, TOKENS // 2])
def test_given_logits_are_not_copied(counted: int) -> None:
    h = large(torch.float32)
    leaves, given = h.leaves("hidden", "weight"), torch.randn(TOKENS, VOCABULARY)
    mask = torch.arange(TOKENS) < counted

    def forward() -> Tensor:
        return fusedkl.linear_divergence(
            *leaves, ref_logits=given, mask=mask, reduction="mean", backend="cpu"
        )

    def both() -> object:
        return torch.autograd.grad(forward(), leaves)

    both()
    kept = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
    copied = counted * VOCABULARY * 4
    with torch.no_grad():
        assert peak(forward) < 6 << 20 < copied
    assert kept <= peak(both) < kept + (8 << 20) < kept + copied


# In a process of its own, where nothing that came before has left memory to be used again; what
# libraries and C++ allocate is seen too.
RESIDENT = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from memory import PeakMemory
import fusedkl

torch.set_num_threads(1)
tokens, vocabulary, width = 256, 60013, 64
hidden, moved = torch.randn(2, tokens, width).bfloat16().requires_grad_()
weight = torch.randn(vocabulary, width).bfloat16().requires_grad_()

def fused(part, rows):
    return fusedkl.linear_divergence(part, rows, moved[: len(part)].detach(), reduction="mean")

def full(part, rows):
    x, y = part.float() @ rows.float().t(), moved[: len(part)].float() @ rows.float().t()
    return fusedkl.forward_kl(x, y.detach(), reduction="mean")

def both(loss, part, rows):
    return torch.autograd.grad(loss(part, rows), (part, rows))

def forward(loss, part, rows):
    with torch.no_grad():
        return loss(part, rows)

for run in (forward, both):
    for loss in (fused, full):
        run(loss, hidden[:3], weight[:2048])  # libraries, and thread pools
        with PeakMemory() as memory:
            run(loss, hidden, weight)
        print(-1 if memory.bytes is None else memory.bytes)
"""


@pytest.mark.slow
def test_resident_memory_is_that_of_tiles() -> None:
    demo = Path(__file__).resolve().parents[1] / "demo"
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT, str(demo)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    fused, full, fused_both, full_both = (int(line) for line in done.stdout.split())
    if min(fused, full) < 0:
        pytest.skip("this system does not tell a process's peak")
    logits, weight = 256 * 60013 * 4, 60013 * 64 * 2
    assert full >= 2 * logits and full_both >= 2 * logits  # the measure sees them
    assert fused < 24 << 20 < logits
    assert fused_both - weight < 36 << 20 < logits
