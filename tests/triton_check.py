"""The Triton kernels of a folder against plain torch, for test_triton_faults.py: exits 1 if wrong.

TRITON_INTERPRET=1 python triton_check.py FOLDER
python -m ttsem.sanitize triton_check.py -- FOLDER     under a sanitizer of Triton's own code
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor

from fusedkl import reference_backend

NONE = (None, None, None, None, None)


def rows(width: int, dtype: torch.dtype, slope: float = 0.0) -> tuple[Tensor, Tensor]:
    """Two rows each, as long as their memory; with a slope, later tokens weigh more."""
    base = torch.randn(2, width) + slope * torch.arange(width) / width
    return base.to(dtype), (base + 0.3 * torch.randn(2, width)).to(dtype)


def relative(found: Tensor, wanted: Tensor) -> float:
    a, b = found.double(), wanted.double()
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).nan_to_num(1e9).max())


def check(kernels: object, x: Tensor, y: Tensor, fields: list[str]) -> bool:
    values, state = kernels.row_stats(x, y, None, fields, *NONE)  # type: ignore[attr-defined]
    true, own = reference_backend.row_stats(x.double(), y.double(), None, fields, *NONE)
    grad = torch.ones(len(fields), x.shape[0])
    common = (fields, None, None, None, None, True, True)
    found = kernels.row_stats_backward(grad, x, y, None, state, *common)  # type: ignore[attr-defined]
    wanted = reference_backend.row_stats_backward(
        grad.double(), x.double(), y.double(), None, own, *common
    )
    errors = [
        relative(values[:, None], true[:, None]),
        *(relative(a, b) for a, b in zip(found, wanted, strict=True)),
    ]
    ok = errors[0] <= 1e-5 and max(errors[1:]) <= (1e-5 if x.dtype == torch.float32 else 4e-3)
    print(f"{x.dtype} {list(x.shape)} {fields}: {errors} {'ok' if ok else 'WRONG'}", flush=True)
    return ok


def main() -> None:
    folder = Path(sys.argv[-1])
    warnings.simplefilter("ignore")
    if os.environ.get("TRITON_INTERPRET") == "1":
        import triton_interpreter

        triton_interpreter.mend()
    sys.path.insert(0, str(folder.parent))
    kernels = importlib.import_module(f"{folder.name}.backend")
    torch.manual_seed(0)
    both = ["forward_kl", "reverse_kl"]
    results = [
        check(kernels, *rows(1031, torch.float32, 20.0), [*both, "entropy"]),
        check(kernels, *rows(3000, torch.bfloat16, 20.0), ["forward_kl"]),
        check(kernels, *rows(33000, torch.bfloat16), both),  # two segments
    ]
    if not all(results):
        sys.exit(1)


if __name__ == "__main__":
    main()
