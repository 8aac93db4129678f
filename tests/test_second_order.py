"""Fisher-vector products, and the Hessian-vector products of the divergences they belong to."""

from __future__ import annotations

import math
from collections.abc import Callable

import oracle
import pytest
import torch
from torch import Tensor

import fusedkl
from fusedkl import layout

N, V = 5, 67


def fisher(logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """[N, V, V], as it is defined."""
    t = torch.as_tensor(temperature, dtype=torch.float64).expand(logits.shape[0])
    p = torch.softmax(logits.double() / t[:, None], -1)
    return (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) / t[:, None, None] ** 2


@pytest.mark.parametrize("dtype", oracle.GRADIENT_TOLERANCE, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7, torch.rand(N) + 0.5], ids=["1", "0.7", "rows"])
def test_products(dtype: torch.dtype, temperature: float | Tensor) -> None:
    logits = 3 * torch.randn(N, V).to(dtype) + 1e3
    vector = torch.randn(N, V).to(dtype)
    expected = (fisher(logits, temperature) @ vector.double()[:, :, None])[:, :, 0]
    found = fusedkl.fisher_vector_product(logits, vector, temperature=temperature)
    assert found.dtype == dtype
    assert oracle.relative_l2(found, expected) <= oracle.GRADIENT_TOLERANCE[dtype]


def test_a_small_product_keeps_its_digits() -> None:
    # a peaked row: everything but 1e-9 of the mass on one token, and a vector with an offset
    logits = torch.randn(N, V, dtype=torch.float64)
    logits[:, 3] += 24
    vector = torch.randn(N, V, dtype=torch.float64) + 1e4
    found = fusedkl.fisher_vector_product(logits.float(), vector.float())
    exact = fusedkl.fisher_vector_product(logits.float().double(), vector.float().double())
    centred = vector.float().double() - 1e4  # F takes constants to 0
    direct = (fisher(logits.float()) @ centred[:, :, None])[:, :, 0]
    assert oracle.relative_l2(found, exact) <= 1e-6
    assert oracle.relative_l2(exact, direct) <= 1e-5


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("side", [0, 1], ids=["policy", "reference"])
def test_it_is_the_hessian_where_the_rows_are_equal(kind: str, side: int, backend: str) -> None:
    rows = [torch.randn(N, V, dtype=torch.float64)] * 2
    rows[side] = rows[side].clone().requires_grad_()
    vector = torch.randn(N, V, dtype=torch.float64)
    value = fusedkl.divergence(*rows, kind, temperature=1.7, reduction="sum", backend=backend)
    (slope,) = torch.autograd.grad(value, rows[side], create_graph=True)
    (product,) = torch.autograd.grad((slope * vector).sum(), rows[side])
    expected = fusedkl.fisher_vector_product(rows[0].detach(), vector, temperature=1.7)
    torch.testing.assert_close(product, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jeffreys"])
def test_hessian_vector_products_elsewhere(kind: str, backend: str) -> None:
    x, y, vector = torch.randn(3, N, V, dtype=torch.float64)
    x.requires_grad_()

    def composed(x: Tensor) -> Tensor:
        log_p, log_q = x.log_softmax(-1), y.log_softmax(-1)
        forward = (log_q.exp() * (log_q - log_p)).sum()
        reverse = (log_p.exp() * (log_p - log_q)).sum()
        return {"forward_kl": forward, "reverse_kl": reverse, "jeffreys": forward + reverse}[kind]

    _, expected = torch.autograd.functional.hvp(composed, x, vector)
    value = fusedkl.divergence(x, y, kind, reduction="sum", backend=backend)
    (slope,) = torch.autograd.grad(value, x, create_graph=True)
    (product,) = torch.autograd.grad((slope * vector).sum(), x)
    torch.testing.assert_close(product, expected, rtol=1e-9, atol=1e-12)


def test_symmetric_positive_and_blind_to_constants() -> None:
    logits, u, v = torch.randn(3, N, V, dtype=torch.float64)
    product = fusedkl.fisher_vector_product
    torch.testing.assert_close((u * product(logits, v)).sum(-1), (v * product(logits, u)).sum(-1))
    assert bool(((v * product(logits, v)).sum(-1) > 0).all())
    assert product(logits, torch.full_like(v, 7.0)).abs().max() < 1e-15


def test_shapes_strides_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, vector = torch.randn(2, 3, 6, V)
    expected = fisher(logits.flatten(0, 1)) @ vector.double().flatten(0, 1)[:, :, None]
    expected = expected.view(3, 6, V)
    found = fusedkl.fisher_vector_product(logits[:, 1:], vector[:, :-1])
    torch.testing.assert_close(
        found,
        fusedkl.fisher_vector_product(logits[:, 1:].contiguous(), vector[:, :-1].contiguous()),
    )
    monkeypatch.setattr(layout, "_BLOCK", 2 * V)  # several blocks, the last one short
    torch.testing.assert_close(fusedkl.fisher_vector_product(logits, vector), expected.float())
    torch.testing.assert_close(
        fusedkl.fisher_vector_product(logits[0, 0], vector[0, 0]), expected[0, 0].float()
    )
    transposed = fusedkl.fisher_vector_product(logits.mT, vector.mT)
    assert transposed.shape == (3, V, 6)
    assert fusedkl.fisher_vector_product(logits[:0], vector[:0]).shape == (0, 6, V)


def test_masked_tokens_and_bad_rows() -> None:
    logits, vector = torch.randn(2, 4, V)
    logits[0, 3:] = -math.inf
    logits[1] = -math.inf
    logits[2, 5] = math.nan
    vector[0, 10] = math.nan  # where p is 0
    found = fusedkl.fisher_vector_product(logits, vector)
    assert bool(found[0].isfinite().all()) and not found[0, 3:].any() and bool(found[0, :3].any())
    assert bool(found[1:3].isnan().all()) and bool(found[3].isfinite().all())


def test_products_differentiate() -> None:
    logits, vector = torch.randn(2, 2, 5, dtype=torch.float64).unbind()
    given = (logits.requires_grad_(), vector.requires_grad_())
    assert torch.autograd.gradcheck(fusedkl.fisher_vector_product, given)
    assert torch.autograd.gradgradcheck(fusedkl.fisher_vector_product, given)


X = torch.zeros(2, 3)
BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "logits": (lambda: fusedkl.fisher_vector_product(X.int(), X), TypeError, "logits .* got int32"),
    "vector": (lambda: fusedkl.fisher_vector_product(X, X.int()), TypeError, "vector .* got int32"),
    "shape": (lambda: fusedkl.fisher_vector_product(X, X[0]), ValueError, r"vector .* got \[3\]"),
    "T": (lambda: fusedkl.fisher_vector_product(X, X, temperature=0), ValueError, "temperature"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    function, error, text = BAD[case]
    with pytest.raises(error, match=text):
        function()


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0)], ids=str)
def test_a_batch_of_either_argument(in_dims: tuple[int | None, int | None]) -> None:
    logits, vector = torch.randn(3, N, V), torch.randn(3, N, V)
    given = [t if dim == 0 else t[0] for t, dim in zip((logits, vector), in_dims, strict=True)]
    found = torch.func.vmap(fusedkl.fisher_vector_product, in_dims)(*given)
    alone = [
        fusedkl.fisher_vector_product(*(t[i] if t.dim() == 3 else t for t in given))
        for i in range(3)
    ]
    torch.testing.assert_close(found, torch.stack(alone))
