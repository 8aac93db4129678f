"""Faults that an adversarial reading once found, each as the input that showed it."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from torch import Tensor

import fusedkl

LOWEST = torch.finfo(torch.float32).min


def gradients(kind: str, policy: Tensor, reference: Tensor, **options: object) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in (policy, reference)]
    fusedkl.divergence(*leaves, kind, **options).sum().backward()
    return [t.grad for t in leaves if t.grad is not None]


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jeffreys"])
def test_mixed_dtypes_beyond_one_chunk(backend: str, kind: str) -> None:
    torch.manual_seed(0)
    policy, reference = (torch.randn(2, 6000) * 4).bfloat16(), torch.randn(2, 6000) * 4
    found = gradients(kind, policy, reference, backend=backend)
    true = gradients(kind, policy.double(), reference.double(), backend="reference")
    assert oracle.relative_l2(found[0], true[0]) < 4e-3
    assert oracle.relative_l2(found[1], true[1]) < 1e-5


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_a_long_row_without_mass(backend: str, kind: str) -> None:
    nothing, something = torch.full((1, 70000), -math.inf), torch.randn(1, 70000)
    for pair in ((nothing, something), (something, nothing), (nothing, nothing)):
        assert fusedkl.divergence(*pair, kind, backend=backend).isnan().all()
    assert fusedkl.entropy(nothing, backend=backend).isnan().all()


@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize("masked", ["policy", "reference", "both"])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_masks_at_the_lowest_float(
    backend: str, kind: str, masked: str, temperature: float
) -> None:
    torch.manual_seed(0)
    policy, reference = torch.randn(2, 2, 20)
    for name, t in (("policy", policy), ("reference", reference)):
        if masked in (name, "both"):
            t[:, ::3] = LOWEST
    leaves = [t.clone().requires_grad_() for t in (policy, reference)]
    value = fusedkl.divergence(*leaves, kind, temperature=temperature, backend=backend)
    (3 * value).sum().backward()
    true = fusedkl.divergence(
        policy.double(), reference.double(), kind, temperature=temperature, backend="reference"
    )
    # Some are beyond float32's largest number, and then infinite in it.
    torch.testing.assert_close(value.detach(), true.float(), rtol=1e-5, atol=0)
    assert not any(bool(t.grad.isnan().any()) for t in leaves if t.grad is not None)


def test_entropy_gradient_at_the_lowest_float(backend: str) -> None:
    logits = torch.randn(1, 20)
    logits[:, ::3] = LOWEST
    logits.requires_grad_()
    fusedkl.entropy(logits, temperature=0.5, backend=backend).sum().backward()
    assert logits.grad is not None and bool(logits.grad.isfinite().all())


@pytest.mark.parametrize("bad", [-1.0, 0.0, math.inf, math.nan])
def test_temperatures_of_a_scalar_loss_are_checked(backend: str, bad: float) -> None:
    policy = torch.randn(2, 9, requires_grad=True)
    with pytest.raises(ValueError, match="temperature"):
        fusedkl.forward_kl(
            policy,
            torch.randn(2, 9),
            temperature=torch.tensor([1.0, bad]),
            reduction="mean",
            backend=backend,
        )


def test_equal_rows_at_the_lowest_float(backend: str) -> None:
    logits = torch.full((1, 20), LOWEST)
    assert fusedkl.forward_kl(logits, logits.clone(), backend=backend) == 0


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_masked_row_of_no_temperature(backend: str, reduction: str) -> None:
    policy = torch.randn(2, 9, requires_grad=True)
    options = {"temperature": torch.tensor([1.0, 0.0]), "mask": torch.tensor([True, False])}
    value = fusedkl.forward_kl(
        policy, torch.randn(2, 9), reduction=reduction, backend=backend, **options
    )
    value.sum().backward()
    assert policy.grad is not None
    assert bool((policy.grad[1] == 0).all()) and bool(policy.grad[0].isfinite().all())


@pytest.mark.parametrize("upstream", [math.inf, math.nan])
def test_a_masked_row_under_an_infinite_gradient(backend: str, upstream: float) -> None:
    policy = torch.randn(2, 9, requires_grad=True)
    value = fusedkl.forward_kl(
        policy,
        torch.randn(2, 9),
        mask=torch.tensor([True, False]),
        reduction="mean",
        backend=backend,
    )
    (gradient,) = torch.autograd.grad(value, policy, torch.tensor(upstream))
    assert bool((gradient[1] == 0).all())


@pytest.mark.parametrize("temperature", [1e-10, 1e-6, 1e-4, 1e4, 1e10])
def test_extreme_temperatures(backend: str, temperature: float) -> None:
    torch.manual_seed(0)
    policy, reference = torch.randn(2, 3, 40)
    for kind in ("forward_kl", "reverse_kl"):
        found = fusedkl.divergence(
            policy, reference, kind, temperature=temperature, backend=backend
        )
        true = fusedkl.divergence(
            policy.double(), reference.double(), kind, temperature=temperature, backend="reference"
        )
        assert oracle.relative_error(found, true) < 1e-5
        for gradient in gradients(
            kind, policy, reference, temperature=temperature, backend=backend
        ):
            assert bool(gradient.isfinite().all())


def test_a_far_policy_logit_on_the_top_token(backend: str) -> None:
    torch.manual_seed(0)
    policy, reference = torch.randn(2, 1, 20)
    reference[:, 0] = 5.0
    policy[:, ::3] = -1e20
    kept = torch.ones(20, dtype=torch.bool)
    kept[::3] = False
    p = torch.softmax(policy[:, kept].double(), -1)
    log_q = torch.log_softmax(reference.double(), -1)[:, kept]
    true = (p * (p.log() - log_q)).sum(-1)
    found = fusedkl.reverse_kl(policy, reference, backend=backend)
    assert oracle.relative_error(found, true) < 1e-5


@pytest.mark.parametrize("top", [-math.inf, torch.finfo(torch.bfloat16).min])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_a_token_of_no_weight_that_the_policy_lacks(backend: str, kind: str, top: float) -> None:
    """It makes forward_kl infinite or huge, and does not hide how little the others differ."""
    policy = torch.full((1, 4096), 70.0).bfloat16()
    policy[0, 0] = top
    reference = (1.2e-5 * torch.arange(4096) / 4096).bfloat16()[None].contiguous()
    reference[0, 0] = -60
    found = gradients(kind, policy, reference, backend=backend)[0]
    if kind == "jsd":
        value = fusedkl.jsd(policy, reference, backend=backend)
        true = fusedkl.jsd(policy.double(), reference.double(), backend="reference")
        assert oracle.relative_error(value, true) < 1e-5
    expected = gradients(kind, policy.double(), reference.double(), backend="reference")[0]
    assert oracle.relative_l2(found, expected) < 4e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("height", [12.0, 16.0, 23.0, 30.0, 36.0, 90.0])
def test_log_probabilities_beside_a_divergence(
    backend: str, dtype: torch.dtype, height: float
) -> None:
    """Of the top token, far above the tokens that a sample of the row has."""
    # 12 above equal tokens: what docs/numerics.md says of a tail that is all alike
    limit = 4e-6 if height == 12.0 else 1e-6
    policy = torch.zeros(2, 32768, dtype=dtype)
    policy[:, 20000] = height
    policy[1, 30000] = 0.5
    reference = policy.flip(0).contiguous()
    ids = torch.tensor([20000, 20000])
    fields = ["logprob", "ref_logprob", "forward_kl"]
    found = fusedkl.token_stats(policy, reference, ids, fields=fields, backend=backend)
    for logits, logprob in ((policy, found.logprob), (reference, found.ref_logprob)):
        true = torch.log_softmax(logits.double(), -1).gather(-1, ids[:, None])[:, 0]
        assert float((logprob.double() - true).abs().max()) < limit


def test_in_place_where_the_policy_has_no_gradient() -> None:
    """Terms that cancel: the policy becomes 0, after the reference's gradient was made of it."""
    policy, reference = torch.randn(2, 1, 40)
    reference[0, 3] = -math.inf
    fields = ["forward_kl", "reverse_kl"]
    _, state = torch.ops.fusedkl.row_stats(
        policy, reference, None, fields, None, None, None, None, None, "cpu"
    )
    row = (torch.tensor([[1.0], [-1.0]]), policy, reference, None, state, fields, None, None)
    _, expected = torch.ops.fusedkl.row_stats_backward(*row, None, None, True, True, "cpu")
    found = torch.ops.fusedkl.row_stats_backward_(*row, None, None, True, "cpu")
    assert torch.equal(found, expected) and bool((found != 0).any())
    assert bool((policy == 0).all())


def test_backward_of_arguments_that_no_forward_had() -> None:
    policy = torch.randn(2, 9)
    ids = torch.tensor([[3], [9]])
    row = (policy, None, ids % 9, ["logprob"], None, None, None, None, None)
    _, state = torch.ops.fusedkl.row_stats(*row, "cpu")

    def backward(grad: Tensor, ids: Tensor, state: Tensor) -> Tensor:
        row = (grad, policy, None, ids, state, ["logprob"], None, None, None, None)
        gradient: Tensor = torch.ops.fusedkl.row_stats_backward(*row, True, False, "cpu")[0]
        return gradient

    with pytest.raises(RuntimeError, match="token_ids must be from -1 to 8; got 9"):
        backward(torch.ones(1, 2), ids, state)
    backward(torch.tensor([[1.0, 0.0]]), ids, state)  # of a masked row it may be anything
    with pytest.raises(RuntimeError, match="state does not fit"):
        backward(torch.ones(1, 2), ids % 9, state.float())


def close_to_the_truth(
    kind: str, policy: Tensor, reference: Tensor, backend: str, **options: object
) -> None:
    """Value and gradients, where float32's are finite."""
    value = fusedkl.divergence(policy, reference, kind, backend=backend, **options)
    pair = policy.double(), reference.double()
    true = fusedkl.divergence(*pair, kind, backend="reference", **options)
    torch.testing.assert_close(value.double(), true, rtol=1e-5, atol=1e-12)
    expected = gradients(kind, *pair, backend="reference", **options)
    limit = 1e-5 if policy.dtype == torch.float32 else 4e-3
    for found, right in zip(
        gradients(kind, policy, reference, backend=backend, **options), expected, strict=True
    ):
        assert oracle.relative_l2(found, right, 1e-6) < limit, kind


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize(
    ("dtype", "width", "begin"),
    [(torch.float32, 512, 256), (torch.bfloat16, 264, 256), (torch.bfloat16, 32768, 24576)],
)
def test_a_block_that_only_the_policy_has(
    backend: str, kind: str, dtype: torch.dtype, width: int, begin: int
) -> None:
    """All that one group of threads gets to see."""
    policy, reference = torch.randn(2, 1, width).to(dtype)
    reference[:, begin:] = -math.inf
    close_to_the_truth(kind, policy, reference, backend)
    close_to_the_truth(kind, reference, policy, backend)


@pytest.mark.parametrize(("width", "begin"), [(512, 256), (264, 256), (2048, 1024)])
def test_a_block_of_nan(backend: str, width: int, begin: int) -> None:
    logits = torch.randn(1, width)
    logits[:, begin:] = math.nan
    assert fusedkl.logsumexp(logits, backend=backend).isnan()
    assert fusedkl.forward_kl(torch.randn(1, width), logits, backend=backend).isnan()
    assert fusedkl.forward_kl(logits, torch.randn(1, width), backend=backend).isnan()


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "tvd"])
@pytest.mark.parametrize("width", [2048, 65536])
def test_half_of_the_reference_is_masked_by_a_number(backend: str, kind: str, width: int) -> None:
    """A number so low that none of its weights is one."""
    policy, reference = torch.randn(2, 1, width)
    reference[:, width // 2 :] = -1e4
    close_to_the_truth(kind, policy, reference, backend)


def test_a_record_of_the_policy_where_the_reference_is_masked_by_a_number(backend: str) -> None:
    reference = torch.full((1, 2048), -1e4)
    reference[:, :256] = 0.0
    reference[:, 256:1024] = 3.0
    policy = reference.clone()
    policy[:, 1024] = 6.0
    fields = ["forward_kl", "entropy"]
    found = fusedkl.token_stats(policy, reference, fields=fields, backend=backend)
    true = fusedkl.token_stats(
        policy.double(), reference.double(), fields=fields, backend="reference"
    )
    assert found.forward_kl is not None and true.forward_kl is not None
    assert oracle.relative_error(found.forward_kl, true.forward_kl) < 1e-5
    value = fusedkl.jsd(policy, reference, backend=backend)
    expected = fusedkl.jsd(policy.double(), reference.double(), backend="reference")
    assert oracle.relative_error(value, expected) < 1e-5


@pytest.mark.parametrize("temperature", [1e-10, 1e-7, 1e-5, 1e5, 1e10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_top_tokens_at_extreme_temperatures(
    backend: str, temperature: float, dtype: torch.dtype
) -> None:
    logits = torch.tensor([[0.0, 1.0]], dtype=dtype)
    for kind in ("forward_kl", "reverse_kl"):
        for found in gradients(
            kind, logits, logits.clone(), temperature=temperature, backend=backend
        ):
            assert bool((found == 0).all())


def test_a_mean_beyond_float(backend: str) -> None:
    policy, reference = torch.zeros(2, 1, 1000)
    policy[:, :2] = 8200.0
    reference[:, 0] = -5000.0
    close_to_the_truth("reverse_kl", policy, reference, backend, temperature=100.0)


def test_the_gradient_of_many_rows_far_apart(backend: str) -> None:
    """Weights of a policy far above the sampled logit, times a small share of each row."""
    policy, reference = torch.zeros(2, 1, 1000)
    policy[:, 0] = 85.0
    reference[:, 0] = -50.0
    leaf, exact = policy.clone().requires_grad_(), policy.double().requires_grad_()
    (fusedkl.forward_kl(leaf, reference, backend=backend) * 2.0**-15).sum().backward()
    true = fusedkl.forward_kl(exact, reference.double(), backend="reference") * 2.0**-15
    true.sum().backward()
    assert leaf.grad is not None and exact.grad is not None
    assert oracle.relative_l2(leaf.grad, exact.grad) < 1e-5


@pytest.mark.parametrize("kl", ["forward_kl", "reverse_kl"])
def test_log_probability_of_a_token_that_only_the_policy_lacks(backend: str, kl: str) -> None:
    pair = torch.tensor([[-math.inf, 0.0, 0.0]]), torch.zeros(1, 3)
    ids, fields = torch.tensor([[0]]), [kl, "ref_logprob"]
    limits = (0.5, None, None, None)
    _, state = torch.ops.fusedkl.row_stats(*pair, ids, fields, *limits, None, backend)
    upstream = 1.0 if kl == "reverse_kl" else 0.0  # that of the others is infinite, or has none
    grad = torch.tensor([[upstream], [1.0]])
    _, found = torch.ops.fusedkl.row_stats_backward(
        grad, *pair, ids, state, fields, *limits, True, True, backend
    )
    q = torch.full((1, 3), 1 / 3)
    expected = torch.tensor([[1.0, 0.0, 0.0]]) - q
    expected += upstream * (q - torch.tensor([[0.0, 0.5, 0.5]]))
    torch.testing.assert_close(found, expected)


def test_a_side_without_upstream_is_zero_beside_nan(backend: str) -> None:
    pair = [torch.randn(1, 9) for _ in range(2)]
    for t in pair:
        t[0, 3] = math.nan
    leaves = [t.requires_grad_() for t in pair]
    stats = fusedkl.token_stats(*leaves, fields=["entropy", "ref_entropy"], backend=backend)
    gradient = torch.autograd.grad(stats.entropy.sum(), leaves)
    assert bool(gradient[0].isnan().all()) and bool((gradient[1] == 0).all())
    if backend == "reference":  # autograd's product of a slope that is NaN and 0
        return
    leaves = [torch.randn(1, 9) for _ in range(2)]
    leaves[0][0, 3] = math.nan
    leaves = [t.requires_grad_() for t in leaves]
    stats = fusedkl.token_stats(
        *leaves, torch.tensor([3]), fields=["logprob", "ref_logprob"], softcap=30.0, backend=backend
    )
    gradient = torch.autograd.grad(stats.ref_logprob.sum(), leaves)
    assert bool((gradient[0] == 0).all()) and bool(gradient[1].isfinite().all())


def test_slices_without_mass_merge_to_nan(backend: str) -> None:
    fields = ["ref_logsumexp", "ref_entropy"]
    policy, nothing = torch.randn(1, 5), torch.full((1, 5), -math.inf)
    states = [
        torch.ops.fusedkl.row_stats(
            policy, nothing, None, fields, None, None, None, None, None, backend
        )[1]
        for _ in range(2)
    ]
    for state in states:  # as a slice keeps it: no mass, and no NaN
        state[:, 2:4] = torch.tensor([0.0, -math.inf])
    values, _ = torch.ops.fusedkl.merge_states(torch.stack(states), fields, None, backend)
    assert bool(values.isnan().all())


def test_a_side_without_upstream_is_zero_in_place() -> None:
    """A policy of NaN stayed where its gradient of 0 belongs, if the reference had one."""
    ops, x, y = torch.ops.fusedkl, torch.randn(2, 70), torch.randn(2, 70)
    x[0] = math.nan
    rest = (["logsumexp", "ref_entropy"], None, None)
    values, state = ops.row_stats(x, y, None, *rest, None, None, None, "cpu")
    grad = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    ops.row_stats_backward_(grad, x, y, None, state, *rest, None, None, True, "cpu")
    assert values.isnan().any() and torch.equal(x, torch.zeros_like(x))


@pytest.mark.parametrize("apart", [3.0, 12.0, 34.0, 90.0])
def test_hellinger_gradients_of_rows_that_hardly_overlap(backend: str, apart: float) -> None:
    """They are sum sqrt(p q) times as large, of which 1 - value was but rounding."""
    x, y = torch.randn(2, 3, 501)
    x[:, :250] += apart
    y[:, 250:] += apart
    found = gradients("hellinger", x, y, backend=backend)
    true = gradients("hellinger", x.double(), y.double(), backend="reference")
    assert max(oracle.relative_l2(*pair) for pair in zip(found, true, strict=True)) < 1e-5


@pytest.mark.parametrize("alpha", [900.0, 1e4, 1e6])
def test_renyi_of_an_order_whose_series_leaves_float(backend: str, alpha: float) -> None:
    if backend == "triton" and alpha > 1000:
        pytest.skip("its range of orders is smaller: docs/numerics.md")
    x = torch.randn(2, 300)
    y = x + 0.1 * torch.randn(2, 300) / alpha
    options = {"alpha": alpha, "backend": backend}
    exact = x.double(), y.double()
    true = fusedkl.renyi(*exact, alpha=alpha, backend="reference")
    assert oracle.relative_error(fusedkl.renyi(x, y, **options), true, 1e-12) < 1e-5
    found, slopes = (gradients("renyi", *rows, **options) for rows in ((x, y), exact))
    assert max(oracle.relative_l2(*pair) for pair in zip(found, slopes, strict=True)) < 1e-5
