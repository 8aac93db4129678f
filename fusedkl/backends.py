"""Which code computes: the ordered backends, why one can or cannot be used, and the choice."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from . import _library, cuda_library, divergences, reference_backend
from ._library import OPERATORS

ENVIRONMENT = "FUSEDKL_BACKEND"


@dataclass(frozen=True)
class Backend:
    """A set of kernels with the operators' signatures, and the conditions for their use."""

    name: str
    summary: str
    why_not: Callable[[torch.device | None], str | None]  # None: usable; no device: on any device
    kernels: Any
    takes: frozenset[str] | None = None  # dtypes, fields, "softcap"; None: all there are
    slowly: frozenset[str] = frozenset()  # of what it takes, what another does better
    gradient_ahead: bool = False  # whether one visit to a row gives both, see scalar_loss.py


def _cpu_missing() -> str | None:
    absent = [name for name in OPERATORS if not _library.has_kernel(f"_{name}", "CPU")]
    if _library.why_not() is None and absent:
        return f"the compiled library has no CPU kernel for {', '.join(absent)}"
    return _library.why_not()


# Asked once: the choice below is traced by torch.compile, the dispatcher's tables are not.
_CPU_MISSING = _cpu_missing()


def _cpu_why_not(device: torch.device | None) -> str | None:
    if _CPU_MISSING is None and device is not None and device.type != "cpu":
        return f"the tensors are on {device.type}"
    return _CPU_MISSING


_TRITON_TAKES = frozenset((*divergences.FIELDS, "softcap", "float32", "bfloat16", "float16"))


class _Triton:
    """fusedkl.kernels.backend, imported when it is first used: it imports triton."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module("fusedkl.kernels.backend"), name)


# The two environments in which a Triton kernel can run; neither changes while a process lives.
_TRITON_MISSING = None if importlib.util.find_spec("triton") else "the package triton is not there"
_TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _triton_why_not(device: torch.device | None) -> str | None:
    if _TRITON_MISSING is not None or device is None or device.type in ("cuda", "xpu"):
        return _TRITON_MISSING
    if device.type == "cpu" and _TRITON_INTERPRETED:
        return None
    return f"the tensors are on {device.type}"


def _reference_why_not(device: torch.device | None) -> str | None:
    return None


# The library's operators, fusedkl::_row_stats and so on, behind torch's own dispatcher.
_COMPILED = SimpleNamespace(
    **{name: getattr(torch.ops.fusedkl, f"_{name}").default for name in OPERATORS}
)

# Best first; the first usable one that is not slow at it is taken. The order among those of a GPU
# is static: derived from counts of instructions (docs/gpu.md), until somebody measures.
BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(
            "cpu",
            "compiled C++ kernels, one pass over memory",
            _cpu_why_not,
            _COMPILED,
            gradient_ahead=True,
        ),
        Backend(
            "cuda",
            "CUDA C++ kernels, one pass over memory",
            cuda_library.why_not,
            _COMPILED,
            slowly=frozenset({"softcap"}),  # in double, a block for each row
            gradient_ahead=True,
        ),
        Backend(
            "triton",
            "Triton kernels, one pass over memory",
            _triton_why_not,
            _Triton(),
            takes=_TRITON_TAKES,
        ),
        Backend("reference", "plain torch in float64", _reference_why_not, reference_backend),
    )
}


def kernels(name: str) -> Any:
    """The kernels of the backend called `name`."""
    return BACKENDS[name].kernels


# What needs() says of dtypes that there are kernels for.
_DTYPES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float64: "float64",
}


def needs(*wanted: Tensor | str | None, softcap: float | None = None) -> tuple[str, ...]:
    """The dtypes of some logits, fields, and "softcap", as `resolve` takes them."""
    found = []
    for each in wanted:
        if isinstance(each, Tensor):
            found.append(_DTYPES.get(each.dtype) or str(each.dtype).removeprefix("torch."))
        elif each is not None:
            found.append(each)
    if softcap is not None:
        found.append("softcap")
    return tuple(found)


def _unusable(
    candidate: Backend, device: torch.device | None, wanted: tuple[str, ...]
) -> str | None:
    reason = candidate.why_not(device)
    if reason is None and candidate.takes is not None:
        lacking = [name for name in wanted if name not in candidate.takes]
        return f"it has no kernels for {lacking[0]}" if lacking else None
    return reason


def _unknown(source: str, name: str) -> ValueError:
    return ValueError(f"{source} must be one of {', '.join(BACKENDS)}; got {name!r}")


def from_environment() -> str | None:
    """The backend that FUSEDKL_BACKEND names; ValueError if it names none there is."""
    name = os.environ.get(ENVIRONMENT) or None
    if name is not None and name not in BACKENDS:
        raise _unknown(ENVIRONMENT, name)
    return name


def resolve(backend: str | None, device: torch.device, wanted: tuple[str, ...] = ()) -> str:
    """The name of the backend to run what `needs` says: the one asked for, or the first usable.

    An explicit name, by argument or by FUSEDKL_BACKEND, never falls back: if it cannot be used,
    that is a ValueError with the reason.
    """
    source = "backend"
    if backend is None:
        backend = from_environment()
        source = ENVIRONMENT
    if backend is None:
        slow = None
        for name, candidate in BACKENDS.items():
            if _unusable(candidate, device, wanted) is not None:
                continue
            if slow is not None and name == "reference":  # which is slower still
                break
            if not candidate.slowly or not any(need in candidate.slowly for need in wanted):
                return name
            slow = slow or name
        assert slow is not None  # the reference takes everything
        return slow
    if not isinstance(backend, str):
        raise TypeError(f"backend must be a string or None, got {type(backend).__name__}")
    if backend not in BACKENDS:
        raise _unknown("backend", backend)
    reason = _unusable(BACKENDS[backend], device, wanted)
    if reason is not None:
        raise ValueError(f"{source}={backend!r} cannot be used: {reason}")
    return backend


def _instruction_set() -> str | None:
    if _library.why_not() is not None or not hasattr(torch.ops.fusedkl, "_cpu_isa"):
        return None
    try:
        isa: str = torch.ops.fusedkl._cpu_isa()
    except RuntimeError:  # FUSEDKL_CPU_ISA names one that is not there; a call will say so
        return f"unusable: FUSEDKL_CPU_ISA={os.environ.get('FUSEDKL_CPU_ISA')}"
    return isa


@dataclass(frozen=True)
class BackendStatus:
    """One line of `backends()`."""

    name: str
    available: bool
    reason: str  # why not, or what it is

    def __str__(self) -> str:
        return f"{self.name:<10} {'yes' if self.available else 'no':<4} {self.reason}"


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; print it."""

    subject: str
    chosen: str | None
    why: str
    backends: tuple[BackendStatus, ...]

    def __str__(self) -> str:
        head = f"{self.subject}: {self.chosen or 'no backend'} ({self.why})"
        return "\n".join([head, *(f"  {status}" for status in self.backends)])


def _status(device: torch.device | None, wanted: tuple[str, ...] = ()) -> tuple[BackendStatus, ...]:
    found = []
    for backend in BACKENDS.values():
        reason = _unusable(backend, device, wanted)
        text = reason
        if text is None:
            isa = _instruction_set() if backend.name == "cpu" else None
            text = backend.summary + (f" ({isa})" if isa else "")
        found.append(BackendStatus(backend.name, reason is None, text))
    return tuple(found)


def backends() -> tuple[BackendStatus, ...]:
    """All backends, best first, with whether they can be used in this process and why not.

    Returns a tuple of `BackendStatus(name, available, reason)`; print one to read it.
    """
    return _status(None)


def explain(
    policy_logits: Tensor | None = None,
    reference_logits: Tensor | None = None,
    *,
    softcap: float | None = None,
    backend: str | None = None,
) -> Explanation:
    """Tell which backend runs for these tensors (CPU tensors, if none are given), and why.

    A `softcap` changes the choice where a backend has no kernels for it, or slow ones.

    Returns an `Explanation` with `chosen`, `why` and one `BackendStatus` per backend; print it.
    Never raises for a backend that cannot be used: the reason is in `why`.
    """
    given = [t for t in (policy_logits, reference_logits) if t is not None]
    for name, t in (("policy_logits", policy_logits), ("reference_logits", reference_logits)):
        if t is not None and not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    device = given[0].device if given else torch.device("cpu")
    subject = " and ".join(f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in given)
    wanted = needs(*given, softcap=softcap)
    forced = os.environ.get(ENVIRONMENT)
    try:
        chosen: str | None = resolve(backend, device, wanted)
        why = "the first that can be used"
        if backend is not None:
            why = "asked for by backend="
        elif forced:
            why = f"asked for by {ENVIRONMENT}"
    except ValueError as error:
        chosen, why = None, str(error)
    return Explanation(
        f"{subject or 'any tensors'} on {device}", chosen, why, _status(device, wanted)
    )
