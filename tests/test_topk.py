"""topk_divergence: the definitions in 50 digits, covered masses near 1, edges, and bad input."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import mpmath
import oracle
import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fusedkl

KINDS = ("forward_kl", "reverse_kl")
TAILS = ("bucket", "drop", "renormalize")
N, V, K = 3, 23, 6


def exactly(
    logits: Sequence[float],
    ids: Sequence[int],
    log_q: Sequence[float],
    kind: str,
    tail: str,
    t: float,
) -> tuple[float, list[float]]:
    """One row's value and gradient, by the definition and by differences in 50 digits."""
    kept = [(i, mpmath.mpf(v)) for i, v in zip(ids, log_q, strict=True) if i >= 0]

    def value(x: list[mpmath.mpf]) -> mpmath.mpf:
        weights = [mpmath.exp(v / mpmath.mpf(t)) for v in x]
        total = mpmath.fsum(weights)
        p = [weights[i] / total for i, _ in kept]
        q = [mpmath.exp(v) for _, v in kept]
        if tail == "renormalize":
            p, q = ([v / mpmath.fsum(side) for v in side] for side in (p, q))
        if tail == "bucket":
            given = {i for i, _ in kept}
            rest = mpmath.fsum(w for i, w in enumerate(weights) if i not in given) / total
            p, q = [*p, rest], [*q, 1 - mpmath.fsum(q)]
        first, second = (q, p) if kind == "forward_kl" else (p, q)
        return mpmath.fsum(
            a * mpmath.log(a / b) for a, b in zip(first, second, strict=True) if a > 0
        )

    with mpmath.workdps(50):
        x, step = [mpmath.mpf(v) for v in logits], mpmath.mpf("1e-20")
        slopes = []
        for i in range(len(x)):
            moved = [[*x[:i], x[i] + s, *x[i + 1 :]] for s in (step, -step)]
            slopes.append(float((value(moved[0]) - value(moved[1])) / (2 * step)))
        return float(value(x)), slopes


def case(scale: float, near: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Policy, ids, log-probs of a teacher `near` the policy; the last id of row 1 is padding."""
    x = (scale * torch.randn(N, V)).to(dtype)
    y = x.double() + near * torch.randn(N, V, dtype=torch.float64)
    log_q, ids = y.log_softmax(-1).topk(K, -1)
    order = torch.randperm(K)
    log_q, ids = log_q[:, order], ids[:, order].contiguous()
    ids[1, -1], log_q[1, -1] = -1, math.nan
    return x, ids, log_q


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("scale", "near", "dtype", "temperature"),
    [
        (2.0, 1.0, torch.float32, 1.0),
        (2.0, 0.05, torch.float32, 1.7),
        (5.0, 3.0, torch.bfloat16, 1.0),
        (3.0, 0.5, torch.float16, torch.tensor([0.5, 1.0, 3.0])),
        (2.0, 1e-5, torch.float64, 0.6),
    ],
    ids=["float32", "close", "bfloat16", "rows' temperatures", "float64"],
)
def test_values_and_gradients(
    kind: str,
    tail: str,
    scale: float,
    near: float,
    dtype: torch.dtype,
    temperature: float | Tensor,
    backend: str,
) -> None:
    x, ids, log_q = case(scale, near, dtype)
    log_q = log_q if dtype == torch.float64 else log_q.float()
    x.requires_grad_()
    found = fusedkl.topk_divergence(
        x, ids, log_q, kind, tail=tail, temperature=temperature, backend=backend
    )
    assert isinstance(found, Tensor)
    (slope,) = torch.autograd.grad(found.sum(), x)
    ts = torch.as_tensor(temperature, dtype=torch.float64).expand(N).tolist()
    truth = [
        exactly(*row, kind, tail, t)
        for *row, t in zip(x.tolist(), ids.tolist(), log_q.tolist(), ts, strict=True)
    ]
    value = torch.tensor([v for v, _ in truth], dtype=torch.float64)
    slopes = torch.tensor([g for _, g in truth], dtype=torch.float64)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # the tail's log-probability is a sum of float32 exponentials: 1e-7 of a log-ratio of `near`
    bound = 1e-7 if dtype == torch.float64 else 1e-5
    assert oracle.relative_error(found, value, floor=1e-4 if tail == "drop" else 0) <= bound
    assert oracle.relative_l2(slope, slopes) <= max(oracle.GRADIENT_TOLERANCE[dtype], 10 * bound)


@pytest.mark.parametrize(("near", "bound"), [(1e-4, 1e-3), (1e-6, 1e-1)])
def test_the_digits_of_a_small_divergence(near: float, bound: float, backend: str) -> None:
    # as the docstring has them: 1e-7 of log p, in a log-ratio of `near`
    x, ids, log_q = case(2.0, near, torch.float32)
    for kind in KINDS:
        found = fusedkl.topk_divergence(x, ids, log_q, kind, backend=backend)
        rows = zip(x.tolist(), ids.tolist(), log_q.tolist(), strict=True)
        truth = torch.tensor([exactly(*row, kind, "bucket", 1.0)[0] for row in rows])
        assert isinstance(found, Tensor) and bool((truth < 2 * near * near).all())
        assert oracle.relative_error(found, truth.double()) <= bound


@pytest.mark.parametrize("gap", [10.0, 16.0, 40.0, 300.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_covered_mass_near_1_keeps_its_tail(gap: float, kind: str, backend: str) -> None:
    # everything but e^-gap of the student is covered; the teacher keeps 1e-3 outside
    x = torch.randn(N, V)
    ids = torch.stack([torch.randperm(V)[:K] for _ in range(N)])
    x.scatter_add_(-1, ids, torch.full((N, K), gap))
    log_q = torch.randn(N, K, dtype=torch.float64).log_softmax(-1) + math.log1p(-1e-3)
    x.requires_grad_()
    found = fusedkl.topk_divergence(x, ids, log_q, kind, backend=backend)
    assert isinstance(found, Tensor)
    (slope,) = torch.autograd.grad(found.sum(), x)
    truth = [
        exactly(*row, kind, "bucket", 1.0)
        for row in zip(x.tolist(), ids.tolist(), log_q.tolist(), strict=True)
    ]
    value = torch.tensor([v for v, _ in truth], dtype=torch.float64)
    slopes = torch.tensor([g for _, g in truth], dtype=torch.float64)
    assert oracle.relative_error(found, value) <= 1e-6
    assert oracle.relative_l2(slope, slopes, floor=1e-30) <= 1e-5
    outside = torch.ones(N, V).scatter(-1, ids, 0).bool()
    if kind == "forward_kl":  # the pull on the tail, which 1 - P by subtraction would lose
        assert oracle.relative_error(slope[outside], slopes[outside]) <= 1e-5


def test_rows_of_several_segments(backend: str) -> None:
    width = 150_001
    x = 2 * torch.randn(2, width)
    ids = torch.stack([torch.randperm(width)[:50] for _ in range(2)])
    ids[0, :4] = torch.tensor([0, 75_775, 75_776, width - 1])  # at the cuts
    x[1, ids[1]] += 12
    log_q = torch.randn(2, 50, dtype=torch.float64).log_softmax(-1) - 0.1
    x.requires_grad_()
    p = x.double().softmax(-1)
    q = log_q.exp()
    outcomes = torch.cat([p.gather(-1, ids), p.scatter(-1, ids, 0).sum(-1, keepdim=True)], -1)
    teacher = torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1)
    expected = (teacher * (teacher / outcomes).log()).sum(-1)
    (slope,) = torch.autograd.grad(expected.sum(), x)
    found = fusedkl.topk_divergence(x, ids, log_q, backend=backend)
    assert isinstance(found, Tensor)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert oracle.relative_error(found, expected.detach()) <= 1e-6
    assert oracle.relative_l2(gradient, slope.double()) <= 1e-5


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_all_tokens_given_is_the_divergence(tail: str, backend: str) -> None:
    x, y = torch.randn(2, 4, 9)
    log_q, ids = y.log_softmax(-1).sort(-1)
    for kind in KINDS:
        found = fusedkl.topk_divergence(x, ids, log_q, kind, tail=tail, backend=backend)
        expected = fusedkl.divergence(x, y, kind, backend=backend)
        torch.testing.assert_close(found, expected, rtol=3e-6, atol=0)


def test_the_bucket_is_never_negative_and_a_lower_bound(backend: str) -> None:
    x = 3 * torch.randn(200, V)
    y = x + torch.logspace(-4, 1, 200)[:, None] * torch.randn(200, V)
    log_q, ids = y.double().log_softmax(-1).topk(K, -1)
    for kind in KINDS:
        found = fusedkl.topk_divergence(x, ids, log_q, kind, backend=backend)
        full = fusedkl.divergence(x, y, kind, backend=backend)
        assert isinstance(found, Tensor) and bool((found >= 0).all())
        assert bool((found <= full * (1 + 1e-5) + 1e-6 * full.sqrt()).all())


def test_covered_masses(backend: str) -> None:
    x, ids, log_q = case(2.0, 1.0, torch.float32)
    expected = x.double().softmax(-1)
    covered = torch.where(ids >= 0, expected.gather(-1, ids.clamp(min=0)), 0).sum(-1)
    for tail in TAILS:
        alone = fusedkl.topk_divergence(x, ids, log_q, tail=tail, backend=backend)
        found = fusedkl.topk_divergence(
            x.requires_grad_(), ids, log_q, tail=tail, return_mass=True, backend=backend
        )
        assert isinstance(found, fusedkl.TopkDivergence) and isinstance(alone, Tensor)
        torch.testing.assert_close(found.value.detach(), alone.detach())
        torch.testing.assert_close(found.policy_mass.double(), covered, rtol=1e-6, atol=0)
        teacher = torch.where(ids >= 0, log_q, -math.inf).exp().sum(-1)
        torch.testing.assert_close(found.reference_mass.double(), teacher.double())
        assert not found.policy_mass.requires_grad


@pytest.mark.parametrize("tail", TAILS)
def test_masked_rows_may_hold_anything(tail: str, backend: str) -> None:
    x, ids, log_q = case(2.0, 1.0, torch.float32)
    mask = torch.tensor([True, False, True])
    x[1], ids[1], log_q[1] = math.nan, 10**12, 7.0
    t = torch.tensor([1.5, 0.0, 1.5])
    x.requires_grad_()
    found = fusedkl.topk_divergence(
        x, ids, log_q, tail=tail, mask=mask, temperature=t, backend=backend
    )
    assert isinstance(found, Tensor)
    alone = fusedkl.topk_divergence(
        x[mask], ids[mask], log_q[mask], tail=tail, temperature=1.5, backend=backend
    )
    assert found[1] == 0 and torch.equal(found[mask], alone)
    found.sum().backward()
    assert x.grad is not None and not x.grad[1].any() and bool(x.grad[::2].any(-1).all())
    mean = fusedkl.topk_divergence(
        x, ids, log_q, tail=tail, mask=mask, temperature=t, reduction="mean", backend=backend
    )
    torch.testing.assert_close(mean, alone.mean())
    none = fusedkl.topk_divergence(
        x, ids, log_q, tail=tail, mask=mask & False, reduction="mean", backend=backend
    )
    assert isinstance(none, Tensor) and none == 0 and none.requires_grad


@pytest.mark.parametrize("tail", TAILS)
def test_bad_rows_keep_to_themselves(tail: str, backend: str) -> None:
    x, ids, log_q = (t[:1].repeat(5, 1) for t in case(2.0, 1.0, torch.float32))
    x[1, ids[1, 0]], x[2], x[3, ids[3, 1]] = math.nan, -math.inf, math.inf
    log_q[4, 1] = math.nan
    x.requires_grad_()
    found = fusedkl.topk_divergence(x, ids, log_q, tail=tail, backend=backend)
    assert isinstance(found, Tensor) and found[0].isfinite() and bool(found[1:].isnan().all())
    found.sum().backward()
    assert x.grad is not None and bool(x.grad[0].isfinite().all())
    if tail != "renormalize":  # which touches the K tokens only
        assert bool(x.grad[1:].isnan().all())


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kind", KINDS)
def test_supports_decide_what_is_infinite(kind: str, tail: str, backend: str) -> None:
    x, ids, log_q = (t[:1].repeat(3, 1) for t in case(2.0, 1.0, torch.float32))
    x[0, ids[0, 0]] = -math.inf  # the policy lacks a token
    log_q[1, 0] = -math.inf  # the teacher does
    x.requires_grad_()
    found = fusedkl.topk_divergence(x, ids, log_q, kind, tail=tail, backend=backend)
    assert isinstance(found, Tensor)
    infinite = [True, False, False] if kind == "forward_kl" else [False, True, False]
    assert (found == math.inf).tolist() == infinite and bool(found[~found.isinf()].isfinite().all())
    found.sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all()) and bool(x.grad.any(-1).all())


def test_a_policy_with_nothing_outside(backend: str) -> None:
    x, ids, log_q = case(2.0, 1.0, torch.float32)
    ids[1, -1], log_q[1, -1] = next(i for i in range(V) if i not in ids[1]), -9.0
    outside = torch.ones(N, V).scatter(-1, ids, 0).bool()
    x = x.masked_fill(outside, -math.inf).requires_grad_()
    short = log_q - 0.5  # the teacher keeps mass outside: infinitely far
    whole = log_q.log_softmax(-1)  # it does not
    for kind, expected in (("forward_kl", math.inf), ("reverse_kl", None)):
        found = fusedkl.topk_divergence(x, ids, short, kind, backend=backend)
        assert isinstance(found, Tensor)
        assert bool((found == expected).all() if expected else found.isfinite().all())
        (slope,) = torch.autograd.grad(found.sum(), x)
        assert bool(slope.isfinite().all()) and not slope[outside].any()
        if expected:  # as of any infinite divergence: p - q
            apart = x.detach().softmax(-1).gather(-1, ids) - short.exp()
            torch.testing.assert_close(slope.gather(-1, ids), apart.float(), rtol=1e-4, atol=1e-6)
        found = fusedkl.topk_divergence(x, ids, whole, kind, backend=backend)
        renormalized = fusedkl.topk_divergence(
            x, ids, whole, kind, tail="renormalize", backend=backend
        )
        torch.testing.assert_close(found, renormalized, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_rounded_log_probabilities_do_not_make_infinity(dtype: torch.dtype, backend: str) -> None:
    x = 5 * torch.randn(50, V)
    log_q, ids = x.log_softmax(-1).topk(20, -1)
    for kind in KINDS:  # their sum is 1 by rounding, or more
        found = fusedkl.topk_divergence(x, ids, log_q.to(dtype), kind, backend=backend)
        assert isinstance(found, Tensor)
        assert bool((found >= 0).all()) and found.max() < 0.1


def test_shapes_and_strides(backend: str) -> None:
    x = torch.randn(2, 5, V)
    log_q, ids = torch.randn(2, 4, V).log_softmax(-1).topk(K, -1)
    found = fusedkl.topk_divergence(x[:, 1:], ids, log_q, backend=backend)
    rows = fusedkl.topk_divergence(
        x[:, 1:].reshape(8, V), ids.view(8, K), log_q.view(8, K), backend=backend
    )
    assert isinstance(found, Tensor) and isinstance(rows, Tensor) and found.shape == (2, 4)
    assert torch.equal(found.flatten(), rows)
    one = fusedkl.topk_divergence(x[0, 1], ids[0, 0], log_q[0, 0], backend=backend)
    assert isinstance(one, Tensor) and one.shape == () and torch.equal(one, found[0, 0])
    for tail in TAILS:
        none = fusedkl.topk_divergence(
            x[:0, 1:], ids[:0], log_q[:0], tail=tail, reduction="mean", backend=backend
        )
        assert none == 0
    cut = fusedkl.topk_divergence(x[:, 1:, :V], ids, log_q, tail="drop", backend=backend)
    assert isinstance(cut, Tensor) and cut.shape == (2, 4)


@pytest.mark.parametrize("tail", TAILS)
def test_a_slice_of_a_batch_is_read_in_place(tail: str, backend: str) -> None:
    torch.use_deterministic_algorithms(False)  # filling memory is what would be seen
    x = torch.randn(3, 5, 20_000, dtype=torch.bfloat16)[:, :-1].requires_grad_()
    log_q, ids = torch.randn(3, 4, 20_000).log_softmax(-1).topk(K, -1)
    rows = x.detach().reshape(12, -1).requires_grad_(), ids.view(12, K), log_q.view(12, K)
    wanted = fusedkl.topk_divergence(*rows, tail=tail, reduction="mean", backend=backend)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        found = fusedkl.topk_divergence(x, ids, log_q, tail=tail, reduction="mean", backend=backend)
        (slope,) = torch.autograd.grad(found, x)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(slope.view(12, -1), torch.autograd.grad(wanted, rows[0])[0])
    if backend == "cpu" or tail == "renormalize":  # the one gradient, and nothing else of its size
        sizes = [e.nbytes() for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
        assert sum(size for size in sizes if size > 100_000) == slope.nbytes


def test_an_id_of_no_token_where_nobody_looks_is_nan(backend: str) -> None:
    x, ids, log_q = case(2.0, 1.0, torch.float32)
    ids[2, 0] = V + 7
    whole = torch.compile(fusedkl.topk_divergence, fullgraph=True, backend="eager")
    found = whole(x, ids, log_q, tail="renormalize", backend=backend)
    assert bool(found[:2].isfinite().all()) and found[2].isnan()


@pytest.mark.slow
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kind", KINDS)
def test_it_differentiates_twice(kind: str, tail: str, backend: str) -> None:
    x = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    log_q, ids = torch.randn(2, 7, dtype=torch.float64).log_softmax(-1).topk(3, -1)
    log_q.requires_grad_()

    def value(x: Tensor, log_q: Tensor) -> Any:
        return fusedkl.topk_divergence(x, ids, log_q, kind, tail=tail, backend=backend)

    assert torch.autograd.gradcheck(value, (x, log_q))
    assert torch.autograd.gradgradcheck(value, (x, log_q))


def test_threads_and_batches_do_not_show(backend: str) -> None:
    x = torch.randn(9, 70_000)
    log_q, ids = (x + torch.randn_like(x)).log_softmax(-1).topk(K, -1)
    one = fusedkl.topk_divergence(x, ids, log_q, backend=backend)
    torch.set_num_threads(3)
    assert isinstance(one, Tensor)
    assert torch.equal(fusedkl.topk_divergence(x, ids, log_q, backend=backend), one)
    alone = fusedkl.topk_divergence(x[4:5], ids[4:5], log_q[4:5], backend=backend)
    assert torch.equal(alone, one[4:5])


@pytest.mark.slow
def test_operators_pass_opcheck_and_compile(backend: str) -> None:
    x, ids, log_q = case(2.0, 1.0, torch.float32)
    log_q, ids = log_q.nan_to_num(-3.0).float(), ids.contiguous()
    inverse = torch.full((1,), 0.5, dtype=torch.float64)
    mask = torch.tensor([True, False, True])
    torch.library.opcheck(
        torch.ops.fusedkl.topk_logprobs.default,
        (x, ids, inverse, mask, backend),
        test_utils=("test_schema", "test_faketensor"),
    )
    log_p, state = torch.ops.fusedkl.topk_logprobs(x, ids, inverse, mask, backend)
    torch.library.opcheck(
        torch.ops.fusedkl.topk_logprobs_backward.default,
        (torch.rand_like(log_p), x, ids, state, inverse, backend),
        test_utils=("test_schema", "test_faketensor"),
    )
    compiled = torch.compile(fusedkl.topk_divergence, fullgraph=True, backend="aot_eager")
    x.requires_grad_()
    for kind in KINDS:
        found = compiled(x, ids, log_q, kind, reduction="mean", backend=backend)
        (slope,) = torch.autograd.grad(found, x)
        eager = fusedkl.topk_divergence(x, ids, log_q, kind, reduction="mean", backend=backend)
        assert isinstance(eager, Tensor)
        torch.testing.assert_close(found, eager)
        torch.testing.assert_close(slope, torch.autograd.grad(eager, x)[0])


X, Q = torch.zeros(2, 3, 8), torch.full((2, 3, 2), -1.0)
I = torch.arange(2).expand(2, 3, 2).contiguous()  # noqa: E741
call = fusedkl.topk_divergence
BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "policy": (lambda: call(X.int(), I, Q), TypeError, "policy_logits .* got int32"),
    "ids": (lambda: call(X, I.int(), Q), TypeError, "topk_ids must be an int64 .*int32"),
    "ids' shape": (lambda: call(X, I[0], Q), ValueError, r"topk_ids .* 'K'\]; got \[3, 2\]"),
    "logprobs": (lambda: call(X, I, Q.int()), TypeError, "topk_logprobs .* got int32"),
    "shape": (lambda: call(X, I, Q[..., :1]), ValueError, r"topk_logprobs .* got \[2, 3, 1\]"),
    "device": (lambda: call(X, I, Q.to("meta")), ValueError, "topk_logprobs .* got meta"),
    "k > V": (lambda: call(X[..., :1], I, Q), ValueError, "topk_ids .* 1 to V = 1 .* got 2"),
    "k = 0": (lambda: call(X, I[..., :0], Q[..., :0]), ValueError, "topk_ids .* got 0"),
    "id": (lambda: call(X, I + 7, Q), ValueError, "topk_ids .* 0 to 7, or -1; got 7 to 8"),
    "id < -1": (lambda: call(X, I - 2, Q), ValueError, "topk_ids .* got -2"),
    "twice": (lambda: call(X, I * 0, Q), ValueError, "topk_ids must be different"),
    "above 0": (lambda: call(X, I, -Q), ValueError, r"topk_logprobs must be at most 0; got 1\.0"),
    "kind": (lambda: call(X, I, Q, "jsd"), ValueError, "kind must be one of .* 'jsd'"),
    "tail": (lambda: call(X, I, Q, tail="pad"), ValueError, "tail .* renormalize; got 'pad'"),
    "temperature": (lambda: call(X, I, Q, temperature=0), ValueError, "temperature .* got 0"),
    "mask": (lambda: call(X, I, Q, mask=X[..., 0]), TypeError, "mask must be a bool"),
    "mask's shape": (lambda: call(X, I, Q, mask=X[0] > 0), ValueError, r"mask .* got \[3, 8\]"),
    "reduction": (lambda: call(X, I, Q, reduction="avg"), ValueError, "reduction .* got 'avg'"),
    "return_mass": (lambda: call(X, I, Q, return_mass=1), TypeError, "return_mass .* got int"),
    "backend": (lambda: call(X, I, Q, backend="gpu"), ValueError, "backend must be one of"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    function, error, text = BAD[name]
    with pytest.raises(error, match=text):
        function()
