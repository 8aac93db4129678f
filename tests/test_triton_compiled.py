"""Every Triton kernel is compiled for a GPU that is not there, by the calls that launch it.

The interpreter takes what the compiler refuses: a name that changes its type in a loop, say.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles, which an interpreting process cannot", allow_module_level=True)

from bench_modules import capture

from fusedkl.kernels import backend as kernels

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
BF16, FP32 = torch.bfloat16, torch.float32
NO_TEMPERATURE = (None, None, None, None, None)
EVERYTHING = ["forward_kl", "reverse_kl", "entropy", "ref_entropy", "logsumexp", "ref_logsumexp"]
EVERYTHING += ["logprob", "ref_logprob", "log_ratio", "mean_logprob"]


def rows(dtype: torch.dtype = BF16, width: int = 1031) -> tuple[Tensor, Tensor]:
    return torch.zeros(2, width, dtype=dtype), torch.zeros(2, width, dtype=dtype)


def stats(
    fields: list[str], dtype: torch.dtype = BF16, width: int = 1031, *,
    alone: bool = False, parameter: float | None = None, softcap: float | None = None,
) -> None:  # fmt: skip
    """Forward, and backward to both."""
    x, y = rows(dtype, width)
    reference = None if alone else y
    tokens = any("logprob" in name or name == "log_ratio" for name in fields)
    ids = torch.zeros(2, 3, dtype=torch.int64) if tokens else None
    temperature = torch.ones(2, dtype=torch.float64)
    mask = torch.ones(2, dtype=torch.bool)
    controls = (parameter, temperature, mask, width - 5, softcap)
    values, state = kernels.row_stats(x, reference, ids, fields, *controls)
    grad = torch.ones(values.shape)
    kernels.row_stats_backward(
        grad, x, reference, ids, state, fields, parameter, temperature, width - 5, softcap, True,
        reference is not None,
    )  # fmt: skip


def slices() -> None:
    """What a vocabulary over processes needs."""
    x, y = rows()
    fields = ["forward_kl", "entropy", "mean_logprob"]
    _, state = kernels.row_stats(x, y, None, fields, *NO_TEMPERATURE)
    kernels.merge_states(torch.stack([state, state]), fields, None)
    kernels.merge_states(torch.stack([state, state]), ["entropy"], torch.ones(2).double())
    for field, parameter in (("jsd", 0.5), ("renyi", 2.0), ("tvd", None), ("hellinger", None)):
        kernels.row_sums(x, y, state, field, parameter, None, None, None, None)


def sparse() -> None:
    x, _ = rows()
    ids = torch.zeros(2, 3, dtype=torch.int64)
    values, state = kernels.topk_logprobs(x, ids, None, None)
    kernels.topk_logprobs_backward(torch.ones_like(values), x, ids, state, None)


def elements() -> None:
    for dtype in (BF16, FP32, torch.float64):
        x, grad = rows(dtype)
        out = kernels.log_softmax(x, dtype)
        kernels.log_softmax_backward(grad, out, dtype)
        kernels.scale_gradient_(grad, torch.ones(()))
    kernels.ordered_sum(torch.zeros(9), None)
    kernels.ordered_sum(torch.zeros(9), torch.ones(9))


CALLS: dict[str, Callable[[], None]] = {
    "everything": lambda: stats(EVERYTHING),
    "everything in float32": lambda: stats(EVERYTHING, FP32),
    "everything, capped": lambda: stats(EVERYTHING, softcap=30.0),
    "the policy's": lambda: stats(["entropy", "logprob", "mean_logprob"], alone=True),
    "logsumexp": lambda: stats(["logsumexp"], FP32, alone=True),
    "aligned": lambda: stats(["forward_kl", "reverse_kl"], width=4096),
    "jsd": lambda: stats(["jsd"], parameter=0.3, width=4096),
    "skew_kl": lambda: stats(["skew_kl"], FP32, parameter=0.3),
    "renyi": lambda: stats(["renyi"], parameter=0.3),
    "tvd": lambda: stats(["tvd"], softcap=30.0),
    "hellinger": lambda: stats(["hellinger"], FP32),
    "slices": slices,
    "sparse": sparse,
    "elements": elements,
}


# Of which every kernel is one's.
SAMPLE = ("everything", "the policy's", "jsd", "slices", "sparse", "elements")


def launched() -> set[str]:
    """The kernels of the folder, by the decorator that those have which a launcher calls."""
    pattern = r"^@unspecialised\ndef (\w+)"
    sources = (path.read_text() for path in KERNELS.glob("*.py"))
    return {name for text in sources for name in re.findall(pattern, text, flags=re.MULTILINE)}


@pytest.mark.slow
def test_every_kernel_compiles() -> None:
    torch.use_deterministic_algorithms(False)  # nothing runs: filling is for nobody
    compiled = set()
    for what in SAMPLE:
        with capture.capture("cuda:90") as launches:
            CALLS[what]()
        compiled |= {launch.name for launch in launches}
    assert compiled == launched()


# sm_90: above. What bench/static.py counts is compiled for these by tests/test_static.py as well.
TARGETS = ("cuda:80", "cuda:100", "hip:gfx942")
# What no call of the sample launches with these options, for one target each, in turn.
OTHERS = [
    (what, TARGETS[i % len(TARGETS)])
    for i, what in enumerate(name for name in CALLS if name not in SAMPLE)
]


@pytest.mark.full
@pytest.mark.parametrize(
    ("what", "target"), [*itertools.product(SAMPLE, TARGETS), *OTHERS], ids="-".join
)
def test_for_each_target(what: str, target: str) -> None:
    torch.use_deterministic_algorithms(False)
    with capture.capture(target):
        CALLS[what]()
