"""linear_divergence against the composition in float64: values, gradients, edges, errors."""

from __future__ import annotations

import math
import re
import types
from typing import Any

import linear_cases
import oracle
import pytest
import torch
from linear_cases import DIVERGENCES, TILE, Heads, heads
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fusedkl
from fusedkl import linear_products
from fusedkl.linear_plan import tiles

# Relative L2 of a gradient that is stored in the dtype of its input; 16-bit ones round by 2e-3 and
# more, because the gradient of a tile is rounded to bfloat16 before its product.
GRADIENT = {torch.float64: 1e-8, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
ALL = ("hidden", "weight", "ref_hidden", "ref_weight")


def call(h: Heads, **options: Any) -> Tensor:
    return fusedkl.linear_divergence(**h.tensors, **h.options, **options)


def expected(h: Heads, kind: str, temperature: float | Tensor = 1.0) -> Tensor:
    return DIVERGENCES[kind](*h.log_probs(temperature))


def compare(h: Heads, names: tuple[str, ...], kind: str, tolerance: float, **options: Any) -> None:
    """Values per token, and gradients for random upstream gradients."""
    exact = h.double()
    upstream = torch.randn(h.tensors["hidden"].shape[:-1], dtype=torch.float64)
    leaves, exact_leaves = h.leaves(*names), exact.leaves(*names)
    got = call(h, kind=kind, **options)
    want = expected(exact, kind, options.get("temperature", 1.0))
    assert oracle.relative_error(got, want.detach(), 1e-3) < 1e-5
    found = torch.autograd.grad(got, leaves, upstream.to(got.dtype))
    truth = torch.autograd.grad(want, exact_leaves, upstream)
    for name, leaf, a, e in zip(names, leaves, found, truth, strict=True):
        assert a.dtype == leaf.dtype and a.shape == leaf.shape, name
        assert oracle.relative_l2(a.reshape(1, -1), e.reshape(1, -1)) < tolerance, name


@pytest.mark.parametrize(
    "tile", [None, TILE, (1, 7), pytest.param((64, 512), marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("dtype", GRADIENT, ids=str)
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_values_and_gradients(
    kind: str, dtype: torch.dtype, tile: tuple[int, int] | None, backend: str
) -> None:
    if backend == "reference" and tile is not None:
        pytest.skip("the reference backend has no tiles")
    compare(heads(dtype), ALL, kind, GRADIENT[dtype], tile=tile, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_options_of_the_logits(dtype: torch.dtype, backend: str) -> None:
    h = heads(dtype)
    v = linear_cases.V
    h.tensors |= {"bias": torch.randn(v).to(dtype), "ref_bias": torch.randn(v).to(dtype)}
    h.options |= {"softcap": 2.0, "ref_softcap": 3.0, "logit_scale": 1.5, "ref_logit_scale": 0.5}
    names = (*ALL, "bias", "ref_bias")
    temperature = 0.5 + torch.rand(linear_cases.T)
    tolerance = GRADIENT[dtype]
    compare(h, names, "forward_kl", tolerance, temperature=temperature, tile=TILE, backend=backend)


def test_a_capped_side_and_one_that_is_not(backend: str) -> None:
    h = heads(torch.float32)
    h.options["softcap"] = 2.0
    compare(h, ALL, "reverse_kl", 1e-5, tile=TILE, backend=backend)


def test_one_weight_for_both(backend: str) -> None:
    h = heads(torch.float32)
    h.tensors["ref_hidden"] = torch.randn_like(h.tensors["hidden"])
    del h.tensors["ref_weight"]
    compare(h, ("hidden", "weight", "ref_hidden"), "jeffreys", 1e-5, tile=TILE, backend=backend)
    alone = call(h, tile=TILE, backend=backend)
    h.tensors["ref_weight"] = h.tensors["weight"]
    assert torch.equal(call(h, tile=TILE, backend=backend), alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_reference_given_as_logits(dtype: torch.dtype, backend: str) -> None:
    h = heads(torch.float32)
    # a slice of a larger tensor, and another dtype than the policy's
    given = torch.randn(linear_cases.T, linear_cases.V + 9).to(dtype)[:, 3:-6]
    tensors = {name: h.tensors[name] for name in ("hidden", "weight")} | {"ref_logits": given}
    tolerance = GRADIENT[dtype]
    names = ("hidden", "weight", "ref_logits")
    h = Heads(tensors)
    compare(h, names, "jeffreys", tolerance, tile=TILE, backend=backend)
    h.options["ref_softcap"] = 2.0
    compare(h, names, "forward_kl", tolerance, tile=TILE, backend=backend)


def test_leading_dims_and_strides(backend: str) -> None:
    h = heads(torch.float32, t=30)
    t = h.tensors
    long = torch.randn(3, 11, linear_cases.H)
    t["hidden"] = long[:, :-1]  # a gap after every sequence
    t["weight"] = t["weight"].t().contiguous().t()
    t["ref_hidden"] = t["ref_hidden"].view(3, 10, -1)
    compare(h, ALL, "forward_kl", 1e-5, tile=(7, 50), backend=backend)
    assert call(h, backend=backend).shape == (3, 10)


@pytest.mark.parametrize("sizes", [{"t": 1}, {"v": 1}, {"v": 3}, {"t": 1, "v": 2}], ids=str)
def test_small_sizes(sizes: dict[str, int], backend: str) -> None:
    h = heads(torch.float32, **sizes)
    if sizes.get("v") == 1:
        assert bool((call(h, backend=backend) == 0).all())
    else:
        compare(h, ALL, "forward_kl", 1e-5, backend=backend)


# -- what does not count -------------------------------------------------------------------------


def test_masks_and_reductions(backend: str) -> None:
    h = heads(torch.float32)
    exact = h.double()
    labels = torch.randint(0, 9, (linear_cases.T,))
    labels[::3] = -100
    weight = torch.rand(linear_cases.T)
    tokens = expected(exact, "forward_kl")
    share = torch.where(labels != -100, weight, 0).double()
    options = {"labels": labels, "token_weight": weight, "tile": TILE, "backend": backend}
    for reduction, want in (
        ("none", tokens * share),
        ("sum", (tokens * share).sum()),
        ("mean", (tokens * share).sum() / share.sum()),
        ("batchmean", (tokens * share).sum() / linear_cases.T),
    ):
        got = call(h, reduction=reduction, **options)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-7)


def test_a_masked_token_may_hold_anything(backend: str) -> None:
    h, mask = heads(torch.float32), torch.ones(linear_cases.T, dtype=torch.bool)
    clean = call(h, kind="forward_kl", reduction="sum", backend=backend)
    kept = torch.cat([h.tensors["hidden"][:5], h.tensors["hidden"][6:]])
    h.tensors["hidden"][5] = math.nan
    mask[5] = False
    leaves = h.leaves("hidden", "weight")
    loss = call(h, mask=mask, reduction="sum", tile=TILE, backend=backend)
    dh, dw = torch.autograd.grad(loss, leaves)
    assert bool((dh[5] == 0).all()) and bool(dw.isfinite().all()) and bool(dh.isfinite().all())
    without = Heads(dict(h.tensors))
    without.tensors["hidden"] = kept
    ref = h.tensors["ref_hidden"]
    without.tensors["ref_hidden"] = torch.cat([ref[:5], ref[6:]])
    again = call(without, reduction="sum", tile=TILE, backend=backend)
    torch.testing.assert_close(loss, again, rtol=1e-6, atol=0)
    assert loss < clean


@pytest.mark.parametrize("cap", [None, 2.0])
def test_a_mask_over_given_logits(cap: float | None, backend: str) -> None:
    """Which rows of them a tile takes, and where their gradients go."""
    full = heads(torch.float32)
    given = torch.randn(linear_cases.T, linear_cases.V)
    h = Heads({n: full.tensors[n] for n in ("hidden", "weight")} | {"ref_logits": given})
    h.options["ref_softcap"] = cap
    exact, mask = h.double(), torch.rand(linear_cases.T) < 0.4
    given[~mask] = math.nan
    names = ("hidden", "weight", "ref_logits")
    leaves, exact_leaves = h.leaves(*names), exact.leaves(*names)
    want = torch.where(mask, expected(exact, "reverse_kl"), 0)
    got = call(h, kind="reverse_kl", mask=mask, tile=TILE, backend=backend)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    truth = torch.autograd.grad(want.sum(), exact_leaves)
    for a, e in zip(torch.autograd.grad(got.sum(), leaves), truth, strict=True):
        assert oracle.relative_l2(a.reshape(1, -1), e.reshape(1, -1)) < 1e-5


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_token_stays_alone(backend: str, bad: float) -> None:
    h = heads(torch.float32)
    h.tensors["hidden"][5, 3] = bad
    (leaf,) = h.leaves("hidden")
    tokens = call(h, tile=TILE, backend=backend)
    (gradient,) = torch.autograd.grad(tokens.sum(), leaf)
    others = torch.arange(linear_cases.T) != 5
    assert bool(tokens[5].isnan()) and bool(tokens[others].isfinite().all())
    assert bool(gradient[others].isfinite().all())


def test_given_logits_of_masked_last_tokens_are_read_in_place() -> None:
    torch.use_deterministic_algorithms(False)  # filling memory is what would be seen
    y, mask = torch.randn(4, 9, 20_000), torch.arange(9).expand(4, 9) < 8
    hidden, weight = torch.randn(4, 9, 16), torch.randn(20_000, 16)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        found = fusedkl.linear_divergence(hidden, weight, ref_logits=y, mask=mask, backend="cpu")
    sizes = [e.nbytes() for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert max(sizes) < y.nbytes / 4
    cut = fusedkl.linear_divergence(hidden[:, :-1], weight, ref_logits=y[:, :-1], backend="cpu")
    assert torch.equal(found[:, :-1], cut) and not found[:, -1].any()


@pytest.mark.parametrize("tokens", [0, linear_cases.T])
def test_nothing_counts(tokens: int, backend: str) -> None:
    h = heads(torch.float32, t=tokens)
    leaves = h.leaves(*ALL)
    mask = torch.zeros(tokens, dtype=torch.bool)
    loss = call(h, mask=mask, reduction="mean", backend=backend)
    assert loss == 0
    for gradient, leaf in zip(torch.autograd.grad(loss, leaves), leaves, strict=True):
        assert gradient.shape == leaf.shape and bool((gradient == 0).all())


def test_a_masked_vocabulary(backend: str) -> None:
    """-inf in the bias of both sides, over more than one whole tile."""
    h = heads(torch.float32)
    bias = torch.zeros(linear_cases.V)
    bias[30:130] = -math.inf
    h.tensors |= {"bias": bias, "ref_bias": bias.clone()}
    h.options["softcap"] = h.options["ref_softcap"] = 5.0
    leaves = h.leaves("hidden", "weight")
    got = call(h, tile=TILE, backend=backend)
    dh, dw = torch.autograd.grad(got.sum(), leaves)
    keep = torch.cat([torch.arange(30), torch.arange(130, linear_cases.V)])
    cut = Heads(dict(h.tensors), dict(h.options))
    for name in ("weight", "ref_weight", "bias", "ref_bias"):
        cut.tensors[name] = h.tensors[name].detach()[keep]
    cut = cut.double()
    exact = cut.leaves("hidden", "weight")
    want = expected(cut, "forward_kl")
    eh, ew = torch.autograd.grad(want.sum(), exact)
    assert oracle.relative_error(got, want.detach()) < 1e-5
    assert oracle.relative_l2(dh, eh) < 1e-5
    assert oracle.relative_l2(dw[keep].reshape(1, -1), ew.reshape(1, -1)) < 1e-5
    assert bool((dw[30:130] == 0).all())


# -- accuracy and precision ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "hellinger", "tvd"])
def test_rows_that_are_one_token_but_for_rounding(kind: str, backend: str) -> None:
    """Its log-ratio is a rest of sums over tiles; a weight of 1 makes the logits exact."""
    v, weight = 500, torch.eye(500)
    for peak, gap in ((36.0, 0.0), (32.0, 0.3), (30.0, 0.0), (20.0, 2.0)):
        x, y = torch.randn(2, 4, v)
        x[:, 7] += peak
        y[:, 7] += peak - gap
        leaves = [x.requires_grad_(), y.requires_grad_()]
        exact = [t.detach().double().requires_grad_() for t in leaves]
        wanted = fusedkl.divergence(*exact, kind, backend="reference")
        truth = torch.autograd.grad(wanted.sum(), exact)
        for tile in (None, (3, 130)):
            found = fusedkl.linear_divergence(
                x, weight, ref_logits=y, kind=kind, tile=tile, backend=backend
            )
            assert oracle.relative_error(found.detach(), wanted.detach(), 1e-15) < 1e-5
            for slope, true in zip(torch.autograd.grad(found.sum(), leaves), truth, strict=True):
                # 2.3e-5 at worst in 600 draws with AVX2, 2.5e-5 in these with AVX-512
                assert oracle.relative_l2(slope, true) < 5e-5


@pytest.mark.parametrize("native", [True, False])
def test_float32_tiles_and_fast_ones(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 inputs: exact products by default, the rounding of logits with "fast", if faster."""
    monkeypatch.setattr(linear_products, "multiplied_natively", lambda *_: native)
    torch.manual_seed(1)
    h = heads(torch.bfloat16, v=4096)
    t = h.tensors
    t["ref_hidden"] = (t["hidden"].float() + 0.05 * torch.randn(linear_cases.T, 24)).bfloat16()
    t["ref_weight"] = t["weight"]
    want = expected(h.double(), "forward_kl")
    errors = {
        precision: oracle.relative_error(call(h, precision=precision, backend="cpu"), want)
        for precision in (None, "fast")
    }
    assert float(want.mean()) < 5e-3
    assert errors[None] < 1e-4
    assert 1e-3 < errors["fast"] < 0.5 if native else errors["fast"] == errors[None]


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_gradients_of_fast(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of logits that bfloat16 holds: its rounding of tiles of gradients and of their products."""
    monkeypatch.setattr(linear_products, "multiplied_natively", lambda *_: True)
    t, v = linear_cases.T, linear_cases.V
    whole = {
        "hidden": torch.randint(-2, 3, (t, 8)),
        "weight": torch.randint(-2, 3, (v, 8)) / 4,
        "ref_hidden": torch.randint(-2, 3, (t, 8)),
        "ref_weight": torch.randint(-2, 3, (v, 8)) / 4,
    }
    h = Heads({name: n.bfloat16() for name, n in whole.items()})
    assert torch.equal(
        (h.tensors["hidden"] @ h.tensors["weight"].t()).double(), h.double().logits("")
    )
    compare(h, ALL, kind, 1.5e-2, tile=TILE, precision="fast", backend="cpu")
    # of one tile: nothing is added to what was rounded
    compare(h, ALL, kind, 5e-3, tile=(64, 512), precision="fast", backend="cpu")


def test_who_has_16_bit_products(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"_is_mkldnn_bf16_supported": lambda: True, "_is_mkldnn_fp16_supported": lambda: False}
    monkeypatch.setattr(torch.ops, "mkldnn", types.SimpleNamespace(**said))
    assert linear_products.multiplied_natively(torch.bfloat16, "cpu")
    assert not linear_products.multiplied_natively(torch.float16, "cpu")
    assert linear_products.multiplied_natively(torch.float16, "cuda")
    monkeypatch.setattr(torch.ops, "mkldnn", types.SimpleNamespace())  # a build without oneDNN
    assert not linear_products.multiplied_natively(torch.bfloat16, "cpu")


def test_the_products_setting_is_put_back() -> None:
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    call(heads(torch.bfloat16), reduction="sum", backend="cpu")
    assert setting.fp32_precision == before == "none"


def test_second_derivatives(backend: str) -> None:
    h = heads(torch.float64, t=3, v=9)
    leaves = h.leaves("hidden", "weight")

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        tensors = h.tensors | {"hidden": hidden, "weight": weight}
        return call(Heads(tensors), tile=(2, 4), backend=backend)

    assert torch.autograd.gradgradcheck(loss, leaves, fast_mode=True)


def test_the_module_holds_the_options() -> None:
    h = heads(torch.float32)
    labels = torch.randint(-1, 9, (linear_cases.T,))
    options = {"temperature": 2.0, "softcap": 4.0, "reduction": "mean", "tile": TILE}
    module = fusedkl.LinearDivergenceLoss("reverse_kl", ignore_index=-1, **options)
    got = module(**h.tensors, labels=labels)
    want = call(h, kind="reverse_kl", labels=labels, ignore_index=-1, **options)
    assert torch.equal(got, want)
    assert torch.equal(module(**h.tensors), call(h, kind="reverse_kl", **options))


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"kind": "kl"}, ValueError, "kind must be one of"),
        ({"ce_weight": 3}, ValueError, "ce_weight must be from 0 to 1; got 3"),
        ({"ce_weight": "all"}, TypeError, "ce_weight must be a number; got str"),
        ({"tile": 3}, TypeError, "tile must be two positive ints.* got int"),
        ({"tile": (3, 0)}, ValueError, r"tile .*\(3, 0\)"),
        ({"precision": "x"}, ValueError, "precision must be None or \"fast\"; got 'x'"),
        ({"softcap": -1.0}, ValueError, "softcap must be positive and finite; got -1.0"),
        ({"ref_softcap": "2"}, TypeError, "ref_softcap must be a number; got str"),
        ({"logit_scale": math.inf}, ValueError, "logit_scale must be finite; got inf"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive and finite; got 0.0"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of"),
        ({"tail": "none"}, ValueError, "tail must be one of"),
        ({"beta": 0.1}, ValueError, "beta=0.1 has no effect"),
    ],
)
def test_the_module_refuses_options_when_it_is_made(
    options: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        fusedkl.LinearDivergenceLoss(**options)


# -- tiles ---------------------------------------------------------------------------------------


def test_tiles_cover_and_stay_below_their_limits() -> None:
    for tokens in (1, 5, 512, 1000, 1025, 16384):
        for vocabulary in (1, 67, 32000, 128256, 262144):
            for device in ("cpu", "cuda"):
                found = tiles(tokens, vocabulary, 4, device)
                assert found.tokens * found.vocabulary * 8 <= 128 << 20
                for size, length in zip(found[:2], (tokens, vocabulary), strict=True):
                    assert 1 <= size <= -(-length // 8) * 8
    assert tiles(100, 100, 4, "cpu", (8, 16))[:2] == (8, 16)
    assert tiles(512, 128256, 4, "cpu") == (512, 1024, 1024)


# -- bad input -----------------------------------------------------------------------------------

G = torch.Generator().manual_seed(0)
HIDDEN, WEIGHT = torch.randn(5, 8, generator=G), torch.randn(20, 8, generator=G)
REF, REF_W = torch.randn(5, 6, generator=G), torch.randn(20, 6, generator=G)

BAD: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "no reference": ((HIDDEN, WEIGHT), {}, ValueError, "ref_hidden .* ref_logits or ref_topk"),
    "hidden sizes": (
        (HIDDEN, REF_W, REF, REF_W),
        {},
        ValueError,
        r"weight must have shape \[V, H\].*hidden.*\[5, 8\]; got \[20, 6\]",
    ),
    "reference's hidden size": (
        (HIDDEN, WEIGHT, REF, WEIGHT),
        {},
        ValueError,
        r"ref_weight .*ref_hidden.*\[5, 6\]; got \[20, 8\]",
    ),
    "shared weight of another size": (
        (HIDDEN, WEIGHT, REF),
        {},
        ValueError,
        r"ref_weight .*ref_hidden.*\[5, 6\]; got \[20, 8\]",
    ),
    "vocabularies": (
        (HIDDEN, WEIGHT, REF, REF_W[:-1]),
        {},
        ValueError,
        r"one vocabulary.*\[20, 8\] and \[19, 6\]",
    ),
    "tokens": (
        (HIDDEN, WEIGHT, REF[:-1], REF_W),
        {},
        ValueError,
        r"ref_hidden .*\[5, 8\]; got \[4, 6\]",
    ),
    "dtypes": (
        (HIDDEN, WEIGHT.half(), REF, REF_W),
        {},
        TypeError,
        r"weight must have the dtype of hidden, torch.float32 of shape \[5, 8\]; "
        r"got torch.float16 of shape \[20, 8\]",
    ),
    "dtypes of the reference": (
        (HIDDEN, WEIGHT, REF, REF_W.double()),
        {},
        TypeError,
        r"ref_weight must have the dtype of ref_hidden, torch.float32 of shape \[5, 6\]; "
        r"got torch.float64 of shape \[20, 6\]",
    ),
    "dtype of a shared weight": (
        (HIDDEN, WEIGHT, HIDDEN.bfloat16()),
        {},
        TypeError,
        r"ref_weight .*ref_hidden, torch.bfloat16 of shape \[5, 8\]; got torch.float32 .*\[20, 8\]",
    ),
    "dtype of a bias": (
        (HIDDEN, WEIGHT, REF, REF_W),
        {"bias": torch.zeros(20).half()},
        TypeError,
        r"bias .* of hidden, torch.float32 of shape \[5, 8\]; got torch.float16 of shape \[20\]",
    ),
    "dtype of the reference's bias": (
        (HIDDEN, WEIGHT, REF, REF_W),
        {"ref_bias": torch.zeros(20).bfloat16()},
        TypeError,
        r"ref_bias .* of ref_hidden, .*\[5, 6\]; got torch.bfloat16 of shape \[20\]",
    ),
    "ints": (
        (HIDDEN.long(), WEIGHT.long(), REF, REF_W),
        {},
        TypeError,
        "hidden must have one of the dtypes .*; got int64",
    ),
    "logits that are ints": (
        (HIDDEN, WEIGHT),
        {"ref_logits": torch.zeros(5, 20, dtype=torch.int64)},
        TypeError,
        "ref_logits must have one of the dtypes .*; got int64",
    ),
    "device": (
        (HIDDEN, WEIGHT, REF.to("meta"), REF_W.to("meta")),
        {},
        ValueError,
        r"ref_hidden must be on cpu as hidden, .*\[5, 8\]; got meta, shape \[5, 6\]",
    ),
    "device of the weight": (
        (HIDDEN, WEIGHT.to("meta"), REF, REF_W),
        {},
        ValueError,
        r"weight must be on cpu as hidden, .*\[5, 8\]; got meta, shape \[20, 8\]",
    ),
    "device of the reference's weight": (
        (HIDDEN, WEIGHT, REF, REF_W.to("meta")),
        {},
        ValueError,
        r"ref_weight must be on cpu as ref_hidden, .*\[5, 6\]; got meta, shape \[20, 6\]",
    ),
    "device of a bias": (
        (HIDDEN, WEIGHT, REF, REF_W),
        {"bias": torch.zeros(20, device="meta")},
        ValueError,
        r"bias must be on cpu as hidden, .*\[5, 8\]; got meta, shape \[20\]",
    ),
    "device of the reference's logits": (
        (HIDDEN, WEIGHT),
        {"ref_logits": torch.zeros(5, 20, device="meta")},
        ValueError,
        r"ref_logits must be on cpu as hidden, .*\[5, 8\]; got meta, shape \[5, 20\]",
    ),
    "a hidden size of 0": (
        (HIDDEN[:, :0], WEIGHT[:, :0], REF, REF_W),
        {},
        ValueError,
        r"hidden must have a hidden size of at least 1; got \[5, 0\]",
    ),
    "a reference's hidden size of 0": (
        (HIDDEN, WEIGHT, REF[:, :0], REF_W[:, :0]),
        {},
        ValueError,
        r"ref_hidden must have a hidden size of at least 1; got \[5, 0\]",
    ),
    "no dims": (
        (HIDDEN[0, 0], WEIGHT, REF, REF_W),
        {},
        ValueError,
        r"hidden must have shape \[..., H\]; got a 0-d tensor",
    ),
    "two references": (
        (HIDDEN, WEIGHT, REF, REF_W),
        {"ref_logits": torch.randn(5, 20)},
        ValueError,
        r"one form of reference.*\[5, 6\].*\[5, 20\]",
    ),
    "a weight without hidden states": (
        (HIDDEN, WEIGHT, None, REF_W),
        {"ref_logits": torch.randn(5, 20)},
        ValueError,
        "ref_weight needs ref_hidden",
    ),
    "logits of another vocabulary": (
        (HIDDEN, WEIGHT),
        {"ref_logits": torch.randn(5, 21)},
        ValueError,
        r"ref_logits must have weight's vocabulary, \[20, 8\]; got \[5, 21\]",
    ),
    "bias": (
        (HIDDEN, WEIGHT, REF, REF_W),
        {"bias": torch.zeros(8)},
        ValueError,
        r"bias must have shape \[V\] of weight.*\[20, 8\]; got \[8\]",
    ),
    "softcap": ((HIDDEN, WEIGHT, REF, REF_W), {"softcap": 0.0}, ValueError, "softcap .* 0.0"),
    "no cap": (
        (HIDDEN, WEIGHT, REF, REF_W),
        {"ref_softcap": math.inf},
        ValueError,
        "ref_softcap must be positive and finite; got inf",
    ),
    "no scale": (
        (HIDDEN, WEIGHT, REF, REF_W),
        {"logit_scale": math.nan},
        ValueError,
        "logit_scale must be finite; got nan",
    ),
    "one number": (
        (HIDDEN, WEIGHT, REF, REF_W),
        {"tile": 5},
        TypeError,
        "tile must be two positive ints.* got int",
    ),
    "a list of logits": (
        (HIDDEN, WEIGHT, REF, REF_W),
        {"ref_logits": [1]},
        TypeError,
        "ref_logits must be a tensor, got list",
    ),
    "scale": ((HIDDEN, WEIGHT, REF, REF_W), {"logit_scale": "2"}, TypeError, "logit_scale .* str"),
    "precision": ((HIDDEN, WEIGHT, REF, REF_W), {"precision": "bf16"}, ValueError, "precision"),
    "tile": ((HIDDEN, WEIGHT, REF, REF_W), {"tile": (0, 5)}, ValueError, r"tile .*\(0, 5\)"),
    "kind": ((HIDDEN, WEIGHT, REF, REF_W, "kl"), {}, ValueError, "kind must be one of"),
    "mask": (
        (HIDDEN, WEIGHT, REF, REF_W),
        {"mask": torch.ones(4, dtype=torch.bool)},
        ValueError,
        r"mask must have shape .*\[5\]; got \[4\]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    tensors, options, error, said = BAD[case]
    with pytest.raises(error) as caught:
        fusedkl.linear_divergence(*tensors, **options)
    assert re.search(said, str(caught.value)), str(caught.value)
