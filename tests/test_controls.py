"""Controls of a row: logits that do not exist, and capped ones."""

from __future__ import annotations

import pytest
import torch

OPS = torch.ops.fusedkl


@pytest.mark.parametrize("width", [1, 70, 4095])
def test_logits_beyond_valid_vocab_do_not_exist(backend: str, width: int) -> None:
    x, y = torch.randn(3, width + 9), torch.randn(3, width + 70)
    x[:, width:], y[:, width:] = torch.nan, torch.inf
    fields = ["forward_kl", "reverse_kl"]
    values, state = OPS.row_stats(x, y, None, fields, None, None, None, width, None, backend)
    cut = [t[:, :width].contiguous() for t in (x, y)]
    expected, expected_state = OPS.row_stats(
        *cut, None, fields, None, None, None, None, None, backend
    )
    assert torch.equal(values, expected) and torch.equal(state, expected_state)
    grad = torch.rand_like(values)
    gx, gy = OPS.row_stats_backward(
        grad, x, y, None, state, fields, None, None, width, None, True, True, backend
    )
    ex, ey = OPS.row_stats_backward(
        grad, *cut, None, state, fields, None, None, None, None, True, True, backend
    )
    assert gx.shape == x.shape and gy.shape == y.shape
    assert torch.equal(gx[:, :width], ex) and torch.equal(gy[:, :width], ey)
    assert not gx[:, width:].any() and not gy[:, width:].any()
