"""token_stats: every field, alone and together, against 60-digit arithmetic."""

from __future__ import annotations

import cases
import oracle
import pytest
import torch
from torch import Tensor

import fusedkl
from fusedkl import TokenStats, contents

SCENARIOS = ["flat 1e-6", "flat 1e-3", "flat 8", "peaked 1e-2", "peaked 2", "offset 1e-2"]
IDS = torch.tensor([[5, 5, 0], [1, 2, 3], [66, 5, 66]])


def inputs(scenario: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    policy, reference = cases.make(scenario, dtype)
    return policy.clone().requires_grad_(), reference.clone().requires_grad_()


def expected(
    scenario: str, dtype: torch.dtype, temperature: str
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Values and, for an upstream gradient of 1 everywhere, gradients to both."""
    policy, reference = cases.make(scenario, dtype)
    both = cases.truth(scenario, dtype, temperature)
    other = oracle.fields(reference, None, cases.TEMPERATURES[temperature])
    zero = torch.zeros(cases.N, cases.V, dtype=torch.float64)
    t = torch.as_tensor(cases.TEMPERATURES[temperature], dtype=torch.float64)
    chosen = torch.zeros_like(zero).scatter_add(1, IDS, torch.ones(3, 3, dtype=torch.float64))
    chosen = chosen / t.expand(3)[:, None]
    dp, dq = (chosen - 3 * side["d_logsumexp"] for side in (both, other))
    log_p, log_q = both["log_prob"].gather(1, IDS), other["log_prob"].gather(1, IDS)
    ratio = oracle.log_ratio(policy, reference, cases.TEMPERATURES[temperature]).gather(1, IDS)
    return {
        "logprob": (log_p, dp, zero),
        "ref_logprob": (log_q, zero, dq),
        "log_ratio": (ratio, dp, -dq),
        "entropy": (both["entropy"], both["d_entropy"], zero),
        "ref_entropy": (other["entropy"], zero, other["d_entropy"]),
        "logsumexp": (both["logsumexp"], both["d_logsumexp"], zero),
        "ref_logsumexp": (other["logsumexp"], zero, other["d_logsumexp"]),
        "forward_kl": (both["forward_kl"], both["d_forward_kl"], both["d_forward_kl_reference"]),
        "reverse_kl": (both["reverse_kl"], both["d_reverse_kl"], both["d_reverse_kl_reference"]),
    }


def check_value(name: str, found: Tensor, true: Tensor) -> None:
    # Log-probabilities: absolute below 1, the scale of a policy ratio.
    floor = 1.0 if "logprob" in name else 1e-12
    limit = 1e-6 if "logprob" in name else oracle.VALUE_TOLERANCE[found.dtype]
    if name == "log_ratio":
        floor, limit = 1e-7, 1e-5
    error = oracle.relative_error(found, true, floor)
    assert error <= limit, f"{name}: {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("temperature", ["T=1", pytest.param("T per row", marks=pytest.mark.slow)])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_values_and_gradients(
    backend: str, scenario: str, dtype: torch.dtype, temperature: str
) -> None:
    policy, reference = inputs(scenario, dtype)
    options = {"temperature": cases.TEMPERATURES[temperature], "backend": backend}
    stats = fusedkl.token_stats(policy, reference, IDS, **options)
    true = expected(scenario, dtype, temperature)
    assert set(true) == set(TokenStats._fields)
    for name, (value, gx, gy) in true.items():
        found = getattr(stats, name)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        check_value(name, found, value)
        if value.shape == (cases.N,) and bool((value < 1e-12).any()):
            continue
        pair = torch.autograd.grad(found.sum(), (policy, reference), retain_graph=True)
        for part, gradient, side in zip(pair, (gx, gy), ("policy", "reference"), strict=True):
            error = oracle.relative_l2(part, gradient, floor=1e-10)
            assert error <= oracle.GRADIENT_TOLERANCE[dtype], f"d {name} / {side}: {error:.1e}"


def test_fields_alone_are_fields_together(backend: str) -> None:
    policy, reference = torch.randn(2, 4, 6, 1031)
    ids = torch.randint(0, 1031, (4, 6))
    everything = fusedkl.token_stats(policy, reference, ids, backend=backend)
    for name in TokenStats._fields:
        alone = fusedkl.token_stats(policy, reference, ids, fields=[name], backend=backend)
        assert [n for n in TokenStats._fields if getattr(alone, n) is not None] == [name]
        torch.testing.assert_close(
            getattr(alone, name), getattr(everything, name), rtol=2e-6, atol=2e-6
        )
        assert getattr(alone, name).shape == (4, 6)


def test_one_backward_for_any_combination(backend: str) -> None:
    """The gradient of a weighted sum of fields is the weighted sum of their gradients."""
    policy, reference = (torch.randn(5, 800, dtype=torch.float64).requires_grad_() for _ in "xy")
    ids = torch.randint(0, 800, (5, 2))
    stats = fusedkl.token_stats(policy, reference, ids, backend=backend)
    weights = torch.randn(len(stats), dtype=torch.float64).tolist()
    total = sum(w * value.sum() for w, value in zip(weights, stats, strict=True))
    together = torch.autograd.grad(total, (policy, reference), retain_graph=True)
    apart = [torch.zeros_like(policy), torch.zeros_like(reference)]
    for w, value in zip(weights, stats, strict=True):
        for i, part in enumerate(
            torch.autograd.grad(value.sum(), (policy, reference), retain_graph=True)
        ):
            apart[i] += w * part
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


def test_one_backward_for_any_combination_in_float32(backend: str) -> None:
    """Against the same combination in float64, where no two of its terms cancel."""
    policy, reference = (torch.randn(3, 800).requires_grad_() for _ in "xy")
    ids = torch.randint(0, 800, (3, 2))
    exact = tuple(t.detach().double().requires_grad_() for t in (policy, reference))

    def slopes(x: Tensor, y: Tensor, name: str) -> tuple[Tensor, ...]:
        stats = fusedkl.token_stats(x, y, ids, backend=name)
        return torch.autograd.grad(sum((i + 1) * v.sum() for i, v in enumerate(stats)), (x, y))

    found = slopes(policy, reference, backend)
    for slope, true in zip(found, slopes(*exact, "reference"), strict=True):
        assert oracle.relative_l2(slope, true) <= oracle.GRADIENT_TOLERANCE[torch.float32]


def test_the_policy_half(backend: str) -> None:
    policy = torch.randn(3, 300)
    ids = torch.randint(0, 300, (3,))
    stats = fusedkl.token_stats(policy, None, ids, backend=backend)
    given = {name for name in TokenStats._fields if getattr(stats, name) is not None}
    assert given == {"logprob", "entropy", "logsumexp"}
    assert torch.equal(stats.entropy, fusedkl.entropy(policy, backend=backend))
    without = fusedkl.token_stats(policy, backend=backend)
    assert without.logprob is None and torch.equal(without.entropy, stats.entropy)
    with pytest.raises(ValueError, match="log_ratio"):
        _ = stats.k3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_estimators_keep_their_digits_near_zero(backend: str, dtype: torch.dtype) -> None:
    policy, reference = inputs("flat 1e-6", dtype)
    stats = fusedkl.token_stats(policy, reference, IDS, fields=["log_ratio"], backend=backend)
    true = oracle.log_ratio(*cases.make("flat 1e-6", dtype), 1.0).gather(1, IDS)
    assert float(true.abs().max()) < 1e-5
    assert oracle.relative_error(stats.k1, true, 1e-8) < 1e-4
    assert oracle.relative_error(stats.k2, true.square() / 2, 1e-15) < 1e-4
    assert oracle.relative_error(stats.k3, torch.expm1(-true) + true, 1e-3) < 1e-4
    assert oracle.relative_error(stats.k3, true.square() / 2 - true**3 / 6, 1e-15) < 1e-4
    assert bool((stats.k3 >= 0).all())
    (slope,) = torch.autograd.grad(stats.k3.sum(), policy)
    (unit,) = torch.autograd.grad(
        fusedkl.token_stats(policy, reference, IDS, fields=["logprob"], backend=backend)
        .logprob.mul(-torch.expm1(-true).to(dtype))
        .sum(),
        policy,
    )
    assert oracle.relative_l2(slope, unit) < 1e-3


def test_masked_rows_are_not_read(backend: str) -> None:
    policy, reference = torch.randn(2, 4, 900)
    ids = torch.randint(0, 900, (4,))
    mask = torch.tensor([True, False, True, False])
    clean = fusedkl.token_stats(policy, reference, ids, mask=mask, backend=backend)
    policy[1], reference[3], ids[1], ids[3] = torch.nan, -torch.inf, -100, 900
    policy.requires_grad_(), reference.requires_grad_()
    stats = fusedkl.token_stats(policy, reference, ids, mask=mask, backend=backend)
    for found, before in zip(stats, clean, strict=True):
        assert torch.equal(found, before) and not found[~mask].any()
    sum(value.sum() for value in stats).backward()
    for leaf in (policy, reference):
        assert bool(leaf.grad.isfinite().all()) and not leaf.grad[~mask].any()


def test_an_id_beyond_the_vocabulary_is_nan_where_nobody_looks(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU's ids hold is not looked at: their own numbers are NaN, and no others."""
    if backend in ("cpu", "reference"):
        pytest.skip("takes ids on the CPU alone, which are looked at")
    monkeypatch.setattr(contents, "row_stats", lambda *arguments: None)
    policy, reference = (torch.randn(3, 300).requires_grad_() for _ in "xy")
    ids = torch.tensor([[5, 299], [300, 7], [-1, 10**12]])
    wrong = (ids < 0) | (ids > 299)
    stats = fusedkl.token_stats(policy, reference, ids, backend=backend)
    right = fusedkl.token_stats(
        policy, reference, ids.masked_fill(wrong, 0), valid_vocab=300, backend=backend
    )
    for name, found, true in zip(TokenStats._fields, stats, right, strict=True):
        if found.shape == ids.shape:
            assert torch.equal(found.isnan(), wrong), name
            assert torch.equal(found[~wrong], true[~wrong]), name
        else:
            assert torch.equal(found, true), name
    total = torch.where(wrong, 0, stats.logprob).sum() + stats.forward_kl.sum()
    expected = torch.where(wrong, 0, right.logprob).sum() + right.forward_kl.sum()
    for slope, true in zip(
        torch.autograd.grad(total, (policy, reference)),
        torch.autograd.grad(expected, (policy, reference)),
        strict=True,
    ):
        torch.testing.assert_close(slope, true)


def leaves_the_other_alone(backend: str, width: int) -> None:
    policy, reference = torch.randn(2, 2, width)
    reference[1, 7] = torch.nan
    policy.requires_grad_(), reference.requires_grad_()
    ids = torch.randint(0, width, (2,))
    stats = fusedkl.token_stats(policy, reference, ids, backend=backend)
    own = fusedkl.token_stats(policy, None, ids, backend=backend)
    for name in TokenStats._fields:
        mine = name in ("logprob", "entropy", "logsumexp")
        assert bool(getattr(stats, name)[1].isnan()) != mine, name
        if mine:
            torch.testing.assert_close(getattr(stats, name), getattr(own, name))
    (gradient,) = torch.autograd.grad((stats.entropy + stats.logprob).sum(), policy)
    assert bool(gradient.isfinite().all())
    (gradient,) = torch.autograd.grad(own.logsumexp.sum(), policy)
    assert bool(gradient.isfinite().all())


def test_a_bad_side_leaves_the_other_alone(backend: str) -> None:
    leaves_the_other_alone(backend, 300)


def test_a_bad_side_of_several_segments_leaves_the_other_alone(backend: str) -> None:
    leaves_the_other_alone(backend, 70_000)


@pytest.mark.parametrize("side", [0, 1], ids=["policy", "reference"])
def test_a_bad_side_has_bad_gradients_alone(backend: str, side: int) -> None:
    """NaN of what is of it, the clean row's numbers of what is of the other, and 0 of neither."""
    clean = torch.randn(2, 4, 300).unbind()
    rows = [t.clone() for t in clean]
    rows[side][1, 7], rows[side][2, 7], rows[side][3] = torch.nan, torch.inf, -torch.inf
    for leaf in (*clean, *rows):
        leaf.requires_grad_()
    ids = torch.randint(0, 300, (4,))
    found = fusedkl.token_stats(*rows, ids, backend=backend)
    true = fusedkl.token_stats(*clean, ids, backend=backend)
    policy, reference = {"logprob", "entropy", "logsumexp"}, {"ref_entropy", "ref_logsumexp"}
    own = (policy, reference | {"ref_logprob"})
    for name in TokenStats._fields:
        of = [i for i in (0, 1) if name not in own[1 - i]]
        numbers = [getattr(stats, name) for stats in (found, true)]
        slopes = [
            torch.autograd.grad(value.sum(), leaves, retain_graph=True)
            for value, leaves in zip(numbers, (rows, clean), strict=True)
        ]
        pairs = [(numbers, side in of)]
        pairs += [((slopes[0][i], slopes[1][i]), side in of and i in of) for i in (0, 1)]
        for (a, b), bad in pairs:
            if bad:
                assert bool(a[1:].isnan().all()), name
                a, b = a[0], b[0]
            torch.testing.assert_close(a, b)
            assert bool(a.any()) == bool(b.any()), name


def test_a_token_of_another_slice(backend: str) -> None:
    """The operator's id -1: value 0, no logit of its own, and what p and q owe to it."""
    x, y = torch.randn(2, 2, 50, dtype=torch.float64)
    ids = torch.tensor([[3, -1], [-1, -1]])
    fields = ["logprob", "ref_logprob", "log_ratio"]
    op = torch.ops.fusedkl
    values, state = op.row_stats(x, y, ids, fields, *(None,) * 5, backend)
    chosen = values.view(3, 2, 2)  # field, token, row
    assert bool((chosen[:, 0, 0] != 0).all())
    assert not chosen[:, 1].any() and not chosen[:, 0, 1].any()
    grad = torch.zeros(6, 2, dtype=torch.float64)
    grad[1] = 1.0  # of the second token's logprob
    gx, gy = op.row_stats_backward(
        grad, x, y, ids, state, fields, *(None,) * 4, True, True, backend
    )
    torch.testing.assert_close(gx, -torch.softmax(x, -1))
    assert not gy.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fields": ["nonsense"]}, "fields must be of"),
        ({"fields": []}, "at least one"),
        ({"fields": ["entropy", "entropy"]}, "each once"),
        ({"fields": ["ref_entropy"]}, "needs reference_logits"),
        ({"fields": ["logprob"]}, "needs token_ids"),
        ({"valid_vocab": 8}, r"valid_vocab must be from 1 to 7"),
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"logit_scale": -1.0}, "logit_scale must be positive"),
    ],
)
def test_bad_arguments(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fusedkl.token_stats(torch.randn(3, 7), **options)


def test_bad_types() -> None:
    policy = torch.randn(3, 7)
    with pytest.raises(TypeError, match="fields"):
        fusedkl.token_stats(policy, fields="entropy")
    with pytest.raises(TypeError, match="token_ids must be an int64"):
        fusedkl.token_stats(policy, None, torch.zeros(3))
    with pytest.raises(ValueError, match="from 0 to 6; got -1 to 2"):
        fusedkl.token_stats(policy, None, torch.tensor([-1, 2, 0]))
