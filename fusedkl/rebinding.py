"""Where torch's functions are found and replaced: attributes, names in modules, and the rest."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import CellType, FrameType, FunctionType, ModuleType
from typing import Any

import torch
import torch.nn.functional

from .deferred import SPECIAL
from .deferred_kl import SMALLEST, softmax_of
from .kl_div import fuse_from, kl_div

_LOG_SOFTMAX, _SOFTMAX = torch.log_softmax, torch.softmax
_TENSOR_LOG_SOFTMAX, _TENSOR_SOFTMAX = torch.Tensor.log_softmax, torch.Tensor.softmax
_on = False

MISSING: Any = object()  # what an inherited attribute holds of its own


def enabled(on: bool) -> None:
    """Whether our functions, also those that some code kept, defer anything."""
    global _on
    _on = on
    fuse_from(SMALLEST if on else 0)


def _deferring(name: str, original: Any) -> Any:
    """`original`, or a deferred result where its arguments are (tensor, dim, dtype=None)."""

    def function(*args: Any, **kwargs: Any) -> Any:
        if _on and not torch.compiler.is_compiling() and _large(*args[:1]):
            found = _arguments(*args, **kwargs)
            deferred = None if found is None else softmax_of(name, *found)
            if deferred is not None:
                return deferred
        return original(*args, **kwargs)

    function.__name__ = function.__qualname__ = name
    function.__module__ = "torch"
    function.__doc__ = original.__doc__
    return function


def _same_code(function: Any) -> Any:
    """Another object, by which a name that was imported while patched is known for torch's."""
    code, names = function.__code__, function.__globals__
    copy = FunctionType(code, names, function.__name__, function.__defaults__)
    copy.__annotations__ = function.__annotations__
    copy.__module__ = "torch.nn.functional"
    SPECIAL[copy] = SPECIAL[function]
    return copy


def _large(x: Any = None) -> bool:
    return (
        (type(x) is torch.Tensor or type(x) is torch.nn.Parameter)
        # A tracer or a mode would record the look at the size.
        and torch._C._get_tracing_state() is None
        and torch._C._len_torch_function_stack() == 0
        and x.numel() >= SMALLEST
    )


def _arguments(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any] | None:
    if not 0 < len(args) < 4 or not kwargs.keys() <= {"dim", "dtype"}:
        return None
    given = dict(zip(("x", "dim", "dtype"), args, strict=False), **kwargs)
    dim = given.get("dim")
    return (args[0], dim, given.get("dtype")) if type(dim) is int else None


@dataclass(frozen=True, eq=False)
class Target:
    """An attribute that is replaced."""

    holder: Any
    attribute: str
    ours: Any

    @property
    def name(self) -> str:
        module = getattr(self.holder, "__module__", None)
        prefix = f"{module}." if module else ""
        return f"{prefix}{self.holder.__name__}.{self.attribute}"

    def get(self) -> Any:
        return vars(self.holder).get(self.attribute, MISSING)

    def set(self, value: Any) -> None:
        if value is MISSING:
            delattr(self.holder, self.attribute)
        else:
            setattr(self.holder, self.attribute, value)


TARGETS = (
    Target(torch.nn.functional, "kl_div", _same_code(kl_div)),
    Target(torch, "log_softmax", _deferring("log_softmax", _LOG_SOFTMAX)),
    Target(torch, "softmax", _deferring("softmax", _SOFTMAX)),
    Target(torch.Tensor, "log_softmax", _deferring("log_softmax", _TENSOR_LOG_SOFTMAX)),
    Target(torch.Tensor, "softmax", _deferring("softmax", _TENSOR_SOFTMAX)),
)

# (module, name, what it held) of every name that was rebound, and by which function of ours.
_rebound: list[tuple[ModuleType, str, Any, Any]] = []
_searched: set[int] = set()  # modules, since nothing was rebound
_ORIGINALS = {
    id(f): (f, target.ours)
    for f, target in zip(
        (torch.nn.functional.kl_div, _LOG_SOFTMAX, _SOFTMAX), TARGETS[:3], strict=True
    )
}


def names_of(values: set[int], but: set[int]) -> Iterator[tuple[ModuleType, str, Any]]:
    """(module, name, value) of globals whose value's id is one of these.

    Not of torch's modules, nor ours, nor those in `but` (ids), to which the others are added.
    """
    for module in list(sys.modules.values()):
        if id(module) in but or not isinstance(module, ModuleType):
            continue
        # past a lazy module's own lookup, which would import it
        names = ModuleType.__getattribute__(module, "__dict__")
        if _internal(names.get("__name__") or ""):
            continue
        but.add(id(module))
        if not values.isdisjoint(map(id, list(names.values()))):
            for name, value in list(names.items()):
                if id(value) in values:
                    yield module, name, value


def _internal(name: str) -> bool:
    return name.partition(".")[0] in ("torch", "fusedkl")


def rebind() -> None:
    """Put our functions in place of torch's in the globals of loaded modules."""
    for target in TARGETS[1:3]:  # to TorchScript, which cannot compile ours, they are torch's
        torch.jit._builtins._register_builtin(target.ours, f"aten::{target.attribute}")
    for module, name, value in names_of(set(_ORIGINALS), _searched):
        ours = _ORIGINALS[id(value)][1]
        setattr(module, name, ours)
        _rebound.append((module, name, value, ours))


def restore() -> None:
    """Undo `rebind`, also in modules that imported one of ours from torch since."""
    _searched.clear()
    while _rebound:
        module, name, value, ours = _rebound.pop()
        if vars(module).get(name) is ours:
            setattr(module, name, value)
    due = {id(t.ours): getattr(t.holder, t.attribute) for t in TARGETS[:3]}
    for module, name, value in names_of(set(due), set()):
        setattr(module, name, due[id(value)])


def rebound() -> list[str]:
    """The names that are rebound now, as module.name."""
    return sorted(f"{module.__name__}.{name}" for module, name, _, _ in _rebound)


def unreached() -> list[str]:
    """Holders of torch's functions that are not the globals of a module, in words."""
    modules = {id(vars(m)) for m in list(sys.modules.values()) if isinstance(m, ModuleType)}
    functions = [function for function, _ in _ORIGINALS.values()]
    # The heap is walked once for all of them, and again for the owners of what was found.
    held = [h for h in gc.get_referrers(*functions) if id(h) not in modules and h is not functions]
    cells = [h for h in held if isinstance(h, CellType)]
    contents = [h for h in held if isinstance(h, (dict, tuple, list, set))]
    owners = gc.get_referrers(*cells, *contents)
    closures = [o for o in owners if type(o) is tuple and any(c is x for c in cells for x in o)]
    owners += [*held, *gc.get_referrers(*closures)]
    described = (_described(owner, function) for owner in owners for function in functions)
    return sorted({words for words in described if words is not None})


def _described(owner: Any, function: Any) -> str | None:
    """Where `owner` holds the function; None if it does not, or is torch's or ours."""
    if isinstance(owner, FunctionType):
        module, name = owner.__module__, f"{owner.__qualname__}"
        kept = (*(owner.__defaults__ or ()), *(owner.__kwdefaults__ or {}).values())
        closed = any(_holds(cell, function) for cell in owner.__closure__ or ())
        place = "the closure of " if closed else "the defaults of "
        found = closed or any(value is function for value in kept)
    elif isinstance(owner, type):
        module, name, place = owner.__module__, owner.__qualname__, "the class "
        kept = tuple(getattr(v, "__func__", v) for v in vars(owner).values())
        found = any(value is function for value in kept)
    elif isinstance(owner, (ModuleType, staticmethod, FrameType, CellType)):
        return None
    else:
        module, name, place = (
            type(owner).__module__,
            type(owner).__qualname__,
            "an object of class ",
        )
        kept = (*getattr(owner, "__dict__", {}).values(), getattr(owner, "func", None))
        found = any(value is function for value in kept)
    if not found or module is None or _internal(module):
        return None
    return f"{name_of(function)} in {place}{name} ({module})"


def _holds(cell: CellType, function: Any) -> bool:
    try:
        return cell.cell_contents is function
    except ValueError:  # empty: a variable of the enclosing function that is not set yet
        return False


def name_of(function: Any) -> str:
    """module.name of a function, for messages."""
    if function is kl_div or function is TARGETS[0].ours:
        return "fusedkl.kl_div"
    for target in TARGETS[1:]:
        if function is target.ours:
            return f"fusedkl's deferred {target.attribute}"
    module, name = (getattr(function, key, None) for key in ("__module__", "__qualname__"))
    return f"{module}.{name}" if module and name else repr(function)


def keep_known_to_dynamo(function: Any) -> None:
    """torch.compile knows torch's functions by a table from name to object, made on first use.

    Made while an attribute is replaced, it lacks the original for good, whose warning (kl_div's,
    for "mean") is then traced into: a graph break, or an error under fullgraph=True. So this is
    called while the original is in place.
    """
    rules = sys.modules.get("torch._dynamo.trace_rules")
    table = getattr(rules, "get_torch_obj_rule_map", None)
    if table is not None and function is not MISSING and function not in table():
        getattr(table, "cache_clear", lambda: None)()
