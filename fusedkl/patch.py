"""`patch()` and `unpatch()`: torch.nn.functional.kl_div replaced by fusedkl.kl_div, and put back.

Only the attribute is replaced, which reaches `F.kl_div(...)`, `nn.KLDivLoss` and compiled code in
every thread, and not names bound earlier by `from torch.nn.functional import kl_div`. Importing
fusedkl changes nothing.
"""

from __future__ import annotations

import sys
import threading
import warnings
from types import TracebackType
from typing import Any

import torch.nn.functional

from .kl_div import kl_div

__all__ = ["Patch", "patch", "unpatch"]

_ATTRIBUTE = "torch.nn.functional.kl_div"


class _Activation:
    def __init__(self, owner: Patch, found: Any) -> None:
        self.owner = owner
        self.found = found  # what the attribute held


_LOCK = threading.RLock()
_ACTIVE: list[_Activation] = []  # oldest first


def _name(function: Any) -> str:
    if function is kl_div:
        return "fusedkl.kl_div"
    module, name = (getattr(function, key, None) for key in ("__module__", "__qualname__"))
    return f"{module}.{name}" if module and name else repr(function)


def _keep_known_to_dynamo(function: Any) -> None:
    """torch.compile knows torch's functions by a table from name to object, made on first use.

    Made while the attribute is replaced, it lacks the original for good, whose warning for "mean"
    is then traced into: a graph break, or an error under fullgraph=True. So this is called while
    the original is in place.
    """
    rules = sys.modules.get("torch._dynamo.trace_rules")
    table = getattr(rules, "get_torch_obj_rule_map", None)
    if table is not None and function not in table():
        getattr(table, "cache_clear", lambda: None)()


def _activate(owner: Patch) -> None:
    with _LOCK:
        found = torch.nn.functional.kl_div
        if found is not kl_div:
            _keep_known_to_dynamo(found)
        _ACTIVE.append(_Activation(owner, found))
        torch.nn.functional.kl_div = kl_div


def _take_back(owner: Patch | None) -> bool:
    """End the latest activation, of `owner` if one is named; whether there was one."""
    with _LOCK:
        mine = [i for i, a in enumerate(_ACTIVE) if owner is None or a.owner is owner]
        if not mine:
            return False
        ended = _ACTIVE.pop(mine[-1])
        if mine[-1] < len(_ACTIVE):
            # Out of order: what it found is for the next one to restore, unless that one found
            # something that another party had put there.
            later = _ACTIVE[mine[-1]]
            if later.found is kl_div:
                later.found = ended.found
            return True
        current = torch.nn.functional.kl_div
        if current is kl_div:
            torch.nn.functional.kl_div = ended.found
            if ended.found is not kl_div:
                _keep_known_to_dynamo(ended.found)
            return True
    warnings.warn(
        f"{_ATTRIBUTE} was replaced by {_name(current)} while fusedkl.patch() was active; "
        "it is left as it is",
        RuntimeWarning,
        stacklevel=3,
    )
    return True


class Patch:
    """What `patch()` returns: a context manager whose repr says what is replaced."""

    def __init__(self) -> None:
        self._unentered = True  # `with patch():` adopts the activation that the call made
        _activate(self)

    @property
    def active(self) -> bool:
        """Whether this patch is still in force."""
        with _LOCK:
            return any(activation.owner is self for activation in _ACTIVE)

    def __enter__(self) -> Patch:
        if self._unentered and self.active:
            self._unentered = False
        else:
            _activate(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _take_back(self)

    def __repr__(self) -> str:
        with _LOCK:
            found = [activation.found for activation in _ACTIVE if activation.owner is self]
        if not found:
            return "<fusedkl.patch: not active, nothing replaced>"
        return f"<fusedkl.patch: {_ATTRIBUTE} = fusedkl.kl_div (was {_name(found[0])})>"


def patch() -> Patch:
    """Replace torch.nn.functional.kl_div by fusedkl.kl_div, until `unpatch()` or the end of `with`.

        with fusedkl.patch():           fusedkl.patch()
            train()                     train()
                                        fusedkl.unpatch()

    Patches nest and count: the attribute goes back to what it was when the last one ends, in
    whatever order they end and in whatever threads; the replacement is for the whole process. If
    another party replaced the attribute meanwhile, its function stays, with a RuntimeWarning.

    Returns a handle: a context manager, `.active`, and a repr that lists what is replaced.
    Equivalent: `torch.nn.functional.kl_div = fusedkl.kl_div`, and the reverse.
    """
    return Patch()


def unpatch() -> bool:
    """Take back the most recent `patch()` still active; False, and nothing done, if none is."""
    return _take_back(None)
