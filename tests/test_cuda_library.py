"""The CUDA kernels compiled, without a GPU: no spills; the library links, loads and is small.

What their loops issue: test_static.py. And on which GPUs the backend is chosen.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_modules import cuda_library, nvcc

from fusedkl import cuda_library as loader
from fusedkl.backends import BACKENDS, resolve


@pytest.mark.full
def test_one_source_does_not_spill() -> None:
    """The one whose code test_static.py counts; the library's test asks it of all."""
    if nvcc.toolkit("bin/nvcc") is None:
        pytest.skip("no nvcc: install a toolkit, or the packages of `make cuda-tools`")
    _, log = nvcc.cubin("bf16", "90a")
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", log)
    assert len(frames) >= 6 and set(frames) == {("0", "0")}, log


@pytest.mark.full
@pytest.mark.skipif(torch.version.cuda is None, reason="this PyTorch has no CUDA")
def test_it_links_loads_is_small_and_does_not_spill(tmp_path: Path) -> None:
    content = cuda_library.recorded()
    if content is None:  # ten minutes of compiling
        if nvcc.toolkit("bin/nvcc", "include/cuda_runtime.h") is None:
            pytest.skip("no CUDA toolkit")
        content = cuda_library.facts(cuda_library.build(tmp_path))
    assert content["bytes"] <= cuda_library.MOST_BYTES, f"{content['bytes'] / 2**20:.1f} MiB"
    for_code = [f"sm_{target}" for target in nvcc.TARGETS]
    assert content["targets"] == {"machine code": for_code, "PTX": for_code[-1:]}
    assert len(content["kernels"]) == len(for_code) and min(content["kernels"].values()) > 90
    assert content["spilling"] == {}


def test_what_may_be_on_the_stack() -> None:
    stacks = {"forward_kernel": 8, "topk_sums_kernel": 200, "finish_kernel": 201, "fine": 0}
    assert cuda_library.spilling(stacks) == {"forward_kernel": 8, "finish_kernel": 201}


def test_the_page_shows_the_library_that_was_built() -> None:
    content = json.loads(cuda_library.RESULTS.read_text())
    assert cuda_library.section(content) in cuda_library.PAGE.read_text()
    assert content["bytes"] <= cuda_library.MOST_BYTES


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Compute capabilities of the GPUs that there are; the library is there and loads."""
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(loader, "_MISSING", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))

    def capability(device: torch.device) -> tuple[int, int]:
        assert not torch.compiler.is_dynamo_compiling()  # torch's own would become a node
        return found[device.index]

    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    return found


def test_a_gpu_without_code_is_not_taken(gpus: list[tuple[int, int]]) -> None:
    gpus += [(7, 5), (8, 0), (12, 0)]
    why_not = BACKENDS["cuda"].why_not
    old, *served = (torch.device("cuda", i) for i in range(3))
    assert "capability 7.5, and the kernels are compiled for 8.0 and later" in str(why_not(old))
    assert [why_not(device) for device in served] == [None, None]
    assert why_not(None) is None  # one GPU will do
    gpus.append((11, 0))  # newer than the oldest, and none that the kernels are compiled for
    assert "capability 11.0, for which" in str(why_not(torch.device("cuda", 3)))
    del gpus[1:]
    assert why_not(None) == why_not(old)
    gpus.clear()
    assert why_not(None) == "no GPU is visible"
    assert why_not(torch.device("cpu")) == "the tensors are on cpu"


def test_a_softcap_is_left_to_the_backend_that_is_fast(
    gpus: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus.append((9, 0))
    device = torch.device("cuda", 0)
    module = sys.modules["fusedkl.backends"]  # the package has a function of that name
    monkeypatch.setattr(module, "_TRITON_MISSING", None)
    assert resolve(None, device, ("bfloat16", "forward_kl")) == "cuda"
    assert resolve(None, device, ("bfloat16", "forward_kl", "softcap")) == "triton"
    assert resolve(None, device, ("float64", "softcap")) == "cuda"  # what there is
    assert resolve("cuda", device, ("bfloat16", "softcap")) == "cuda"
    monkeypatch.setattr(module, "_TRITON_MISSING", "planted")
    assert resolve(None, device, ("bfloat16", "softcap")) == "cuda"
    assert resolve(None, torch.device("cpu"), ("bfloat16", "softcap")) != "cuda"


def test_the_oldest_target_is_the_oldest_gpu() -> None:
    major, minor = loader._OLDEST
    assert min(int(target.rstrip("a")) for target in nvcc.TARGETS) == 10 * major + minor


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("capability", [(7, 5), (9, 0)])
def test_a_compiler_is_told_too(gpus: list[tuple[int, int]], capability: tuple[int, int]) -> None:
    gpus.append(capability)

    def function(x: torch.Tensor) -> torch.Tensor:
        return x + (loader.why_not(torch.device("cuda", 0)) is None)

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(())) == float(capability >= (8, 0))


@pytest.mark.slow
def test_importing_asks_no_gpu() -> None:
    """Asking one starts CUDA, after which a process cannot fork."""
    script = """
import torch
def asked(*_):
    raise AssertionError("a GPU was asked")
torch.cuda.get_device_capability = torch.cuda.get_device_properties = asked
torch.cuda.device_count = torch.cuda.is_available = torch.cuda._lazy_init = asked
import fusedkl
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
