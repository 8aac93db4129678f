"""enable() and disable(): the pass in torch._inductor's configuration, beside those of others."""

from __future__ import annotations

import threading
from types import TracebackType

__all__ = ["Enabled", "disable", "enable"]

_LOCK = threading.RLock()
_ACTIVE: list[Enabled] = []


def enabled() -> bool:
    """Whether an `enable()` has not ended."""
    return bool(_ACTIVE)


def _installed() -> bool:
    import torch._inductor.config as config

    from .passes import is_ours

    found = config.pre_grad_custom_pass
    return any(map(is_ours, found)) if isinstance(found, (list, tuple)) else is_ours(found)


def _install() -> None:
    import torch._inductor.config as config

    from .passes import combined

    config.pre_grad_custom_pass = combined(config.pre_grad_custom_pass)


def _remove() -> None:
    import torch._inductor.config as config

    from .passes import is_ours

    found = config.pre_grad_custom_pass
    if is_ours(found):
        config.pre_grad_custom_pass = found.before


class Enabled:
    """What `enable()` returns: a context manager that ends it."""

    def __init__(self) -> None:
        with _LOCK:
            if not _installed():
                _install()
            _ACTIVE.append(self)

    @property
    def active(self) -> bool:
        """Whether this one has not ended and the configuration still has the pass."""
        return self._counts() and _installed()

    def _counts(self) -> bool:
        return any(other is self for other in _ACTIVE)

    def end(self) -> None:
        """Take it back; the pass goes with the last one. A second call does nothing."""
        with _LOCK:
            if self._counts():
                _ACTIVE[:] = [other for other in _ACTIVE if other is not self]
                if not _ACTIVE:
                    _remove()

    def __enter__(self) -> Enabled:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end()


def enable() -> Enabled:
    """Let torch.compile (backend "inductor") replace written-out KL divergences by fused calls.

    A sum over the vocabulary of q (log q - log p), by F.kl_div or by hand, is computed from the
    logits by fusedkl, forward and backward, and no [tokens, V] temporary is made for it. It holds
    for what is compiled from now on: call it before the first run of a compiled function, or
    torch.compiler.reset() after it. Another pre_grad_custom_pass that is set keeps running, before
    this one; if somebody set the configuration without ours meanwhile, a further call puts it there
    again. Counts: it ends when every `Enabled` has ended, or by `disable()`.

    Equivalent: the uncompiled code; values and gradients within the accuracy of `forward_kl`.
    """
    return Enabled()


def disable() -> bool:
    """End the latest `enable()`; False if there is none."""
    with _LOCK:
        if not _ACTIVE:
            return False
        _ACTIVE[-1].end()
        return True
