"""distillation_loss against its definition in float64, its gradients, memory, edges and errors."""

from __future__ import annotations

import math
from collections.abc import Callable

import oracle
import pytest
import torch
import torch.nn.functional as F
from family_oracle import FAMILY
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fusedkl
from fusedkl import contents, layout, validation

N, V = 6, 67
TEMPERATURES = [1.0, 2.0, torch.rand(N) + 0.5]


def expected(
    x: Tensor,
    y: Tensor,
    labels: Tensor,
    kind: str,
    temperature: float | Tensor,
    ce_weight: float,
    label_smoothing: float = 0.0,
    scale_t2: bool = True,
) -> Tensor:
    """Per token, in float64; 0 where the label is -100."""
    t = torch.as_tensor(temperature, dtype=torch.float64).reshape(-1, 1)
    log_p, log_q = (x.double() / t).log_softmax(-1), (y.double() / t).log_softmax(-1)
    forward = (log_q.exp() * (log_q - log_p)).sum(-1)
    reverse = (log_p.exp() * (log_p - log_q)).sum(-1)
    given = {"forward_kl": forward, "reverse_kl": reverse, "jeffreys": forward + reverse}
    if kind in given:
        soft = given[kind]
    else:
        name, options = FAMILY[kind]
        soft = fusedkl.divergence(
            x.double(), y.double(), name, temperature=t.squeeze(-1).expand(len(x)),
            backend="reference", **options,
        )  # fmt: skip
    hard = F.cross_entropy(
        x.double(), labels, reduction="none", label_smoothing=label_smoothing, ignore_index=-100
    )
    factor = t.squeeze(-1) ** 2 if scale_t2 else 1
    return torch.where(labels != -100, (1 - ce_weight) * factor * soft + ce_weight * hard, 0)


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x, y = (2 * torch.randn(2, N, V)).to(dtype).unbind()
    labels = torch.randint(0, V, (N,))
    labels[2] = -100
    return x.requires_grad_(), y.clone().requires_grad_(), labels


@pytest.mark.parametrize("dtype", oracle.GRADIENT_TOLERANCE, ids=str)
@pytest.mark.parametrize("temperature", TEMPERATURES, ids=["1", "2", "rows"])
@pytest.mark.parametrize("kind", ["forward_kl", "jeffreys"])
def test_values_and_gradients(
    kind: str, temperature: float | Tensor, dtype: torch.dtype, backend: str
) -> None:
    x, y, labels = inputs(dtype)
    wanted = expected(x, y, labels, kind, temperature, 0.3)
    found = fusedkl.distillation_loss(
        x, y, labels, kind=kind, temperature=temperature, ce_weight=0.3, reduction="none",
        backend=backend,
    )  # fmt: skip
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    bound = oracle.VALUE_TOLERANCE[found.dtype]
    assert oracle.relative_error(found, wanted.detach()) <= bound
    upstream = torch.rand(N)
    truth = torch.autograd.grad(wanted, (x, y), upstream.double())
    slopes = torch.autograd.grad(found, (x, y), upstream.to(found.dtype))
    for slope, true in zip(slopes, truth, strict=True):
        assert oracle.relative_l2(slope, true.double()) <= 1.5 * oracle.GRADIENT_TOLERANCE[dtype]
        assert not slope[2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["forward_kl", "jsd 0.1", "renyi 2", "tvd"])
def test_label_smoothing(kind: str, temperature: float, dtype: torch.dtype, backend: str) -> None:
    x, y, labels = inputs(dtype)
    x.data[2] = math.nan  # not counted
    safe = torch.where(labels[:, None] == -100, 0, x)
    wanted = expected(safe, y, labels, kind, temperature, 0.6, 0.2)
    name, options = FAMILY.get(kind, (kind, {}))
    found = fusedkl.distillation_loss(
        x, y, labels, kind=name, temperature=temperature, ce_weight=0.6, label_smoothing=0.2,
        reduction="none", backend=backend, **options,
    )  # fmt: skip
    assert oracle.relative_error(found, wanted.detach()) <= oracle.VALUE_TOLERANCE[found.dtype]
    (truth,) = torch.autograd.grad(wanted.sum(), x)
    (slope,) = torch.autograd.grad(found.sum(), x)
    assert oracle.relative_l2(slope, truth.double()) <= 1.5 * oracle.GRADIENT_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_gradient_near_the_optimum_is_rounded_once(dtype: torch.dtype, backend: str) -> None:
    # where the two halves of the gradient cancel, all but what rounding the logits leaves
    n, width, t, w = 32, 8, 2.0, 0.1
    x, labels = torch.randn(n, width).to(dtype), torch.randint(0, width, (n,))
    p, p_t = (x.double() / s for s in (1, t))
    p, p_t = p.softmax(-1), p_t.softmax(-1)
    q = p_t + w / ((1 - w) * t) * (p - F.one_hot(labels, width))
    x, y, labels = (v[(q > 0.01).all(-1)] for v in (x, t * q.abs().log(), labels))
    y, exact = y.to(dtype), x.double().requires_grad_()
    (truth,) = torch.autograd.grad(expected(exact, y, labels, "forward_kl", t, w).sum(), exact)
    x.requires_grad_()
    found = fusedkl.distillation_loss(
        x, y, labels, temperature=t, ce_weight=w, reduction="sum", backend=backend
    )
    (slope,) = torch.autograd.grad(found, x)
    assert len(x) > 4 and bool((truth.norm(dim=-1) < 0.02).all())
    assert oracle.relative_l2(slope, truth) <= oracle.GRADIENT_TOLERANCE[dtype]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["forward_kl", "jsd 0.1"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_padding_and_softcap(
    temperature: float, kind: str, label_smoothing: float, backend: str
) -> None:
    x, y, labels = inputs(torch.float32)
    softcap = 3.0
    capped = (softcap * torch.tanh(t.double() / softcap) for t in (x, y))
    wanted = expected(*capped, labels, kind, temperature, 0.6, label_smoothing)
    padded = [
        F.pad(t.detach(), (0, more), value=math.nan).requires_grad_()
        for t, more in ((x, 5), (y, 1))
    ]
    name, options = FAMILY.get(kind, (kind, {}))
    found = fusedkl.distillation_loss(
        *padded, labels, kind=name, temperature=temperature, ce_weight=0.6, valid_vocab=V,
        softcap=softcap, label_smoothing=label_smoothing, reduction="none", backend=backend,
        **options,
    )  # fmt: skip
    assert oracle.relative_error(found, wanted.detach()) <= 3e-6
    truth = torch.autograd.grad(wanted.sum(), (x, y))
    for slope, true in zip(torch.autograd.grad(found.sum(), padded), truth, strict=True):
        assert oracle.relative_l2(slope[:, :V], true.double()) <= 1e-5
        assert not slope[:, V:].any()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
def test_reductions_masks_and_weights(reduction: str, temperature: float, backend: str) -> None:
    x, y, labels = inputs(torch.float32)
    mask, weight = torch.rand(N) < 0.7, torch.rand(N)
    mask[:2] = torch.tensor([True, False])
    labels = labels.masked_fill(~mask, 10**9)  # a label that is masked may be anything
    x.data[1] = math.nan
    counted = mask & (labels != -100)
    safe = torch.where(counted[:, None], x, 0)
    each = expected(safe, y, labels.masked_fill(~counted, -100), "forward_kl", temperature, 0.5)
    total = (weight * each).sum()
    norm = {"sum": 1, "batchmean": N, "mean": (weight * counted).sum()}[reduction]
    found = fusedkl.distillation_loss(
        x, y, labels, temperature=temperature, mask=mask, weight=weight, reduction=reduction,
        backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(found.double(), total / norm, rtol=1e-5, atol=0)
    found.backward()
    assert x.grad is not None and not x.grad[~counted].any()
    assert bool(x.grad[counted].any(-1).all())


def test_the_ends_of_ce_weight_and_no_t2(backend: str) -> None:
    x, y, labels = inputs(torch.float32)
    soft = fusedkl.distillation_loss(
        x, y, labels, temperature=2.0, ce_weight=0, scale_t2=False, backend=backend
    )
    kl = fusedkl.forward_kl(x, y, temperature=2.0, labels=labels, reduction="mean", backend=backend)
    torch.testing.assert_close(soft, kl)
    hard = fusedkl.distillation_loss(
        x, y.detach() * math.nan, labels, temperature=2.0, ce_weight=1, backend=backend
    )
    torch.testing.assert_close(hard, F.cross_entropy(x, labels))


def test_a_label_beyond_the_vocabulary_is_nan_where_nobody_looks(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend in ("cpu", "reference"):
        pytest.skip("takes labels on the CPU alone, which are looked at")
    for module, name in ((validation, "token_range"), (contents, "row_stats")):
        monkeypatch.setattr(module, name, lambda *arguments: None)
    x, y, labels = inputs(torch.float32)
    wrong = torch.tensor([True, False, False, True, False, False])
    outside = torch.where(wrong, torch.tensor([V, 0, 0, -1, 0, 0]), labels)
    for temperature, label_smoothing in ((1.0, 0.0), (2.0, 0.2)):
        right, found = (
            fusedkl.distillation_loss(
                x, y, given, temperature=temperature, label_smoothing=label_smoothing,
                reduction="none", backend=backend,
            )
            for given in (labels, outside)
        )  # fmt: skip
        assert torch.equal(found.isnan(), wrong) and torch.equal(found[~wrong], right[~wrong])
        slopes = [torch.autograd.grad(value[~wrong].sum(), x)[0] for value in (found, right)]
        torch.testing.assert_close(*slopes)


def test_several_blocks_and_slices(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    x, y = torch.randn(2, 3, 5, V).requires_grad_().unbind()
    labels = torch.randint(0, V, (3, 4))
    results = []
    for block in (2 * V, 2**21):
        monkeypatch.setattr(layout, "_BLOCK", block)
        loss = fusedkl.distillation_loss(
            x[:, :-1], y[:, 1:], labels, temperature=2.0, reduction="none", backend=backend
        )
        results.append((loss, *torch.autograd.grad(loss.sum(), (x, y))))
    for small, large in zip(*results, strict=True):
        assert torch.equal(small, large)
    wanted = expected(
        x[:, :-1].flatten(0, 1), y[:, 1:].flatten(0, 1), labels.flatten(), "forward_kl", 2.0, 0.5
    )
    torch.testing.assert_close(results[0][0].double(), wanted.view(3, 4), rtol=1e-5, atol=0)
    none = fusedkl.distillation_loss(x[:0], y[:0], labels.new_zeros(0, 5), temperature=2.0)
    assert none == 0


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_it_differentiates_twice(temperature: float, backend: str) -> None:
    x, y = torch.randn(2, 2, 5, dtype=torch.float64).requires_grad_().unbind()
    labels = torch.tensor([1, -100])

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return fusedkl.distillation_loss(x, y, labels, temperature=temperature, backend=backend)

    assert torch.autograd.gradcheck(loss, (x, y))
    assert torch.autograd.gradgradcheck(loss, (x, y))


@pytest.mark.slow
def test_it_compiles_whole(backend: str) -> None:
    x, y, labels = inputs(torch.float32)
    compiled = torch.compile(fusedkl.distillation_loss, fullgraph=True, backend="aot_eager")
    options = {"temperature": 2.0, "backend": backend}
    found, eager = (f(x, y, labels, **options) for f in (compiled, fusedkl.distillation_loss))
    torch.testing.assert_close(found, eager)
    slope, wanted = (torch.autograd.grad(v, x)[0] for v in (found, eager))
    torch.testing.assert_close(slope, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_is_the_only_large_tensor(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.use_deterministic_algorithms(False)  # filling memory is what would be seen
    x, y = torch.randn(2, 64, 20_000).to(dtype)
    x.requires_grad_()
    labels = torch.randint(0, 20_000, (64,))
    monkeypatch.setattr(layout, "_BLOCK", 2 * 20_000)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        fusedkl.distillation_loss(x, y, labels, temperature=2.0).backward()
    assert run.profiler is not None
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    # gradients of a block of two rows; 16-bit logits of it in float32
    blocks = (3 if dtype == torch.float32 else 4) * 2 * 20_000 * 4
    assert highest <= x.nbytes + blocks + 65_536


X, L = torch.zeros(2, 3, 8), torch.zeros(2, 3, dtype=torch.int64)
call = fusedkl.distillation_loss
BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "student": (lambda: call(X.int(), X, L), TypeError, "student_logits .* got int32"),
    "teacher": (lambda: call(X, X[0], L), ValueError, r"teacher_logits .* student.* \[3, 8\]"),
    "width": (lambda: call(X, X[..., 1:], L), ValueError, "student.* teacher.* sizes, 8 and 7"),
    "valid_vocab": (lambda: call(X, X, L, valid_vocab=9), ValueError, "valid_vocab .* 8; got 9"),
    "padding": (lambda: call(X, X, L + 4, valid_vocab=4), ValueError, "labels .* 3, .* got 4"),
    "softcap": (lambda: call(X, X, L, softcap=0), ValueError, "softcap must be positive"),
    "labels": (lambda: call(X, X, L.int()), TypeError, "labels must be .*int64.* got .*int32"),
    "shape": (lambda: call(X, X, L[0]), ValueError, r"labels .* \[2, 3\]; got \[3\]"),
    "range": (lambda: call(X, X, L + 8), ValueError, "labels must be from 0 to 7, .* got 8 to 8"),
    "negative": (lambda: call(X, X, L - 1), ValueError, "labels must be .* got -1"),
    "beta": (lambda: call(X, X, L, beta=0.5), ValueError, "beta=0.5 has no effect on kind"),
    "alpha": (lambda: call(X, X, L, kind="renyi"), ValueError, "kind='renyi' needs alpha"),
    "kind": (lambda: call(X, X, L, kind="l2"), ValueError, "kind must be one of .* 'l2'"),
    "ce_weight": (lambda: call(X, X, L, ce_weight=1.5), ValueError, "ce_weight .* 1; got 1.5"),
    "text": (lambda: call(X, X, L, ce_weight="1"), TypeError, "ce_weight .* got str"),  # type: ignore[arg-type]
    "smooth": (lambda: call(X, X, L, label_smoothing=-1), ValueError, "label_smoothing .* -1"),
    "scale_t2": (lambda: call(X, X, L, scale_t2=1), TypeError, "scale_t2 .* got int"),  # type: ignore[arg-type]
    "temperature": (lambda: call(X, X, L, temperature=0), ValueError, "temperature .* got 0"),
    "mask": (lambda: call(X, X, L, mask=L), TypeError, "mask must be a bool"),
    "reduction": (lambda: call(X, X, L, reduction="a"), ValueError, "reduction .* got 'a'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    function, error, text = BAD[name]
    with pytest.raises(error, match=text):
        function()
