"""`patch()` and `unpatch()`: untouched code runs fused, until it is undone.

What is replaced, for the whole process:

    torch.nn.functional.kl_div                by fusedkl.kl_div (an object of its own)
    softmax and log_softmax, of torch.Tensor  by functions that defer large ones (deferred.py);
        and of torch                          F.softmax, F.log_softmax and the modules call these

Names that loaded modules bound earlier, as `from torch import log_softmax` does, are rebound;
`Patch.unreached` lists what holds one of torch's functions out of reach. Importing fusedkl changes
nothing.
"""

from __future__ import annotations

import threading
import warnings
from types import TracebackType
from typing import Any

from . import rebinding
from .rebinding import MISSING, TARGETS, Target

__all__ = ["Patch", "patch", "unpatch"]


class _Activation:
    def __init__(self, owner: Patch) -> None:
        self.owner = owner
        self.found: dict[Target, Any] = {}  # what each attribute held


_LOCK = threading.RLock()
_ACTIVE: list[_Activation] = []  # oldest first


def _activate(owner: Patch) -> None:
    with _LOCK:
        activation = _Activation(owner)
        for target in TARGETS:
            activation.found[target] = found = target.get()
            if found is not target.ours:
                rebinding.keep_known_to_dynamo(found)
                target.set(target.ours)
        _ACTIVE.append(activation)
        rebinding.enabled(True)
        rebinding.rebind()


def _take_back(owner: Patch | None) -> bool:
    """End the latest activation, of `owner` if one is named; whether there was one."""
    kept = []
    with _LOCK:
        mine = [i for i, a in enumerate(_ACTIVE) if owner is None or a.owner is owner]
        if not mine:
            return False
        ended = _ACTIVE.pop(mine[-1])
        later = _ACTIVE[mine[-1]] if mine[-1] < len(_ACTIVE) else None
        for target, found in ended.found.items():
            if later is not None:
                # Out of order: what it found is for the next one to restore, unless that one
                # found something that another party had put there.
                if later.found[target] is target.ours:
                    later.found[target] = found
            elif target.get() is not target.ours:
                kept.append(target)
            else:
                target.set(found)
                if found is not target.ours:
                    rebinding.keep_known_to_dynamo(found)
        if not _ACTIVE:
            rebinding.enabled(False)
            rebinding.restore()
    for target in kept:
        warnings.warn(
            f"{target.name} was replaced by {rebinding.name_of(target.get())} while "
            "fusedkl.patch() was active; it is left as it is",
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

    @property
    def unreached(self) -> list[str]:
        """What holds one of torch's functions and cannot be rebound: closures, defaults, tables."""
        return rebinding.unreached() if self.active else []

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
        lines = [
            f"{target.name} = {rebinding.name_of(target.ours)}"
            + ("" if was is MISSING else f" (was {rebinding.name_of(was)})")
            for target, was in found[0].items()
        ]
        lines += [f"{name} rebound" for name in rebinding.rebound()]
        lines += [f"not reached: {holder}" for holder in self.unreached]
        return "<fusedkl.patch:\n  " + "\n  ".join(lines) + ">"


def patch() -> Patch:
    """Fuse F.kl_div of softmaxes in code that is not changed, until `unpatch()` or `with` ends.

        with fusedkl.patch():           fusedkl.patch()
            train()                     train()
                                        fusedkl.unpatch()

    F.kl_div(F.log_softmax(s, -1), F.softmax(t, -1), ...), with log_target=True as well, reads each
    logit once and stores no probability; with reduction="none", if .sum(-1) or .sum() follows. For
    that, softmaxes of 2**14 logits and more over the last dim are computed only when something
    else than kl_div uses their result, which then is torch's, with the grad mode and autocast state
    of the call. Logits that were changed in place before that use raise a RuntimeError.

    Patches nest and count: everything goes back to what it was when the last one ends, in whatever
    order they end and in whatever threads; the replacement is for the whole process. What another
    party replaced meanwhile stays, with a RuntimeWarning. docs/dropin.md says what is out of reach.

    Returns a handle: a context manager, `.active`, `.unreached`, and a repr that lists what is
    replaced and what could not be.
    Equivalent: `torch.nn.functional.kl_div = fusedkl.kl_div`, and the reverse; the values of
    kl_div are those of `fusedkl.forward_kl`, in torch's dtype.
    """
    return Patch()


def unpatch() -> bool:
    """Take back the most recent `patch()` still active; False, and nothing done, if none is."""
    return _take_back(None)
