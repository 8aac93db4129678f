"""The operator namespace and the compiled library behind it.

Schemas live in Python (`LIB`), kernels in `fusedkl/_C.abi3.so`, so that the package imports, and
its operators exist, on a machine that could not build or load the library.
"""

from __future__ import annotations

import importlib.machinery
from pathlib import Path

import torch

NAMESPACE = "fusedkl"
LIB = torch.library.Library(NAMESPACE, "DEF")

_INPUTS = "Tensor policy, Tensor? reference, Tensor? token_ids"
# A divergence's own number (beta, alpha); 1/T; logits that exist; c of c tanh(x/c).
_FIELDS = "str[] fields, float? parameter, Tensor? inv_temperature"
_CONTROLS = "int? valid_vocab, float? softcap"

# name -> (arguments without the backend's name, results). fusedkl::name takes the name of a backend
# last and is what graphs hold; fusedkl::_name, without it, is what the compiled library implements.
OPERATORS: dict[str, tuple[str, str]] = {
    "row_stats": (
        f"{_INPUTS}, {_FIELDS}, Tensor? mask, {_CONTROLS}",
        "(Tensor values, Tensor state)",
    ),
    "row_stats_backward": (
        f"Tensor grad, {_INPUTS}, Tensor state, {_FIELDS}, {_CONTROLS}, "
        "bool policy_grad, bool reference_grad",
        "(Tensor, Tensor)",
    ),
    "row_stats_backward_": (
        "Tensor grad, Tensor(a!) policy, Tensor? reference, Tensor? token_ids, Tensor state, "
        f"{_FIELDS}, {_CONTROLS}, bool reference_grad",
        "Tensor",
    ),
    "row_stats_with_gradient": (
        f"Tensor grad, Tensor policy, Tensor? reference, {_FIELDS}, Tensor? mask, {_CONTROLS}",
        "(Tensor values, Tensor state, Tensor policy_grad)",
    ),
    "row_sums": (
        "Tensor policy, Tensor reference, Tensor state, str field, float? parameter, "
        f"Tensor? inv_temperature, Tensor? mask, {_CONTROLS}",
        "Tensor",
    ),
    "merge_states": (
        "Tensor parts, str[] fields, Tensor? inv_temperature",
        "(Tensor values, Tensor state)",
    ),
    "scale_gradient_": ("Tensor(a!) gradient, Tensor factor", "()"),
    "log_softmax": ("Tensor logits, ScalarType dtype", "Tensor"),
    "log_softmax_backward": ("Tensor grad, Tensor output, ScalarType dtype", "Tensor"),
    "ordered_sum": ("Tensor values, Tensor? weight", "Tensor"),
}

# needs_exact_strides: torch.compile hands over the strides the caller had (a copy of a slice of
# logits would be the largest tensor of the step).
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

for _name, (_arguments, _results) in OPERATORS.items():
    LIB.define(f"{_name}({_arguments}, str backend) -> {_results}", tags=TAGS)
    LIB.define(f"_{_name}({_arguments}) -> {_results}", tags=TAGS)


# The instruction set that the compiled library chose for this machine.
LIB.define("_cpu_isa() -> str")


def find(name: str) -> Path | None:
    """The compiled library of this name, `_C` or `_C_cuda`, or None where it was not built."""
    folder = Path(__file__).resolve().parent
    # The wheel's name is _C.abi3.so; a free-threaded interpreter builds _C.cpython-*.so.
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        candidate = folder / f"{name}{suffix}"
        if candidate.is_file():
            return candidate
    return None


def load(found: Path | None) -> str | None:
    """None once the library is loaded, else the reason in words."""
    if found is None:
        return (
            "the compiled library fusedkl/_C is not there: this is a pure Python install, or the "
            "source folder of one that was never built (pip install -e . --no-build-isolation)"
        )
    try:
        # Runs the library's static initialisers, which register kernels and do nothing else.
        torch.ops.load_library(str(found))
    except OSError as error:
        return f"the compiled library {found.name} did not load: {error}"
    return None


_PATH = find("_C")
_WHY_NOT = load(_PATH)


def path() -> Path | None:
    """The compiled library's file, or None where there is none."""
    return _PATH


def why_not() -> str | None:
    """None if the compiled library is loaded, else the reason in words."""
    return _WHY_NOT


def has_kernel(name: str, dispatch_key: str) -> bool:
    """Whether operator `fusedkl::name` has a kernel for this dispatch key."""
    has: bool = torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", dispatch_key)
    return has
