"""What nobody looks at (on a device, under a compiler) makes its row NaN, and no other."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import fusedkl
from fusedkl import layout, reference_backend, topk

FIELDS = ["forward_kl", "reverse_kl", "entropy", "logsumexp", "jsd"]


def test_temperatures() -> None:
    given = torch.tensor([2.0, 0.0, -1.0, math.inf, math.nan], dtype=torch.float64)
    found = layout.positive_or_nan(given)
    assert found[0] == 2 and bool(found[1:].isnan().all())
    x, y = torch.randn(2, 5, 7)
    values, _ = reference_backend.row_stats(x, y, None, FIELDS, 0.5, 1 / found, None, None, None)
    assert bool(values[:, 0].isfinite().all()) and bool(values[:, 1:].isnan().all())


def test_a_temperature_on_a_device_is_made_so(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(layout, "positive_or_nan", lambda t: seen.append(t) or t)
    with FakeTensorMode():
        for device in ("cpu", "cuda"):
            x, t = torch.empty(3, 7, device=device), torch.empty(3, device=device)
            layout.inverse_temperature(t, x)
    assert [t.device.type for t in seen] == ["cuda"]


def test_token_ids() -> None:
    x, y = torch.randn(2, 4, 7)
    ids = torch.tensor([[3], [7], [-2], [-1]])
    values, _ = reference_backend.row_stats(
        x, y, ids, ["logprob", "ref_logprob"], None, None, None, None, None
    )
    assert values.isnan().all(0).tolist() == [False, True, True, False]
    assert bool((values[:, 3] == 0).all())  # -1: a token of another slice


SPOILT: dict[str, Callable[[Tensor, Tensor], object]] = {
    "a probability above 1": lambda ids, log_q: log_q[1].__setitem__(0, 0.5),
    "an id below -1": lambda ids, log_q: ids[1].__setitem__(0, -7),
    "an id beyond the vocabulary": lambda ids, log_q: ids[1].__setitem__(2, 9),
    "an id given twice": lambda ids, log_q: ids[1].__setitem__(2, int(ids[1, 0])),
}


@pytest.mark.slow
@pytest.mark.parametrize("tail", topk.TAILS)
@pytest.mark.parametrize("kind", topk.KINDS)
@pytest.mark.parametrize("what", [*SPOILT, "nothing"])
def test_a_sparse_teacher(what: str, kind: str, tail: str, compiler: None) -> None:
    x = torch.randn(3, 9)
    log_q, ids = torch.randn(3, 9).log_softmax(-1).topk(4)
    ids[0, 3] = -1
    SPOILT.get(what, lambda *_: None)(ids, log_q)

    def call(x: Tensor, ids: Tensor, log_q: Tensor) -> Tensor:
        found = fusedkl.topk_divergence(x, ids, log_q, kind, tail=tail)
        assert isinstance(found, Tensor)
        return found

    # traced, nobody looks at contents; the graph then runs as it is
    found = torch.compile(call, backend="eager", fullgraph=True)(x, ids, log_q)
    assert found.isnan().tolist() == [False, what != "nothing", False]
    if what != "nothing":
        with pytest.raises(ValueError, match="topk_"):
            call(x, ids, log_q)
    else:
        torch.testing.assert_close(found, call(x, ids, log_q))


@pytest.mark.parametrize("field", ["ref_entropy", "ref_logprob", "ref_logsumexp"])
@pytest.mark.parametrize("again", [False, True], ids=["once", "create_graph"])
def test_a_field_of_the_other_row_has_no_gradient(backend: str, field: str, again: bool) -> None:
    x, y = torch.randn(3, 9, requires_grad=True), torch.randn(3, 9)
    found = fusedkl.token_stats(x, y, torch.arange(3), fields=[field], backend=backend)
    (slope,) = torch.autograd.grad(getattr(found, field).sum(), x, create_graph=again)
    assert torch.equal(slope, torch.zeros_like(x))


def test_blocks_on_a_device_fill_it() -> None:
    """Two sweeps a block: of hundreds of rows, not of a dozen."""
    with FakeTensorMode():
        x = torch.empty(8192, 151936, device="cuda", dtype=torch.bfloat16)
        assert len(list(layout.row_parts(x))) < 20
