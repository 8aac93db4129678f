"""kl_div under autograd: what is saved, double backward, forward AD, functorch, layouts."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kl_div_cases import compare, needs_kernel, outcome, pair, quiet
from torch import Tensor
from torch.autograd import forward_ad
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from fusedkl import kl_div, kl_div_ops

both_targets = pytest.mark.parametrize("log_target", [False, True], ids=["prob", "log"])
reduced = pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean"])


def agree(run: Callable[[Callable[..., Tensor]], Any], **tolerance: Any) -> None:
    """run(function) gives the same structure of tensors for ours and torch's."""
    torch.testing.assert_close(quiet(run, kl_div), quiet(run, F.kl_div), **tolerance)


def saved_by(
    function: Callable[..., Tensor], x: Tensor, t: Tensor, log_target: bool
) -> list[Tensor]:
    kept: list[Tensor] = []

    def keep(saved: Tensor) -> Tensor:
        kept.append(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        function(x, t, reduction="sum", log_target=log_target)
    return [s for s in kept if s.dim() > 0]


@needs_kernel
@both_targets
def test_saves_what_the_caller_owns_and_no_more(log_target: bool) -> None:
    x, t = pair((3, 5), torch.float32, log_target)
    for ours, wanted in (
        (saved_by(kl_div, x, t.detach(), log_target), {t}),  # not x: its gradient needs only t
        (saved_by(kl_div, x.detach(), t, log_target), {x, t}),
        (saved_by(kl_div, x, t, log_target), {x, t}),
    ):
        assert {s.data_ptr() for s in ours} == {w.data_ptr() for w in wanted}
        assert len(ours) == len(wanted)
    assert not saved_by(kl_div, x.detach(), t.detach(), log_target)
    with torch.no_grad():
        assert not saved_by(kl_div, x, t, log_target)


@needs_kernel
@both_targets
def test_allocates_the_gradients_and_nothing_else(log_target: bool) -> None:
    x, t = pair((64, 1000), torch.float32, log_target)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as forward:
        loss = kl_div(x, t, reduction="sum", log_target=log_target)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as backward:
        gradients = torch.autograd.grad(loss, (x, t))
    allocated = [
        sum(max(e.self_cpu_memory_usage, 0) for e in p.key_averages()) for p in (forward, backward)
    ]
    assert allocated[0] < 1024
    assert 0 <= allocated[1] - sum(g.nbytes for g in gradients) < 1024


@needs_kernel
def test_input_is_released_after_forward() -> None:
    leaf, t = pair((3, 5), torch.float32, False)
    x = leaf * 1
    x_ref = weakref.ref(x)
    loss = kl_div(x, t.detach(), reduction="sum")
    del x
    gc.collect()
    assert x_ref() is None
    loss.backward()


@both_targets
def test_overwritten_tensors_are_noticed(log_target: bool) -> None:
    x, t = pair((3, 5), torch.float32, log_target)
    loss = kl_div(x * 1, t.detach() * 1, reduction="sum", log_target=log_target)
    loss.backward()  # what is overwritten is kept only by the graph
    target = t.detach().clone()
    loss = kl_div(x * 1, target, reduction="sum", log_target=log_target)
    target.zero_()
    if kl_div_ops.HAS_CPU_KERNEL or not log_target:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    # input is not needed for its own gradient, so overwriting it is allowed, as with torch
    log_p = x * 1
    loss = kl_div(log_p, t.detach(), reduction="sum", log_target=log_target)
    log_p.zero_()
    loss.backward()


def test_backward_twice() -> None:
    x, t = pair((3, 5), torch.float64, False)
    loss = kl_div(x, t, reduction="sum")
    first = torch.autograd.grad(loss, (x, t), retain_graph=True)
    second = torch.autograd.grad(loss, (x, t))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    errors = [outcome(lambda f=f: backward_twice(f, x, t)).error for f in (kl_div, F.kl_div)]
    assert errors[0] == errors[1] is not None


def backward_twice(function: Callable[..., Tensor], x: Tensor, t: Tensor) -> Tensor:
    loss = function(x, t, reduction="sum")
    loss.backward()
    loss.backward()
    return loss


def test_only_the_gradient_asked_for() -> None:
    x, t = pair((3, 5), torch.float64, False)
    for wanted in (x, t):
        agree(lambda f, w=wanted: torch.autograd.grad(f(x, t, reduction="sum"), w))
    agree(lambda f: torch.autograd.grad(f(x, t, reduction="sum") * 0 + x.sum(), (x, t)))


@both_targets
@reduced
def test_double_backward(reduction: str, log_target: bool) -> None:
    x, t = pair((3, 5), torch.float64, log_target)
    u = [torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def second(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        loss = function(x, t, reduction=reduction, log_target=log_target) * scale
        gx, gt = torch.autograd.grad(loss, (x, t), create_graph=True)
        inner = (gx * u[0] + gt * u[1]).sum()
        found = torch.autograd.grad(inner, (x, t, scale, *u), create_graph=True, allow_unused=True)
        third = torch.autograd.grad(found[1].square().sum(), (x, t), allow_unused=True)
        return tuple(torch.zeros(()) if g is None else g for g in (gx, gt, *found, *third))

    agree(second)


@both_targets
@pytest.mark.parametrize("upstream", [1.0, 0.0])
def test_double_backward_special_values(upstream: float, log_target: bool) -> None:
    values = [0.0, -0.0, 0.5, -0.5, torch.inf, -torch.inf, torch.nan, 1e-300]
    grid = torch.cartesian_prod(*[torch.tensor(values, dtype=torch.float64)] * 2)
    for row in grid:
        x, t = (v.reshape(1).clone().requires_grad_() for v in row)

        def second(f: Callable[..., Tensor], x: Tensor = x, t: Tensor = t) -> list[Tensor]:
            loss = f(x, t, reduction="sum", log_target=log_target) * upstream
            grads = torch.autograd.grad(loss, (x, t), create_graph=True)
            found = [
                torch.autograd.grad(g, (x, t), retain_graph=True, allow_unused=True)
                for g in grads
                if g.requires_grad
            ]
            return [torch.zeros(1) if g is None else g for pair_ in found for g in pair_]

        agree(second, equal_nan=True, rtol=1e-10, atol=0)


@both_targets
@reduced
def test_forward_ad(reduction: str, log_target: bool) -> None:
    x, t = pair((3, 5), torch.float64, log_target, grad=False)
    dx, dt = torch.randn_like(x), torch.randn_like(t)

    def tangent(function: Callable[..., Tensor]) -> Tensor:
        with forward_ad.dual_level():
            dual = (forward_ad.make_dual(x, dx), forward_ad.make_dual(t, dt))
            out = function(*dual, reduction=reduction, log_target=log_target)
            return forward_ad.unpack_dual(out).tangent

    def forward_over_reverse(function: Callable[..., Tensor]) -> Tensor:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.clone().requires_grad_(), dx)
            loss = function(dual, t, reduction=reduction, log_target=log_target)
            (g,) = torch.autograd.grad(loss * loss, dual)
            return forward_ad.unpack_dual(g).tangent

    agree(tangent)
    agree(forward_over_reverse)


def test_dual_level_entered_between_forward_and_backward() -> None:
    x, t = pair((3, 5), torch.float64, False)

    def run(function: Callable[..., Tensor]) -> Tensor:
        loss = function(x, t, reduction="sum")
        with forward_ad.dual_level():
            upstream = forward_ad.make_dual(torch.ones_like(loss), torch.full_like(loss, 3.0))
            (g,) = torch.autograd.grad(loss, t, upstream)
            return forward_ad.unpack_dual(g).tangent

    agree(run)


TRANSFORMS: dict[str, Callable[[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor], Any]] = {
    "vmap": lambda f, x, t: torch.vmap(f)(x, t),
    "vmap one": lambda f, x, t: torch.vmap(f, in_dims=(0, None))(x, t[0]),
    "vmap out": lambda f, x, t: torch.vmap(torch.vmap(f))(x, t),
    "grad": lambda f, x, t: torch.func.grad(f, argnums=(0, 1))(x, t),
    "vmap grad": lambda f, x, t: torch.vmap(torch.func.grad(f, argnums=(0, 1)))(x, t),
    "jvp": lambda f, x, t: torch.func.jvp(f, (x, t), (t, x)),
    "vjp": lambda f, x, t: torch.func.vjp(f, x, t)[1](torch.ones((), dtype=x.dtype)),
    "jacrev": lambda f, x, t: torch.func.jacrev(f, argnums=(0, 1))(x, t),
    "jacfwd": lambda f, x, t: torch.func.jacfwd(f, argnums=(0, 1))(x, t),
    "hessian": lambda f, x, t: torch.func.hessian(f, argnums=(0, 1))(x, t),
    "functionalize": lambda f, x, t: torch.func.functionalize(f)(x, t),
    "linearize": lambda f, x, t: torch.func.linearize(f, x, t)[1](t, x),
    "vectorized": lambda f, x, t: torch.autograd.functional.hessian(f, (x, t), vectorize=True),
}


@both_targets
@reduced
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_functorch(transform: str, reduction: str, log_target: bool) -> None:
    x, t = pair((2, 3, 4), torch.float64, log_target, grad=False)
    agree(
        lambda f: TRANSFORMS[transform](
            lambda a, b: f(a, b, reduction=reduction, log_target=log_target), x, t
        )
    )


@both_targets
def test_batched_backward_of_the_fused_forward(log_target: bool) -> None:
    x, t = pair((3, 5), torch.float64, log_target)
    upstream = torch.randn(7, dtype=torch.float64)
    agree(
        lambda f: torch.autograd.grad(
            f(x, t, reduction="sum", log_target=log_target), (x, t), upstream, is_grads_batched=True
        )
    )


def test_leaf_gradients_accumulate() -> None:
    x, t = pair((3, 5), torch.float64, False)
    for _ in range(3):
        kl_div(x, t, reduction="sum").backward()
    wanted = torch.autograd.grad(F.kl_div(x, t, reduction="sum"), (x, t))
    torch.testing.assert_close((x.grad, t.grad), tuple(3 * g for g in wanted))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant: bool) -> None:
    x, t = pair((3, 5), torch.float64, False)

    def run(function: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        a, b = (v.detach().clone().requires_grad_() for v in (x, t))
        out = checkpoint(
            lambda u, v: function(u, v, reduction="sum"), a, b, use_reentrant=reentrant
        )
        out.backward()
        assert a.grad is not None and b.grad is not None
        return a.grad, b.grad

    agree(run)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda a: a,
    "transposed": lambda a: a.transpose(1, 2).contiguous().transpose(1, 2),
    "channels_last": lambda a: (
        a[..., None].permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)[..., 0]
    ),
    "reversed dims": lambda a: a.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    "sliced": lambda a: torch.cat([a, a], -1)[..., : a.shape[-1]],
    "every second": lambda a: a.repeat_interleave(2, -1)[..., ::2],
    "offset": lambda a: torch.cat([a.new_zeros(1), a.flatten()])[1:].view(a.shape),
    "expanded": lambda a: a[:1].expand(a.shape),
    "negative view": lambda a: torch.complex(a, -a).conj().imag,
    "negative dense": lambda a: torch._neg_view(-a),
}


@both_targets
@pytest.mark.parametrize("first", LAYOUTS)
def test_layouts(first: str, log_target: bool) -> None:
    for second, reduction in itertools.product(LAYOUTS, ("none", "sum")):
        x, t = pair((3, 4, 5), torch.float64, log_target, grad=False)
        x, t = (LAYOUTS[name](v).detach() for name, v in ((first, x), (second, t)))
        compare(x.requires_grad_(), t.requires_grad_(), reduction=reduction, log_target=log_target)


@both_targets
def test_odd_strides_of_size_one(log_target: bool) -> None:
    x, t = (
        v.as_strided((3, 1, 5), (5, 77, 1)).detach().requires_grad_()
        for v in pair((3, 1, 5), torch.float64, log_target, grad=False)
    )
    assert x.is_contiguous()
    compare(x, t, reduction="sum", log_target=log_target)


def test_copy_on_write_inputs_stay_shared() -> None:
    x, t = pair((3, 5), torch.float32, False, grad=False)
    a, b = (torch._lazy_clone(v).requires_grad_() for v in (x, t))
    kl_div(a, b, reduction="sum").backward()
    assert all(torch._C._is_cow_tensor(v) for v in (a, b))  # type: ignore[attr-defined]


def test_inference() -> None:
    x, t = pair((3, 5), torch.float32, False)
    with torch.inference_mode():
        frozen = t * 1
        assert torch.equal(kl_div(x, frozen, reduction="sum"), kl_div(x, t, reduction="sum"))
    for log_target in (False, True):
        ours, theirs = (
            outcome(
                lambda f, k: torch.autograd.grad(f(x, frozen, reduction="sum", log_target=k), x)[0],
                f,
                log_target,
            )
            for f in (kl_div, F.kl_div)
        )
        assert ours.error == theirs.error
        if ours.value is not None:
            torch.testing.assert_close(ours.value, theirs.value)
