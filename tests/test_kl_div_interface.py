"""kl_div and KLDivLoss from outside: signature, flags, warnings, errors, the module."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kl_div_cases import (
    DTYPES,
    REDUCTIONS,
    compare,
    counted,
    needs_kernel,
    outcome,
    pair,
    quiet,
)

import fusedkl
from fusedkl import KLDivLoss, kl_div

both_targets = pytest.mark.parametrize("log_target", [False, True], ids=["prob", "log"])
all_reductions = pytest.mark.parametrize("reduction", REDUCTIONS)
SHAPES = [(), (1,), (7,), (1, 1), (2, 3), (4, 33)]


def test_signature_is_torchs() -> None:
    assert inspect.signature(kl_div) == inspect.signature(F.kl_div)
    assert inspect.signature(KLDivLoss) == inspect.signature(torch.nn.KLDivLoss)


FLAGS = [None, False, True]


@pytest.mark.parametrize("reduction", [*REDUCTIONS, "bogus"])
@pytest.mark.parametrize("flags", list(itertools.product(FLAGS, FLAGS)), ids=str)
def test_legacy_flags(flags: tuple[bool | None, bool | None], reduction: str) -> None:
    x, t = pair((4, 5), torch.float64, False)
    compare(x, t, *flags, reduction)
    compare(x, t, size_average=flags[0], reduce=flags[1], reduction=reduction)


def test_warnings_name_the_caller() -> None:
    x, t = pair((2, 3), torch.float32, False)
    for arguments in (
        {},
        {"reduction": "mean"},
        {"reduction": "elementwise_mean"},
        {"reduce": True},
        {"size_average": False, "reduction": "batchmean"},
    ):
        ours, theirs = (outcome(f, x, t, **arguments) for f in (kl_div, F.kl_div))
        assert ours.warned == theirs.warned
        assert ours.where == theirs.where
        assert ours.warned
    assert compare(x, t.detach().double(), reduction="mean").warned  # not fused: warned once too
    for reduction in ("none", "sum", "batchmean"):
        assert not compare(x, t, reduction=reduction).warned
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            kl_div(x, t)  # one place: one warning, as Python's filters have it
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_module_warns_as_torchs() -> None:
    x, t = pair((2, 3), torch.float32, False)
    for reduction in REDUCTIONS:
        ours = outcome(KLDivLoss(reduction=reduction), x, t)
        theirs = outcome(torch.nn.KLDivLoss(reduction=reduction), x, t)
        assert ours.warned == theirs.warned
        # torch names its module's file; the module here is ours
        assert [f for f, _ in ours.where] == [fusedkl.KLDivLoss.forward.__code__.co_filename] * len(
            theirs.where
        )


ERRORS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "integer input": ((torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3)), {}),
    "integer target": ((torch.ones(2, 3), torch.ones(2, 3, dtype=torch.int32)), {}),
    "both integer": ((torch.ones(3).int(), torch.ones(3).int()), {}),
    "bool": ((torch.ones(2, 3), torch.ones(2, 3).bool()), {}),
    "complex": ((torch.ones(2, 3) + 0j, torch.ones(2, 3) + 0j), {}),
    "float8": ((torch.ones(3).to(torch.float8_e4m3fn),) * 2, {}),
    "both sparse": ((torch.ones(2, 3).to_sparse(),) * 2, {}),
    "mkldnn": ((torch.ones(2, 3).to_mkldnn(),) * 2, {}),
    "shapes": ((torch.ones(2, 3), torch.ones(2, 4)), {}),
    "meta and cpu": ((torch.ones(2, 3, device="meta"), torch.ones(2, 3)), {}),
    "list": (([1.0], torch.ones(1)), {}),
    "number target": ((torch.ones(1), 1.0), {}),
    "None": ((None, torch.ones(1)), {}),
    "no target": ((torch.ones(1),), {}),
    "nothing": ((), {}),
    "too many": ((torch.ones(1), torch.ones(1), None, None, "sum", False, 1), {}),
    "out": ((torch.ones(1), torch.ones(1)), {"out": torch.ones(1)}),
    "log_target 1": ((torch.ones(1), torch.ones(1)), {"log_target": 1}),
    "log_target tensor": ((torch.ones(1), torch.ones(1)), {"log_target": torch.tensor(True)}),
    "log_target None": ((torch.ones(1), torch.ones(1)), {"log_target": None}),
    "log_target str": ((torch.ones(1), torch.ones(1)), {"log_target": "yes"}),
    "reduction None": ((torch.ones(1), torch.ones(1)), {"reduction": None}),
    "reduction int": ((torch.ones(1), torch.ones(1)), {"reduction": 1}),
    "reduction list": ((torch.ones(1), torch.ones(1)), {"reduction": ["sum"]}),
    "reduction unknown": ((torch.ones(1), torch.ones(1)), {"reduction": "avg"}),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    args, kwargs = ERRORS[name]
    assert compare(*args, **kwargs).error is not None
    if "reduction" not in kwargs:
        for reduction in ("sum", "batchmean"):
            compare(*args, **{**kwargs, "reduction": reduction})


def test_sparse_input_is_accepted_as_by_torch() -> None:
    compare(torch.ones(2, 3).to_sparse(), torch.ones(2, 3), reduction="sum")


def test_module_is_torchs() -> None:
    module = KLDivLoss(reduction="batchmean", log_target=True)
    assert isinstance(module, torch.nn.KLDivLoss)
    assert repr(module) == "KLDivLoss()"
    assert (module.reduction, module.log_target) == ("batchmean", True)
    assert not module.state_dict()
    assert not list(module.parameters())
    x, t = pair((3, 5), torch.float32, True)
    for same in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(same(x, t), kl_div(x, t, reduction="batchmean", log_target=True))
    bogus = KLDivLoss(reduction="bogus")  # only the call complains
    with pytest.raises(ValueError, match="bogus is not a valid value for reduction"):
        bogus(x, t)
    with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
        assert KLDivLoss(size_average=False).reduction == "sum"


@needs_kernel
def test_what_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Usual inputs take the kernel, and one pass each way; the others are torch's."""
    with counted(monkeypatch) as kernels:
        for dtype, log_target, shape in itertools.product(DTYPES, (False, True), SHAPES):
            x, t = pair(shape, dtype, log_target)
            before = kernels.forward, kernels.backward
            quiet(kl_div, x, t, log_target=log_target).backward()
            assert (kernels.forward, kernels.backward) == (before[0] + 1, before[1] + 1)
        before = kernels.forward, kernels.backward
        x, t = pair((4, 5), torch.float32, False)
        kl_div(x, t, reduction="none").sum().backward()
        kl_div(x, t[:1], reduction="sum").backward()
        kl_div(x, t.double(), reduction="sum").backward()
        kl_div(x[:, :3], t[:, :3], reduction="sum").backward()
        monkeypatch.setenv("FUSEDKL_BACKEND", "reference")
        kl_div(x, t, reduction="sum").backward()
        assert before == (kernels.forward, kernels.backward)
    monkeypatch.setenv("FUSEDKL_BACKEND", "refrence")
    with pytest.raises(ValueError, match=r"FUSEDKL_BACKEND must be one of .* got 'refrence'"):
        kl_div(x, t, reduction="sum")
