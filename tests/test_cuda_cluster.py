"""Value and gradient in one launch, the rows kept on chip, for clusters of one to eight blocks."""

from __future__ import annotations

from collections.abc import Callable

import cuda_on_cpu
import oracle
import pytest
import torch
from torch import Tensor

import fusedkl
from fusedkl.backends import BACKENDS

# The kernels are compiled first.
pytestmark = pytest.mark.slow
Fused = Callable[..., tuple[Tensor, Tensor, Tensor]]


@pytest.fixture(params=[227 * 1024, 40 * 1024, 24 * 1024], ids=lambda b: f"{b // 1024} KiB")
def fused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Fused:
    """The operator on a device whose blocks have that much shared memory."""
    monkeypatch.setenv("SHIM_SHARED_BYTES", str(request.param))
    kernels = cuda_on_cpu.operators()

    def run(
        x: Tensor, y: Tensor, fields: list[str], mask: Tensor | None = None, **more: object
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad = torch.full((len(fields), x.shape[:-1].numel()), 0.5)
        if mask is not None:
            grad = grad * mask
        found: tuple[Tensor, Tensor, Tensor] = kernels.row_stats_with_gradient(
            grad, x, y, fields, None, None, mask, more.get("valid_vocab"), None
        )
        return found

    return run


def check(found: tuple[Tensor, Tensor, Tensor], x: Tensor, y: Tensor, fields: list[str]) -> None:
    values, _, gradient = found
    leaf = x.double().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for i, kind in enumerate(fields):
        true = fusedkl.divergence(leaf, y.double(), kind, backend="reference")
        assert oracle.relative_error(values[i], true.detach(), 1e-12) <= 1e-5
        total = total + 0.5 * true[true.isfinite()].sum()
    (expected,) = torch.autograd.grad(total, leaf)
    finite = values.isfinite().all(0)
    error = oracle.relative_l2(gradient[finite], expected[finite])
    assert error <= oracle.GRADIENT_TOLERANCE[x.dtype], error


@pytest.mark.parametrize("fields", [["forward_kl"], ["reverse_kl"], ["forward_kl", "reverse_kl"]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_against_the_reference(fused: Fused, dtype: torch.dtype, fields: list[str]) -> None:
    for width in (1, 7, 1000, 4099, 12001):
        y = 3 * torch.randn(2, width)
        x = y + 0.05 * torch.randn(2, width)
        check(fused(x.to(dtype), y.to(dtype), fields), x.to(dtype), y.to(dtype), fields)


def test_rows_that_need_the_other_launches(fused: Fused) -> None:
    x, y = torch.randn(6, 3001), torch.randn(6, 3001)
    y = x + 0.1 * y
    x[1, ::3] = y[1, ::3] = -torch.inf
    x[2, 5] = -torch.inf  # an infinite forward KL
    x[3] *= 200  # a forward KL beyond what the fast sums vouch for
    x[4, 7] = torch.nan
    found = fused(x, y, ["forward_kl"])
    good = [0, 1, 3, 5]
    check(
        tuple(t[:, good] if i == 0 else t[good] for i, t in enumerate(found)),
        x[good],
        y[good],
        ["forward_kl"],
    )
    assert found[0][0, 2] == torch.inf and bool(found[0][0, 4].isnan())
    assert bool(found[2][4].isnan().all())
    gap = 0.5 * (torch.softmax(x[2].double(), -1) - torch.softmax(y[2].double(), -1))
    assert oracle.relative_l2(found[2][2], gap) <= 1e-5


def test_masked_rows_and_logits_that_do_not_exist(fused: Fused) -> None:
    x, y = torch.randn(4, 3011).bfloat16(), torch.randn(4, 3011).bfloat16()
    mask = torch.tensor([True, False, True, False])
    values, _, gradient = fused(x, y, ["forward_kl"], mask, valid_vocab=2900)
    assert torch.equal(values[0, ~mask], torch.zeros(2)) and not gradient[~mask].any()
    assert not gradient[:, 2900:].any()
    true = fusedkl.forward_kl(x[:, :2900].double(), y[:, :2900].double(), backend="reference")
    assert oracle.relative_error(values[0, mask], true[mask]) <= 1e-5


@pytest.mark.parametrize("kind", ["forward_kl", "jeffreys", "jsd"])
def test_a_mean_and_its_gradient_are_one_cluster_launch(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the public function; the launches that follow are there for rows that it left."""
    assert BACKENDS["cuda"].gradient_ahead
    monkeypatch.setenv("SHIM_SHARED_BYTES", str(40 * 1024))
    y = 3 * torch.randn(3, 15_000)
    x = (y + 0.05 * torch.randn(3, 15_000)).bfloat16().requires_grad_()
    with cuda_on_cpu.registered() as backend, cuda_on_cpu.launches() as log:
        value = fusedkl.divergence(x, y.bfloat16(), kind, reduction="mean", backend=backend)
        value.backward()
    first, *others = log
    family = kind == "jsd"
    assert first.name == ("family_cluster_kernel" if family else "cluster_kernel")
    assert first.cluster == 4 and first.blocks == 3 * 4
    assert all(launch.cluster == 1 for launch in others)
    second_sweep = ["family_sums_kernel", "family_finish_kernel"] * 3 if family else []
    backward = ["prepare_kernel", "gradient_kernel"] + ["family_gradient_kernel"] * family
    names = ["finish_kernel", *second_sweep, *backward, "ordered_sum_kernel", "scale_kernel"]
    assert [launch.name for launch in others] == names
    exact = x.detach().double().requires_grad_()
    mean = fusedkl.divergence(exact, y.bfloat16().double(), kind, reduction="mean")
    mean.backward()
    assert oracle.relative_error(value.detach(), mean.detach()) <= 1e-5
    assert oracle.relative_l2(x.grad, exact.grad) <= oracle.GRADIENT_TOLERANCE[x.dtype]
