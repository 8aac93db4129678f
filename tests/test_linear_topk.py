"""linear_divergence from a top-k reference: topk_divergence of logits in full, in float64."""

from __future__ import annotations

import math
import re
from typing import Any

import oracle
import pytest
import torch
from linear_cases import TILE, H, T, V
from test_memory import peak
from torch import Tensor

import fusedkl
from fusedkl import topk

KINDS = ("forward_kl", "reverse_kl")
TAILS = ("bucket", "drop", "renormalize")
GRADIENT = {torch.float64: 1e-8, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
K = 6


class Case:
    """A head, and a teacher that is near it: K tokens in any order, the last of some is padding."""

    def __init__(self, dtype: torch.dtype, near: float = 1.0, t: int = T, v: int = V, k: int = K):
        self.hidden = torch.randn(t, H).to(dtype)
        self.weight = (0.5 * torch.randn(v, H)).to(dtype)
        self.bias = torch.randn(v).to(dtype)
        y = self.logits() + near * torch.randn(t, v, dtype=torch.float64)
        log_q, ids = y.log_softmax(-1).topk(k, -1)
        order = torch.randperm(k)
        self.ids, self.log_q = ids[:, order].contiguous(), log_q[:, order]
        if dtype != torch.float64:
            self.log_q = self.log_q.float()
        if k > 1:
            self.ids[1::3, -1], self.log_q[1::3, -1] = -1, math.nan

    @property
    def leaves(self) -> list[Tensor]:
        return [self.hidden, self.weight, self.bias]

    def logits(self, leaves: list[Tensor] | None = None) -> Tensor:
        hidden, weight, bias = (t.double() for t in leaves or self.leaves)
        return hidden @ weight.t() + bias

    def __call__(self, leaves: list[Tensor] | None = None, **options: Any) -> Tensor:
        hidden, weight, bias = leaves or self.leaves
        return fusedkl.linear_divergence(
            hidden, weight, ref_topk=(self.ids, self.log_q), bias=bias, **options
        )

    def exactly(self, **options: Any) -> tuple[Tensor, list[Tensor]]:
        """topk_divergence, and its leaves."""
        leaves = [t.detach().double().requires_grad_() for t in self.leaves]
        options["backend"] = "reference"
        log_q = self.log_q.double()
        found = fusedkl.topk_divergence(self.logits(leaves), self.ids, log_q, **options)
        assert isinstance(found, Tensor)
        return found, leaves


def check(case: Case, tolerance: float, bound: float, backend: str, **options: Any) -> None:
    upstream = torch.rand(len(case.hidden), dtype=torch.float64)
    leaves = [t.detach().requires_grad_() for t in case.leaves]
    tile = options.pop("tile", TILE)
    found = case(leaves, tile=tile, backend=backend, **options)
    wanted, exact = case.exactly(**options)
    floor = 0.1 if options.get("tail") == "drop" else 1e-6  # "drop" changes sign
    assert oracle.relative_error(found.detach(), wanted.detach(), floor=floor) <= bound
    slopes = torch.autograd.grad(found, leaves, upstream.to(found.dtype))
    truth = torch.autograd.grad(wanted, exact, upstream)
    for leaf, slope, true in zip(leaves, slopes, truth, strict=True):
        assert slope.dtype == leaf.dtype
        assert oracle.relative_l2(slope.reshape(1, -1), true.reshape(1, -1)) <= tolerance


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", GRADIENT, ids=str)
def test_values_and_gradients(kind: str, tail: str, dtype: torch.dtype, backend: str) -> None:
    bound = 1e-9 if dtype == torch.float64 else 1e-5
    temperature = torch.rand(T) + 0.7
    check(
        Case(dtype), GRADIENT[dtype], bound, backend, kind=kind, tail=tail, temperature=temperature
    )


@pytest.mark.parametrize("tile", [None, (1, 7), (64, 512)], ids=str)
def test_tiles(tile: tuple[int, int] | None) -> None:
    check(Case(torch.float32), 1e-5, 1e-5, "cpu", tile=tile)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"t": 1}, {"k": 1}, {"v": 7, "k": 7}, {"v": 1, "k": 1}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_sizes(sizes: dict[str, int], kind: str, backend: str) -> None:
    """All tokens given, too: then nothing is left for the rest, neither mass nor gradient."""
    case = Case(torch.float64, **sizes)
    case.ids = case.ids.abs()  # the padding of row 1 would be token 1, twice
    if "v" in sizes:
        v = sizes["v"]
        case.ids = torch.stack([torch.randperm(v) for _ in range(T)])
        case.log_q = torch.randn(T, v, dtype=torch.float64).log_softmax(-1)
        if v == 1:
            found = case(kind=kind, backend=backend)
            assert bool((found.abs() < 1e-6).all())
            return
        case.log_q -= 1e-3
    else:
        case.log_q = torch.full_like(case.log_q, math.log(0.5 / case.ids.shape[1]))
        case.ids = torch.stack([torch.randperm(V)[: case.ids.shape[1]] for _ in case.ids])
    check(
        case, 1e-7, 1e-7, backend, kind=kind, tile=(2, 4), tail="drop" if "v" in sizes else "bucket"
    )


def test_a_covered_mass_near_1_keeps_its_tail(backend: str) -> None:
    """1 - P of 1e-9 and less, whose digits a difference from 1 would not have."""
    case = Case(torch.float32)
    case.bias[:] = -30.0
    case.ids = torch.stack([torch.arange(K) * 40 + 3 for _ in range(T)])  # in as many tiles
    case.bias[case.ids[0]] = 0.0
    case.log_q = torch.randn(T, K).log_softmax(-1) + math.log1p(-1e-3)
    for kind in KINDS:
        check(case, 1e-5, 1e-5, backend, kind=kind)


def test_labels_in_the_loss_and_a_cap(backend: str) -> None:
    case = Case(torch.float32)
    labels = torch.randint(0, V, (T,))
    labels[::5] = -100
    labels[1] = case.ids[1, 0]  # a token that is taken out of the rest, for a moment
    options = {"labels": labels, "softcap": 3.0, "temperature": 2.0, "reduction": "mean"}
    leaves = [t.detach().requires_grad_() for t in case.leaves]
    found = case(leaves, ce_weight=0.3, tile=TILE, backend=backend, **options)
    exact = [t.detach().double().requires_grad_() for t in case.leaves]
    x = 3 * torch.tanh(case.logits(exact) / 3)
    soft = fusedkl.topk_divergence(
        x, case.ids, case.log_q.double(), temperature=2.0, backend="reference"
    )
    hard = torch.nn.functional.cross_entropy(x, labels, reduction="none")
    assert isinstance(soft, Tensor)
    wanted = (0.7 * soft + 0.3 * hard)[labels != -100].mean()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0)
    slopes = torch.autograd.grad(found, leaves)
    for slope, true in zip(slopes, torch.autograd.grad(wanted, exact), strict=True):
        assert oracle.relative_l2(slope.reshape(1, -1), true.reshape(1, -1)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_count(kind: str, backend: str) -> None:
    case, mask = Case(torch.float32), torch.rand(T) < 0.6
    mask[:2] = torch.tensor([False, True])
    clean = case(kind=kind, tile=TILE, backend=backend)
    case.hidden[0], case.ids[0], case.log_q[0] = math.nan, 10**6, 7.0  # may be anything
    leaves = [t.detach().requires_grad_() for t in case.leaves]
    found = case(leaves, kind=kind, mask=mask, tile=TILE, backend=backend)
    torch.testing.assert_close(found, torch.where(mask, clean, 0), rtol=1e-6, atol=1e-7)
    dh, dw, _ = torch.autograd.grad(found.sum(), leaves)
    assert bool((dh[~mask] == 0).all()) and bool(dw.isfinite().all())
    leaves = [t.detach().requires_grad_() for t in case.leaves]
    nothing = case(leaves, mask=torch.zeros_like(mask), reduction="mean", backend=backend)
    assert nothing == 0
    assert all(bool((g == 0).all()) for g in torch.autograd.grad(nothing, leaves))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("tail", TAILS)
def test_a_bad_token_stays_alone(bad: float, tail: str, backend: str) -> None:
    case = Case(torch.float32)
    case.hidden[5, 3] = bad
    leaf = case.hidden.requires_grad_()
    found = case([leaf, case.weight, case.bias], tail=tail, tile=TILE, backend=backend)
    (slope,) = torch.autograd.grad(found.sum(), leaf)
    others = torch.arange(T) != 5
    assert bool(found[5].isnan()) and bool(found[others].isfinite().all())
    assert bool(slope[others].isfinite().all())


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_token_whose_gradient_is_0(kind: str, tail: str, backend: str) -> None:
    """It does not reach the weight, through which all tokens' gradients go."""
    case, others = Case(torch.float32), torch.arange(T) != 5
    call = {"kind": kind, "tail": tail, "tile": TILE, "backend": backend}
    leaves = [t.detach().requires_grad_() for t in case.leaves]
    clean = torch.autograd.grad(case(leaves, **call)[others].sum(), leaves)
    case.hidden[5, 3] = math.nan
    leaves = [t.detach().requires_grad_() for t in case.leaves]
    found = case(leaves, **call)
    assert found.isnan().nonzero().tolist() == [[5]]
    slopes = torch.autograd.grad(found[others].sum(), leaves, retain_graph=True)
    for slope, wanted in zip(slopes, clean, strict=True):
        torch.testing.assert_close(slope[5:6] * 0, torch.zeros_like(slope[5:6]))
        torch.testing.assert_close(slope, wanted, rtol=1e-5, atol=1e-6)
    assert all(bool(slope.isnan().any()) for slope in torch.autograd.grad(found.sum(), leaves))
    share = others.float().requires_grad_()
    loss = case(leaves, token_weight=share, reduction="sum", **call)
    for slope, wanted in zip(torch.autograd.grad(loss, leaves), clean, strict=True):
        torch.testing.assert_close(slope, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tail", TAILS)
def test_ids_of_no_token_are_nan_where_nobody_may_look(
    tail: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under torch.compile, and on a GPU."""
    case = Case(torch.float32)
    leaves = [t.detach().requires_grad_() for t in case.leaves]
    clean = case(leaves, tail=tail, tile=TILE, backend=backend)
    case.ids[0, 2], case.ids[4, 0] = V, V + 7
    monkeypatch.setattr(topk, "_check_contents", lambda *_: None)
    found = case(leaves, tail=tail, tile=TILE, backend=backend)
    good = torch.ones(T, dtype=torch.bool)
    good[[0, 4]] = False
    assert torch.equal(found.isnan(), ~good)
    torch.testing.assert_close(found[good], clean[good], rtol=1e-6, atol=1e-7)
    slope, _, _ = torch.autograd.grad(found.sum(), leaves)
    assert bool(slope[~good].isnan().all()) and bool(slope[good].isfinite().all())


def test_a_masked_tokens_temperature_under_create_graph(backend: str) -> None:
    case, mask = Case(torch.float64), torch.arange(T) != 2
    temperature = torch.ones(T)
    for wrong in (0.0, math.nan):
        temperature[2] = wrong
        leaves = [t.detach().requires_grad_() for t in case.leaves]
        loss = case(
            leaves, temperature=temperature, mask=mask, reduction="sum", tile=TILE, backend=backend
        )
        plain = torch.autograd.grad(loss, leaves, retain_graph=True)
        for slope, wanted in zip(
            torch.autograd.grad(loss, leaves, create_graph=True), plain, strict=True
        ):
            torch.testing.assert_close(slope, wanted)


def test_a_masked_vocabulary(backend: str) -> None:
    """-inf in the bias: tokens that the policy rules out, in whole tiles and among the K."""
    case = Case(torch.float64)
    case.bias[40:130] = -math.inf
    case.ids[:, 0] = 60
    case.ids[:, 1:] = torch.arange(K - 1)
    case.log_q = torch.randn(T, K, dtype=torch.float64).log_softmax(-1) - 0.1
    wanted, _ = case.exactly(kind="forward_kl")
    assert bool((case(tile=TILE, backend=backend) == math.inf).all() and (wanted == math.inf).all())
    check(case, 1e-8, 1e-9, backend, kind="reverse_kl")


def test_second_derivatives(backend: str) -> None:
    case = Case(torch.float64, t=2, v=9, k=3)
    leaves = [t.requires_grad_() for t in case.leaves]
    for tail in TAILS:
        assert torch.autograd.gradgradcheck(
            lambda *given, tail=tail: case(list(given), tail=tail, tile=(2, 4), backend=backend),
            leaves,
            fast_mode=True,
        )


@pytest.mark.slow
def test_compiled_and_as_a_module(backend: str) -> None:
    torch.compiler.reset()
    case = Case(torch.float32)
    module = fusedkl.LinearDivergenceLoss(
        "reverse_kl", tail="renormalize", reduction="mean", tile=TILE, backend=backend
    )

    def step(hidden: Tensor, weight: Tensor, ids: Tensor, log_q: Tensor) -> Tensor:
        loss: Tensor = module(hidden, weight, ref_topk=(ids, log_q), bias=case.bias)
        return loss

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (T, 20):
        results = []
        for call in (step, compiled):
            leaves = [case.hidden[:tokens].clone().requires_grad_(), case.weight.requires_grad_()]
            loss = call(*leaves, case.ids[:tokens], case.log_q[:tokens])
            results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
        torch.testing.assert_close(*results, rtol=1e-6, atol=1e-9)
    assert torch.equal(
        step(case.hidden, case.weight, case.ids, case.log_q),
        case(kind="reverse_kl", tail="renormalize", reduction="mean", tile=TILE, backend=backend),
    )


def test_memory_is_that_of_a_tile() -> None:
    tokens, vocabulary, width = 256, 20011, 64
    leaves = [torch.randn(n, width).requires_grad_() for n in (tokens, vocabulary)]
    ids = torch.stack([torch.randperm(vocabulary)[:16] for _ in range(tokens)])
    log_q = torch.randn(tokens, 16).log_softmax(-1) - 0.1

    def both() -> object:
        loss = fusedkl.linear_divergence(*leaves, ref_topk=(ids, log_q), reduction="mean")
        return torch.autograd.grad(loss, leaves)

    both()
    kept = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
    full = tokens * vocabulary * 4
    assert kept <= peak(both) < kept + (10 << 20) < kept + full


G = torch.Generator().manual_seed(0)
HIDDEN, WEIGHT = torch.randn(5, 8, generator=G), torch.randn(20, 8, generator=G)
IDS, LOG_Q = torch.arange(3).expand(5, 3), torch.full((5, 3), -2.0)

BAD: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "one tensor": (IDS, {}, TypeError, "ref_topk must be two tensors, .* got Tensor"),
    "three": ((IDS, LOG_Q, LOG_Q), {}, TypeError, "ref_topk must be two tensors, .* got 3"),
    "integer ids": ((IDS.int(), LOG_Q), {}, TypeError, r"ref_topk\[0\].* int64 .*got torch.int32"),
    "integers": ((IDS, IDS), {}, TypeError, r"ref_topk\[1\].*floating-point.*int64"),
    "tokens": ((IDS[:4], LOG_Q), {}, ValueError, r"ref_topk\[0\].*\[5, 'K'\]; got \[4, 3\]"),
    "shapes": ((IDS, LOG_Q[:, :2]), {}, ValueError, r"ref_topk\[1\].*\[5, 3\]; got \[5, 2\]"),
    "device": ((IDS.to("meta"), LOG_Q), {}, ValueError, r"ref_topk\[0\].* on cpu .* got meta"),
    "nothing": ((IDS[:, :0], LOG_Q[:, :0]), {}, ValueError, r"ref_topk\[0\].* 1 to V = 20.*got 0"),
    "too large": ((IDS + 18, LOG_Q), {}, ValueError, r"ref_topk\[0\].* to 19, or -1; got 18 to 20"),
    "twice": ((IDS * 0, LOG_Q), {}, ValueError, r"ref_topk\[0\].* different in each row"),
    "above 0": ((IDS, -LOG_Q), {}, ValueError, r"ref_topk\[1\].* at most 0; got 2.0"),
    "kind": ((IDS, LOG_Q), {"kind": "jsd"}, ValueError, "kind must be .* ref_topk; got 'jsd'"),
    "tail": ((IDS, LOG_Q), {"tail": "head"}, ValueError, "tail must be one of .*; got 'head'"),
    "no top-k": (None, {"tail": "drop", "ref_logits": WEIGHT[:5, :1].expand(5, 20)}, ValueError,
                 "tail='drop' has no effect without ref_topk"),
    "two references": ((IDS, LOG_Q), {"ref_logits": torch.randn(5, 20)}, ValueError,
                       r"one form of reference.*ref_logits of shape \[5, 20\].*\[5, 3\]"),
    "a cap": ((IDS, LOG_Q), {"ref_softcap": 2.0}, ValueError, "ref_softcap has no effect with"),
    "a scale": ((IDS, LOG_Q), {"ref_logit_scale": 2.0}, ValueError, "ref_logit_scale has no"),
    "a weight": ((IDS, LOG_Q), {"ref_weight": torch.randn(20, 6)}, ValueError,
                 "ref_weight needs ref_hidden"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    given, options, error, said = BAD[case]
    with pytest.raises(error) as caught:
        fusedkl.linear_divergence(HIDDEN, WEIGHT, ref_topk=given, **options)
    assert re.search(said, str(caught.value)), str(caught.value)
