"""PyTorch's own samples for kl_div and KLDivLoss (OpInfo, ModuleInfo), run against ours."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from kl_div_cases import DTYPES, close_or_no_worse, quiet, same_meta
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fusedkl import KLDivLoss, kl_div

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's test helpers use what torch deprecates
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db
    from torch.testing._internal.common_utils import freeze_rng_state

(OPERATOR,) = [op for op in op_db if op.name == "nn.functional.kl_div"]
(MODULE,) = [m for m in module_db if m.module_cls is torch.nn.KLDivLoss]

all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def samples(dtype: torch.dtype, requires_grad: bool = True) -> Iterator[Any]:
    found = list(OPERATOR.sample_inputs("cpu", dtype, requires_grad=requires_grad))
    assert len(found) >= 16
    yield from found


def call(function: Callable[..., Tensor], sample: Any) -> Tensor:
    value: Tensor = quiet(function, sample.input, *sample.args, **sample.kwargs)
    return value


def for_gradcheck(sample: Any) -> tuple[Callable[..., Tensor], tuple[Tensor, Tensor]]:
    """A function of both tensors. The sample's target may lie anywhere: 0 has no gradient."""
    target = sample.args[0].detach()
    if not sample.kwargs.get("log_target"):
        target = target.abs() + 0.1
    inputs = (sample.input.detach().requires_grad_(), target.clone().requires_grad_())
    return lambda a, b: quiet(kl_div, a, b, **sample.kwargs), inputs


def results(module: Callable[..., Tensor], args: list[Tensor], upstream: Tensor) -> list[Tensor]:
    value = quiet(module, *args)
    inputs = [t for t in args if t.requires_grad]
    gradients = torch.autograd.grad(value, inputs, upstream.to(value.dtype)) if inputs else ()
    return [value, *gradients]


def agree(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], args: list[Tensor]) -> None:
    upstream = torch.randn(quiet(theirs, *args).shape)
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in args]
    found, wanted = results(ours, args, upstream), results(theirs, args, upstream)
    exact = results(theirs, wide, upstream.to(args[0].dtype))
    for a, b, c in zip(found, wanted, exact, strict=True):
        same_meta(a, b)
        close_or_no_worse(a, b, c)


@all_dtypes
def test_values_and_gradients(dtype: torch.dtype) -> None:
    for sample in samples(dtype):
        agree(
            lambda *args, k=sample.kwargs: kl_div(*args, **k),
            lambda *args, k=sample.kwargs: OPERATOR.op(*args, **k),
            [sample.input, *sample.args],
        )


def test_gradcheck() -> None:
    """Reverse and forward mode, batched gradients in both, and no undefined-gradient surprises."""
    for sample in samples(torch.float64):
        function, inputs = for_gradcheck(sample)
        assert quiet(  # torch warns of its own use of torch.jit
            gradcheck,
            function,
            inputs,
            check_batched_grad=True,
            check_forward_ad=True,
            check_batched_forward_grad=True,
            check_undefined_grad=True,
        )


def test_gradgradcheck() -> None:
    for sample in samples(torch.float64):
        function, inputs = for_gradcheck(sample)
        assert quiet(
            gradgradcheck,
            function,
            inputs,
            check_batched_grad=True,
            check_fwd_over_rev=True,
            check_rev_over_rev=True,
        )


def test_samples_in_other_forms() -> None:
    """As the OpInfo suite does it: no grad, negative views, vmap over copies, copy-on-write."""
    for sample in samples(torch.float64, requires_grad=False):
        wanted = call(OPERATOR.op, sample)
        target = sample.args[0]
        for a, b in (
            (sample.input, target),
            (torch._neg_view(-sample.input), torch._neg_view(-target)),
            (torch._lazy_clone(sample.input), torch._lazy_clone(target)),
        ):
            found = quiet(kl_div, a, b, **sample.kwargs)
            torch.testing.assert_close(found, wanted, equal_nan=True)
        mapped = torch.vmap(lambda a, b, k=sample.kwargs: quiet(kl_div, a, b, **k))
        batch = [torch.stack([v, v]) for v in (sample.input, target)]
        torch.testing.assert_close(mapped(*batch), torch.stack([wanted, wanted]), equal_nan=True)


def test_script_samples() -> None:
    with pytest.warns((FutureWarning, DeprecationWarning), match="deprecated"):  # of torch 2.11
        scripted = torch.jit.script(kl_div)
    for sample in samples(torch.float64):
        torch.testing.assert_close(
            call(scripted, sample), call(OPERATOR.op, sample), equal_nan=True
        )


@all_dtypes
def test_module_samples(dtype: torch.dtype) -> None:
    inputs = list(
        MODULE.module_inputs_func(MODULE, "cpu", dtype, requires_grad=True, training=True)
    )
    assert len(inputs) >= 8
    for given in inputs:
        made = given.constructor_input
        ours, theirs = (cls(*made.args, **made.kwargs) for cls in (KLDivLoss, torch.nn.KLDivLoss))
        args = given.forward_input.args
        agree(ours, theirs, list(args))
        if given.reference_fn is not None and dtype == torch.float64:
            detached = [t.detach() for t in args]
            with freeze_rng_state():
                reference = quiet(given.reference_fn, theirs, *detached)
            torch.testing.assert_close(quiet(ours, *detached), reference, equal_nan=True)
