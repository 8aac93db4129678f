"""The compiled CUDA kernels, a library of their own that a PyTorch without CUDA never loads."""

from __future__ import annotations

import torch

from . import _library
from ._library import OPERATORS


def _load() -> str | None:
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    found = _library.find("_C_cuda")
    if found is None:
        return (
            "the compiled library fusedkl/_C_cuda is not there: it is built where a GPU and nvcc "
            "are found, or with FUSEDKL_BUILD_CUDA=1"
        )
    reason = _library.load(found)
    if reason is not None:
        return reason
    absent = [name for name in OPERATORS if not _library.has_kernel(f"_{name}", "CUDA")]
    return f"the compiled library has no CUDA kernel for {', '.join(absent)}" if absent else None


# Asked once: the choice of a backend is traced by torch.compile, loading a library is not.
_MISSING = _load()


# Of sm_80, sm_90a, sm_100 and sm_120 (setup.py), and of nothing older.
_OLDEST = (8, 0)
_WITHOUT_CODE = 11  # between two of them


def _no_code_for(device: torch.device) -> str | None:
    found = torch.cuda.get_device_capability(device)
    own, least = (".".join(map(str, number)) for number in (found, _OLDEST))
    if found[0] == _WITHOUT_CODE:
        return f"the GPU has compute capability {own}, for which the library has no kernels"
    if found >= _OLDEST:
        return None
    return (
        f"the GPU has compute capability {own}, and the kernels are compiled for {least} and later"
    )


# Of the device alone: a compiler takes what it says, and puts no call into the graph. As in
# shard_agreement.py.
_no_code_for._dynamo_marked_constant = True  # type: ignore[attr-defined]


def why_not(device: torch.device | None) -> str | None:
    """None if the CUDA kernels can be used (on this device), else the reason in words."""
    if _MISSING is not None:
        return _MISSING
    if device is None:
        count = torch.cuda.device_count()
        reasons = [_no_code_for(torch.device("cuda", i)) for i in range(count)]
        return None if None in reasons else next(iter(reasons), "no GPU is visible")
    return _no_code_for(device) if device.type == "cuda" else f"the tensors are on {device.type}"
