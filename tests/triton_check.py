"""The Triton kernels of a folder against plain torch, for test_triton_faults.py: exits 1 if wrong.

TRITON_INTERPRET=1 python triton_check.py all FOLDER
python -m ttsem.sanitize triton_check.py -- all FOLDER     under a sanitizer of Triton's own code

`all` launches every kernel; `some` is two short rows of one divergence with their gradients.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from pathlib import Path
from typing import Any

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


def check_others(kernels: Any) -> bool:
    """One row alone with its tokens, slices merged, and what is not about rows."""
    x, y = rows(700, torch.float32)
    ids = torch.tensor([[3, 699, -1], [0, 3, 3]])
    fields = ["logprob", "entropy"]
    values, state = kernels.row_stats(x, None, ids, fields, *NONE)
    true, own = reference_backend.row_stats(x.double(), None, ids, fields, *NONE)
    grad = torch.ones(4, 2)
    common = (fields, None, None, None, None, True, False)
    found, _ = kernels.row_stats_backward(grad, x, None, ids, state, *common)
    wanted, _ = reference_backend.row_stats_backward(
        grad.double(), x.double(), None, ids, own, *common
    )
    whole, _ = reference_backend.row_stats(x.double(), y.double(), None, ["forward_kl"], *NONE)
    cut = [(x[:, :300], y[:, :300]), (x[:, 300:], y[:, 300:])]
    parts = [kernels.row_stats(a, b, None, ["forward_kl"], *NONE)[1] for a, b in cut]
    merged, _ = kernels.merge_states(torch.stack(parts), ["forward_kl"], None)
    logs = kernels.log_softmax(x, torch.float32)
    exact = torch.log_softmax(x.double(), -1)
    back = kernels.log_softmax_backward(y, logs, torch.float32)
    scaled = y.clone()
    kernels.scale_gradient_(scaled, torch.tensor(3.0))
    errors = [
        relative(values.T, true.T),
        relative(found, wanted),
        relative(merged, whole),
        relative(logs, exact),
        relative(back, y - exact.exp() * y.sum(-1, keepdim=True)),
        relative(kernels.ordered_sum(y[0].contiguous(), None)[None], y[0].double().sum()[None]),
        relative(scaled, 3 * y),
    ]
    ok = max(errors) <= 1e-5
    print(f"the others: {errors} {'ok' if ok else 'WRONG'}", flush=True)
    return ok


def main() -> None:
    scope, folder = sys.argv[-2], Path(sys.argv[-1])
    warnings.simplefilter("ignore")
    if os.environ.get("TRITON_INTERPRET") == "1":
        import triton_interpreter

        triton_interpreter.mend()
    sys.path.insert(0, str(folder.parent))
    kernels = importlib.import_module(f"{folder.name}.backend")
    torch.manual_seed(0)
    both = ["forward_kl", "reverse_kl"]
    if scope == "some":
        results = [check(kernels, *rows(600, torch.bfloat16), ["forward_kl"])]
    else:
        results = [
            check(kernels, *rows(1031, torch.float32, 20.0), [*both, "entropy"]),
            check(kernels, *rows(3000, torch.bfloat16, 20.0), ["forward_kl"]),
            check(kernels, *rows(33000, torch.bfloat16), both),  # two segments
            check_others(kernels),
        ]
    if not all(results):
        sys.exit(1)


if __name__ == "__main__":
    main()
