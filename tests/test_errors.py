"""Bad input: which error, and that its text names the argument, what came and what is accepted."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fusedkl
from fusedkl.backends import BACKENDS

X, Y = torch.randn(2, 3, 8)
ROWS = torch.ones(3)


def call(x: Any = X, y: Any = Y, **options: Any) -> Any:
    return fusedkl.divergence(x, y, **options)


CASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "policy is no tensor": (lambda: call([1.0]), TypeError, r"policy_logits .* got list"),
    "reference is no tensor": (lambda: call(y=None), TypeError, r"reference_logits .* NoneType"),
    "integer policy": (
        lambda: call(X.long()),
        TypeError,
        r"policy_logits .* float32, bfloat16.* got int64",
    ),
    "integer reference": (lambda: call(y=Y.int()), TypeError, r"reference_logits .* got int32"),
    "complex policy": (lambda: call(X + 0j), TypeError, r"policy_logits .* got complex64"),
    "sparse policy": (
        lambda: call(X.to_sparse()),
        TypeError,
        r"policy_logits .* dense .*sparse_coo",
    ),
    "0-d policy": (lambda: call(X[0, 0]), ValueError, r"policy_logits .*\[\.\.\., V\].* 0-d"),
    "empty vocabulary": (lambda: call(X[:, :0], Y[:, :0]), ValueError, r"vocabulary .* \[3, 0\]"),
    "shapes differ": (
        lambda: call(y=Y[:2]),
        ValueError,
        r"reference_logits .* \[3, 8\]; got \[2, 8\]",
    ),
    "no broadcasting": (lambda: call(y=Y[:1]), ValueError, r"nothing is broadcast"),
    "devices differ": (
        lambda: call(y=Y.to("meta")),
        ValueError,
        r"reference_logits must be on cpu .* got meta",
    ),
    "unknown kind": (
        lambda: call(kind="backward_kl"),
        ValueError,
        r"kind must be one of forward_kl, .*, hellinger; got 'backward_kl'",
    ),
    "kind of a wrong type": (lambda: call(kind=1), TypeError, r"kind must be a string, got int"),
    "unknown option": (lambda: call(gamma=0.5), TypeError, r"gamma"),
    "option of another kind": (
        lambda: call(beta=0.5),
        ValueError,
        r"beta=0.5 has no effect on kind=.forward_kl.",
    ),
    "positional option": (lambda: fusedkl.forward_kl(X, Y, 2.0), TypeError, r"positional argument"),
    "unknown reduction": (
        lambda: call(reduction="avg"),
        ValueError,
        r"reduction must be one of none, sum, mean, batchmean; got 'avg'",
    ),
    "batchmean of one row": (
        lambda: call(X[0], Y[0], reduction="batchmean"),
        ValueError,
        r"batchmean.* batch dim",
    ),
    "temperature 0": (lambda: call(temperature=0), ValueError, r"temperature .* positive .* got 0"),
    "temperature < 0": (lambda: call(temperature=-1.0), ValueError, r"temperature .* got -1\.0"),
    "temperature nan": (
        lambda: call(temperature=float("nan")),
        ValueError,
        r"temperature .* got nan",
    ),
    "temperature inf": (
        lambda: call(temperature=float("inf")),
        ValueError,
        r"temperature .* got inf",
    ),
    "temperature string": (lambda: call(temperature="1"), TypeError, r"temperature .* got str"),
    "temperature bool": (lambda: call(temperature=True), TypeError, r"temperature .* got bool"),
    "temperature with gradient": (
        lambda: call(temperature=torch.ones(3, requires_grad=True)),
        TypeError,
        r"temperature requires grad",
    ),
    "integer temperature tensor": (
        lambda: call(temperature=torch.ones(3, dtype=torch.long)),
        TypeError,
        r"temperature .* floating-point .* got int64",
    ),
    "temperature of a wrong shape": (
        lambda: call(temperature=torch.ones(4)),
        ValueError,
        r"temperature .* \[3\]; got \[4\]",
    ),
    "temperature holds 0": (
        lambda: call(temperature=torch.tensor([1.0, 0.0, 1.0])),
        ValueError,
        r"temperature must be positive and finite; got inf|temperature .* got 0",
    ),
    "temperature holds a negative": (
        lambda: call(temperature=torch.tensor([1.0, -2.0, 1.0])),
        ValueError,
        r"temperature must be positive and finite; got -2\.0",
    ),
    "temperature holds nan": (
        lambda: call(temperature=ROWS * float("nan")),
        ValueError,
        r"temperature .* got nan",
    ),
    "temperature holds inf": (
        lambda: call(temperature=ROWS * float("inf")),
        ValueError,
        r"temperature .* got inf",
    ),
    "mask is no tensor": (lambda: call(mask=[True]), TypeError, r"mask .* got list"),
    "float mask": (lambda: call(mask=ROWS), TypeError, r"mask .* bool .* got torch.float32"),
    "mask of a wrong shape": (
        lambda: call(mask=torch.ones(3, 1, dtype=torch.bool)),
        ValueError,
        r"mask .* \[3\]; got \[3, 1\]",
    ),
    "mask elsewhere": (
        lambda: call(mask=torch.ones(3, dtype=torch.bool, device="meta")),
        ValueError,
        r"mask must be on cpu .* got meta",
    ),
    "integer weight": (lambda: call(weight=ROWS.long()), TypeError, r"weight .* got torch.int64"),
    "weight of a wrong shape": (
        lambda: call(weight=torch.ones(1)),
        ValueError,
        r"weight .* \[3\]; got \[1\]",
    ),
    "float labels": (lambda: call(labels=ROWS), TypeError, r"labels .* integer .*float32"),
    "labels of a wrong shape": (
        lambda: call(labels=torch.zeros(2, dtype=torch.long)),
        ValueError,
        r"labels .* got \[2\]",
    ),
    "ignore_index alone": (lambda: call(ignore_index=0), ValueError, r"ignore_index=0 .* labels"),
    "ignore_index of a wrong type": (
        lambda: call(labels=ROWS.long(), ignore_index=0.5),
        TypeError,
        r"ignore_index .* got float",
    ),
    "ignore_index beyond 64 bits": (
        lambda: call(labels=ROWS.long(), ignore_index=2**63),
        ValueError,
        r"ignore_index must fit into 64 bits; got 9223372036854775808",
    ),
    "a cap that scaling takes out of range": (
        lambda: call(softcap=1e-300, logit_scale=1e100),
        ValueError,
        r"softcap / logit_scale must be .* got softcap=1e-300, logit_scale=1e\+100",
    ),
    "inplace_grad of a wrong type": (
        lambda: call(inplace_grad=1),
        TypeError,
        r"inplace_grad must be True or False; got int",
    ),
    "inplace_grad, expanded policy": (
        lambda: call(X[0].expand(3, 8), inplace_grad=True),
        ValueError,
        r"inplace_grad.*expanded",
    ),
    "inplace_grad, overlapping rows": (
        lambda: call(torch.randn(99).as_strided((3, 8), (5, 1)), inplace_grad=True),
        ValueError,
        r"inplace_grad.*share memory.*strides \[5, 1\]",
    ),
    "inplace_grad, strided vocabulary": (
        lambda: call(torch.randn(8, 3).t(), inplace_grad=True),
        ValueError,
        r"inplace_grad.*last dim has stride 1; got stride 3",
    ),
    "inplace_grad, reference in the policy's memory": (
        lambda: call(X, X, inplace_grad=True),
        ValueError,
        r"inplace_grad.*reference_logits outside",
    ),
    "unknown backend": (
        lambda: call(backend="magma"),
        ValueError,
        r"backend must be one of cpu, .*reference; got 'magma'",
    ),
    "backend of a wrong type": (lambda: call(backend=1), TypeError, r"backend .* got int"),
    "entropy of no tensor": (lambda: fusedkl.entropy(3), TypeError, r"logits .* got int"),
    "logsumexp of integers": (
        lambda: fusedkl.logsumexp(X.long()),
        TypeError,
        r"logits .* got int64",
    ),
    "log_softmax of 0-d": (lambda: fusedkl.log_softmax(X[0, 0]), ValueError, r"logits .* 0-d"),
    "log_softmax over a dim that is not there": (
        lambda: fusedkl.log_softmax(X, 2),
        IndexError,
        r"[Dd]imension out of range",
    ),
    "log_softmax over no dim": (
        lambda: fusedkl.log_softmax(X, None),
        TypeError,
        r"dim must be an int; got NoneType",
    ),
    "log_softmax to integers": (
        lambda: fusedkl.log_softmax(X, dtype=torch.long),
        TypeError,
        r"dtype .* got torch.int64",
    ),
    "int32 index": (
        lambda: fusedkl.selective_log_softmax(X, torch.zeros(3, dtype=torch.int)),
        TypeError,
        r"index .* int64 .* got int32",
    ),
    "index of a wrong shape": (
        lambda: fusedkl.selective_log_softmax(X, torch.zeros(2, dtype=torch.long)),
        ValueError,
        r"index .* \[3\].* got \[2\]",
    ),
    "index too large": (
        lambda: fusedkl.selective_log_softmax(X, torch.tensor([0, 8, 1])),
        ValueError,
        r"index .* from 0 to 7; got 0 to 8",
    ),
    "index of ignored labels": (
        lambda: fusedkl.selective_log_softmax(X, torch.tensor([0, -100, 1])),
        ValueError,
        r"index .* got -100 to 1",
    ),
    "module temperature": (
        lambda: fusedkl.ForwardKLLoss(temperature=0.0),
        ValueError,
        r"temperature .* got 0\.0",
    ),
    "module reduction": (
        lambda: fusedkl.JeffreysLoss(reduction="avg"),
        ValueError,
        r"reduction .* got 'avg'",
    ),
    "explain no tensor": (lambda: fusedkl.explain(3), TypeError, r"policy_logits .* got int"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case: str) -> None:
    function, error, message = CASES[case]
    with pytest.raises(error) as caught:
        function()
    assert type(caught.value) is error
    assert re.search(message, str(caught.value)), str(caught.value)


def test_the_operator_itself_refuses_what_its_kernels_could_not_read(backend: str) -> None:
    """torch.ops.fusedkl.row_stats is reachable; memory must be safe behind it."""
    op = torch.ops.fusedkl.row_stats
    ids = torch.zeros(3, 1, dtype=torch.long)
    bad = [
        (X.t(), None, None, ["entropy"], None, None),
        (X[0], None, None, ["entropy"], None, None),
        (X, Y[:, :4], None, ["forward_kl"], None, None),
        (X, Y[:2], None, ["forward_kl"], None, None),
        (X, None, None, ["forward_kl"], None, None),
        (X, None, None, ["logprob"], None, None),
        (X, None, ids[:2], ["logprob"], None, None),
        (X, None, ids + 8, ["logprob"], None, None),
        (X, None, ids.int(), ["logprob"], None, None),
        (X, None, None, ["entropy"], torch.ones(2, dtype=torch.float64), None),
        (X, None, None, ["entropy"], torch.ones(3), None),
        (X, None, None, ["entropy"], None, torch.ones(2, dtype=torch.bool)),
        (X, None, None, ["entropy"], None, torch.ones(3)),
        (X.long(), None, None, ["entropy"], None, None),
        (X, None, None, ["nonsense"], None, None),
    ]
    for arguments in bad:
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            x, y, tokens, fields, inverse, mask = arguments
            op(x, y, tokens, fields, None, inverse, mask, None, None, backend)
    for width, cap in ((0, None), (X.shape[-1] + 1, None), (None, 0.0), (None, -1.0)):
        with pytest.raises(ValueError, match=r"valid_vocab|softcap"):
            op(X, Y, None, ["forward_kl"], None, None, None, width, cap, backend)


def test_a_backend_named_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDKL_BACKEND", "reference")
    assert fusedkl.explain(X, Y).chosen == "reference"
    assert "FUSEDKL_BACKEND" in fusedkl.explain(X, Y).why
    monkeypatch.setenv("FUSEDKL_BACKEND", "magma")
    with pytest.raises(ValueError, match=r"FUSEDKL_BACKEND must be one of .* got 'magma'"):
        call()
    # An argument is the more explicit of the two.
    assert torch.equal(call(backend="reference"), call(backend="reference"))


def test_an_explicit_backend_never_falls_back() -> None:
    meta = X.to("meta")
    with pytest.raises(ValueError, match="backend='cpu' cannot be used: "):
        call(meta, meta, backend="cpu")
    explained = fusedkl.explain(meta, meta, backend="cpu")
    assert explained.chosen is None and "cannot be used" in explained.why
    assert "cpu" in str(explained) and "reference" in str(explained)


def test_backends_say_what_they_are() -> None:
    found = fusedkl.backends()
    assert [status.name for status in found] == list(BACKENDS)
    assert all(status.reason for status in found)
    assert found[-1].available  # reference: always
    for status in found:
        assert status.available == (BACKENDS[status.name].why_not(None) is None)
        assert ("yes" if status.available else "no") in str(status)
    first = next(status.name for status in found if status.available)
    assert fusedkl.explain(X, Y).chosen == first
