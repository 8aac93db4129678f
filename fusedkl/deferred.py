"""Softmaxes that wait for their use: what `patch()` puts in place of torch's.

A `Deferred` stands for log_softmax(x), softmax(x) or an unreduced kl_div of the two. kl_div and the
sum of an unreduced kl_div take the logits out of it (`deferred_kl.py`); anything else gets torch's
own result, computed then, once, from the same logits in the grad mode and autocast state of the
original call.

    Plan      what is to be computed, from which logits; owns the result once there is one
    Deferred  the tensor that the user holds: a wrapper without memory, with its plan

Python code reaches a Deferred through `__torch_function__`, which hands out the result. Code that
does not (an autograd.Function of the user's, C++) finds a tensor with a gradient function of its
own, and `__torch_dispatch__`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._pytree import tree_map

__all__ = ["SPECIAL", "Deferred", "Plan", "plan_of", "result"]

_Compute = Callable[..., Tensor]
_UNTOUCHED = torch._C.DisableTorchFunctionSubclass


def _state(t: Tensor) -> tuple[Any, ...]:
    return t._version, t.data_ptr(), t.shape, t.stride()


class Plan:
    """torch's result of `compute(*logits)`, not computed yet.

    name     "log_softmax", "softmax", or "kl_div" (unreduced)
    parts    of "kl_div": the plans of its input and target
    """

    def __init__(
        self,
        name: str,
        compute: _Compute,
        logits: tuple[Tensor, ...],
        dtype: torch.dtype,
        parts: tuple[Plan, ...] = (),
    ) -> None:
        self.name = name
        self.compute = compute
        self.logits = logits
        self.dtype = dtype
        self.parts = parts
        self.grad_mode = torch.is_grad_enabled()
        device = logits[0].device.type
        enabled = torch.is_autocast_enabled(device)
        self.autocast = (device, torch.get_autocast_dtype(device) if enabled else None, enabled)
        given = [part.requires_grad for part in parts] or [x.requires_grad for x in logits]
        self.requires_grad: bool = self.grad_mode and any(given)
        self.value: Tensor | None = None
        self._version = 0
        self._found = [_state(x) for x in logits]
        self._lock = threading.Lock()

    def check_unchanged(self) -> None:
        """RuntimeError if the logits are not those of the calls any more."""
        for part in self.parts:
            part.check_unchanged()
        if [_state(x) for x in self.logits] == self._found:
            return
        raise RuntimeError(
            f"the logits given to {self.name} were changed in place or resized before its result "
            "was used. Under fusedkl.patch() the result is computed at its first use; use it "
            "before changing the logits, or change a clone of them."
        )

    def sources(self) -> tuple[Tensor, ...]:
        """The logits, without a gradient where the original calls recorded none."""
        found = tuple(x for p in self.parts for x in p.sources()) if self.parts else self.logits
        return found if self.requires_grad else tuple(x.detach() for x in found)

    def evaluate(self) -> Tensor:
        """torch's result, with the graph that torch's own call would have given it."""
        with self._lock:
            if self.value is None:
                self.check_unchanged()
                with temporarily_clear_interpreter_stack():  # a result is nobody's torch.func level
                    given = tuple(p.unmodified() for p in self.parts) if self.parts else self.logits
                    self.value = self._as_then(given)
                self._version = self.value._version
            return self.value

    def unmodified(self) -> Tensor:
        """The result as it was when it was computed, also if the user has written to it since."""
        value = self.evaluate()
        return value if value._version == self._version else self.recompute(self.logits)

    def recompute(self, logits: tuple[Tensor, ...]) -> Tensor:
        """The result from other tensors in place of the logits."""
        if self.parts:
            logits = tuple(p.recompute((x,)) for p, x in zip(self.parts, logits, strict=True))
        return self._as_then(logits)

    def _as_then(self, given: tuple[Tensor, ...]) -> Tensor:
        device, dtype, enabled = self.autocast
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(self.grad_mode),
            torch.autocast(device, dtype=dtype, enabled=enabled),
        ):
            return self.compute(*given)

    def tensor(self) -> Tensor:
        """What the user gets."""
        if self.requires_grad:
            out: Tensor = _Recorded.apply(self, *self.sources())
            return out
        return _wrapper(self)


class _Recorded(torch.autograd.Function):
    """Gives a Deferred its place in autograd's graph, for code that __torch_function__ misses."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *logits: Tensor) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(*logits)
        return _wrapper(plan)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        again = torch.is_grad_enabled()
        wanted = ctx.needs_input_grad[1:]
        with torch.enable_grad():
            logits = tuple(
                x.view_as(x) if again else x.detach().requires_grad_(needed)
                for x, needed in zip(ctx.saved_tensors, wanted, strict=True)
            )
            value = ctx.plan.recompute(logits)
            leaves = [x for x, needed in zip(logits, wanted, strict=True) if needed]
            found = iter(torch.autograd.grad(value, leaves, grads[0], create_graph=again))
        return None, *(next(found) if needed else None for needed in wanted)


class _Value(torch.autograd.Function):
    """The result of a Deferred that an autograd.Function of others returned as its own output.

    Its gradient is that function's business now, so it goes to the Deferred, not to its logits.
    """

    @staticmethod
    def forward(ctx: Any, deferred: Deferred) -> Tensor:
        return deferred.plan.evaluate().detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def _wrapper(plan: Plan) -> Deferred:
    first = plan.logits[0]
    out: Deferred = torch.Tensor._make_wrapper_subclass(
        Deferred, first.shape, dtype=plan.dtype, device=first.device
    )
    out.plan = plan
    return out


def plan_of(value: object) -> Plan | None:
    """The plan of a Deferred whose result nobody has seen, or None."""
    if type(value) is not Deferred or value.plan.value is not None or _adopted(value):
        return None
    return value.plan


def _adopted(deferred: Deferred) -> bool:
    with _UNTOUCHED():
        return deferred.requires_grad is not deferred.plan.requires_grad


def result(value: Any) -> Any:
    """torch's result in place of a Deferred; anything else as it is."""
    if type(value) is not Deferred:
        return value
    return _Value.apply(value) if _adopted(value) else value.plan.evaluate()


def _without_graph(value: Any) -> Any:
    return value.plan.evaluate().detach() if type(value) is Deferred else value


def _attribute(name: str) -> Any:
    return getattr(torch.Tensor, name).__get__


# What can be answered without the result.
_METADATA = {
    torch.Tensor.dim,
    torch.Tensor.size,
    torch.Tensor.numel,
    torch.Tensor.nelement,
    torch.Tensor.element_size,
    torch.Tensor.is_floating_point,
    torch.Tensor.is_complex,
    torch.Tensor.__hash__,
    torch.Tensor.__len__,
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
    *map(
        _attribute,
        ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cpu", "is_cuda"),
    ),
}

# Functions with an answer for Deferred arguments: deferred_kl.py fills this in.
SPECIAL: dict[Any, Callable[..., Any]] = {}


class Deferred(torch.Tensor):
    """A tensor whose elements are computed when something asks for them; see the module."""

    plan: Plan

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with _UNTOUCHED():
                return func(*args, **kwargs)
        special = None if torch.compiler.is_compiling() else SPECIAL.get(func)
        if special is not None:
            answer = special(*args, **kwargs)
            if answer is not NotImplemented:
                return answer
        return func(*tree_map(result, args), **tree_map(result, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Below autograd: gradients are the business of whoever called.
        return func(*tree_map(_without_graph, args), **tree_map(_without_graph, kwargs or {}))
