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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

from . import saving

__all__ = ["SPECIAL", "Deferred", "Plan", "plan_of", "result", "under_later_hooks"]

_Compute = Callable[..., Tensor]
_UNTOUCHED = torch._C.DisableTorchFunctionSubclass
_NO_MEMORY = (
    "what {} returned under fusedkl.patch() has no memory before Python code uses it. Where it is "
    "assigned to the .data of a tensor, or handed to C++ code, use its .detach()"
)


def _state(t: Tensor) -> tuple[Any, ...]:
    return t._version, t.data_ptr(), t.shape, t.stride()


@contextmanager
def _observed_as(hooks: saving.Hooks) -> Iterator[None]:
    """Out of reach of what observes operations now and did not when `hooks` were in force.

    A checkpoint whose region uses an earlier softmax would count it and what it saves, and meet
    neither when it recomputes the region. Nothing is deferred under a dispatch mode, so none is
    kept. Hooks are taken off and not covered by others: autograd does not see in-place changes of
    what hooks hold.
    """
    if torch.compiler.is_compiling():
        yield
        return
    off = []
    if hooks != saving.hooks():
        while (pair := saving.hooks()) is not None:
            off.append(pair)
            torch._C._autograd._pop_saved_tensors_default_hooks()
    try:
        modes = torch._C._len_torch_dispatch_stack() > 0
        with _disable_current_modes() if modes else nullcontext():
            yield
    finally:
        for pair in reversed(off):
            torch._C._autograd._push_saved_tensors_default_hooks(*pair)


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
        device = logits[0].device.type
        enabled = torch.is_autocast_enabled(device)
        self.autocast = (device, torch.get_autocast_dtype(device) if enabled else None, enabled)
        self.hooks = saving.hooks()
        given = [part.requires_grad for part in parts] or [x.requires_grad for x in logits]
        self.requires_grad: bool = torch.is_grad_enabled() and any(given)
        self.recorded = [self.requires_grad and wanted for wanted in given]
        self.value: Tensor | None = None
        self._severed = False
        self._made: tuple[Any, ...] = ()
        self._found = [(x, _state(x), x.grad_fn) for x in logits]
        self._lock = threading.Lock()

    def check_unchanged(self) -> None:
        """RuntimeError if the logits are not those of the calls any more."""
        for part in self.parts:
            part.check_unchanged()
        if all(_state(x) == found for x, found, _ in self._found):
            return
        raise RuntimeError(
            f"the logits given to {self.name} were changed in place or resized before its result "
            "was used. Under fusedkl.patch() the result is computed at its first use; use it "
            "before changing the logits, or change a clone of them."
        )

    def severed(self) -> bool:
        """Whether logits that the calls recorded have come off the graph (detach_()).

        They may be a leaf by now. If so when the result was computed, it has no graph, or another
        one; its Deferred, made before, has that of the calls.
        """
        if self.value is not None:
            return self._severed
        both = zip(self._found, self.recorded, strict=False)
        return any(
            wanted and not (x.requires_grad and x.grad_fn is node) for (x, _, node), wanted in both
        )

    def sources(self) -> tuple[Tensor, ...]:
        """The logits, without a gradient where the original calls recorded none; () once gone."""
        logits = self.logits
        return tuple(
            x if wanted else x.detach() for x, wanted in zip(logits, self.recorded, strict=False)
        )

    def evaluate(self) -> Tensor:
        """torch's result, with the graph that torch's own call would have given it."""
        with self._lock:
            if self.value is None:
                self.check_unchanged()
                self._severed = self.severed()
                with temporarily_clear_interpreter_stack():  # a result is nobody's torch.func level
                    given = self.logits
                    if self.parts:
                        both = zip(self.parts, self.logits, strict=True)
                        given = tuple(part.unmodified(x) for part, x in both)
                    value = self._as_then(given)
                self._made = *_state(value), value.requires_grad
                self.value = value
                if not self.requires_grad:
                    # Nothing needs them any more. Threads may be reading: one attribute at a time.
                    self.logits, self._found, self.parts = (), [], ()
            return self.value

    def unmodified(self, logits: Tensor) -> Tensor:
        """The result as it was when it was computed, also if the user has changed it since."""
        value = self.evaluate()
        made = *_state(value), value.requires_grad
        return value if made == self._made else self.recompute((logits,))

    def recompute(self, logits: tuple[Tensor, ...]) -> Tensor:
        """The result from other tensors in place of the logits."""
        if self.parts:
            logits = tuple(p.recompute((x,)) for p, x in zip(self.parts, logits, strict=True))
        return self._as_then(logits)

    def _as_then(self, given: tuple[Tensor, ...]) -> Tensor:
        device, dtype, enabled = self.autocast
        with (
            _observed_as(self.hooks),
            torch.inference_mode(False),
            # Logits that have come to require a gradient since the call do not get one from it.
            torch.set_grad_enabled(self.requires_grad),
            torch.autocast(device, dtype=dtype, enabled=enabled),
        ):
            return self.compute(*given)

    def tensor(self) -> Tensor:
        """What the user gets."""
        if self.requires_grad:
            out: Deferred = _Recorded.apply(self, *self.sources())
            with _UNTOUCHED():
                out.node = out.grad_fn
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
    """The result of a Deferred, whose gradient goes to the Deferred and not to its logits.

    Where an autograd.Function of others returned it as its own output, that is its function's
    business now; where the logits have come off the graph since, only the Deferred still is on it.
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
    with _UNTOUCHED():  # C++ that reads the memory meets this in place of a null pointer
        storage = out.untyped_storage()._cdata
    torch._C._set_storage_data_ptr_access_error_msg(storage, _NO_MEMORY.format(plan.name))
    out.plan = plan
    return out


def plan_of(value: object) -> Plan | None:
    """The plan of a Deferred whose result nobody has seen, or None."""
    if type(value) is not Deferred or value.plan.value is not None or _adopted(value):
        return None
    return None if value.plan.severed() else value.plan


def _stands(value: Any) -> bool:
    """Whether a Deferred's own metadata are right: nobody has its result, who may change them."""
    if type(value) is not Deferred:
        return True
    return value.own is None and (value.plan.value is None or _adopted(value))


def _adopted(deferred: Deferred) -> bool:
    """Whether an autograd.Function of others has returned it, as its own output."""
    with _UNTOUCHED():
        required = deferred.plan.requires_grad
        return deferred.requires_grad is not required or (
            required and deferred.grad_fn is not deferred.node
        )


def under_later_hooks(*plans: Plan) -> bool:
    """Whether what is saved now passes hooks that were not in force at the calls.

    They may be a checkpoint's. Its recomputation would not fuse what its first run did, if a result
    has been asked for in between.
    """
    now = saving.hooks()
    return now is not None and any(plan.hooks != now for plan in plans)


def result(value: Any) -> Any:
    """torch's result in place of a Deferred; anything else as it is."""
    if type(value) is not Deferred:
        return value
    if not _adopted(value) and not value.plan.severed():
        return value.plan.evaluate()
    if value.own is None or torch._C._are_functorch_transforms_active():
        with torch.enable_grad():
            own: Tensor = _Value.apply(value)
        if torch._C._are_functorch_transforms_active():  # of one of their levels
            return own
        value.own = own
    return value.own


def _without_graph(value: Any) -> Any:
    return value.plan.evaluate().detach() if type(value) is Deferred else value


def _attribute(name: str) -> Any:
    return getattr(torch.Tensor, name).__get__


# What can be answered without the result. Once there is one, it is asked: `squeeze_` and others
# change what it says.
_METADATA = {
    torch.Tensor.dim,
    torch.Tensor.size,
    torch.Tensor.numel,
    torch.Tensor.nelement,
    torch.Tensor.element_size,
    torch.Tensor.is_floating_point,
    torch.Tensor.is_complex,
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
    node: Any = None  # its gradient function, where the plan has a graph
    own: Tensor | None = None  # the result with another graph than the plan's, see _Value

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.__hash__ or (
            func in _METADATA and _stands(args[0] if args else kwargs["input"])
        ):
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
