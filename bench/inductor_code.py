"""The Triton kernel that torch.compile would run for the two-line KL on a GPU that is not there.

Traced on fake CUDA tensors, lowered and written out by Inductor as for an H100, then compiled for
the architecture asked for with the launch that Inductor's heuristics choose. This leans on private
interfaces of torch; it was written for 2.11 to 2.14 and is used by bench/static.py alone.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import capture
import torch
import torch.nn.functional as F
from torch import Tensor

SHAPE = (4096, 128256)


class _Device(SimpleNamespace):
    """An H100's properties as torch.cuda tells them, but for its architecture."""

    def __init__(self, architecture: int) -> None:
        super().__init__(
            name="NVIDIA H100 80GB HBM3",
            major=architecture // 10,
            minor=architecture % 10,
            multi_processor_count=132,
            warp_size=32,
            total_memory=85 * 10**9,
            max_threads_per_multi_processor=2048,
            max_threads_per_block=1024,
            regs_per_multiprocessor=65536,
            shared_memory_per_block=49152,
            shared_memory_per_block_optin=232448,
            shared_memory_per_multiprocessor=233472,
            L2_cache_size=50 * 2**20,
            gcnArchName="",
        )


@contextlib.contextmanager
def _as_if(device: _Device) -> Iterator[None]:
    """torch and Triton believe that this device is there."""
    import torch._dynamo.device_interface as interfaces
    import torch._inductor.runtime.triton_helpers as helpers
    from triton.runtime import driver

    capability = (device.major, device.minor)
    cuda: Any = interfaces.CudaInterface
    answers: list[tuple[Any, str, Any]] = [
        (torch.cuda, "get_device_properties", device),
        (torch.cuda, "get_device_capability", capability),
        (torch.cuda, "current_device", 0),
        (torch.cuda, "device_count", 1),
        (cuda, "is_available", True),
        (cuda, "current_device", 0),
        (cuda, "device_count", 1),
        (cuda, "get_compute_capability", 10 * device.major + device.minor),
        (cuda, "is_triton_capable", True),
        (cuda, "raise_if_triton_unavailable", None),
        (cuda, "get_device_properties", device),
        (cuda.Worker, "get_device_properties", device),
        (cuda.Worker, "current_device", 0),
        (helpers, "set_driver_to_gpu", None),
    ]
    before = getattr(driver, "_active", None)
    driver.set_active(capture.StandIn(f"cuda:{10 * device.major + device.minor}"))
    with contextlib.ExitStack() as stack:
        for owner, name, answer in answers:
            function: Any = lambda *_, answer=answer, **__: answer  # noqa: E731
            given = function if owner in (torch.cuda, helpers) else staticmethod(function)
            stack.enter_context(mock.patch.object(owner, name, given))
        try:
            yield
        finally:
            driver._active = before


def _kl(policy: Tensor, reference: Tensor) -> Tensor:
    log_p, log_q = F.log_softmax(policy.float(), -1), F.log_softmax(reference.float(), -1)
    return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)


def _source(device: _Device) -> str:
    """The module that Inductor writes."""
    import torch._inductor.config as config
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes
    from torch._inductor.fx_passes.post_grad import post_grad_passes
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    # constant folding would touch the device
    options: dict[str, Any] = {
        "compile_threads": 1,
        "force_disable_caches": True,
        "joint_graph_constant_folding": False,
    }
    with _as_if(device), config.patch(options):
        with FakeTensorMode() as fake:
            inputs = [torch.empty(SHAPE, dtype=torch.bfloat16, device="cuda:0") for _ in range(2)]
            traced = make_fx(_kl, decomposition_table=select_decomp_table())(*inputs)
        with V.set_fake_mode(fake), fake:
            graph: Any = joint_graph_passes(traced)  # where softmax becomes an online one
            post_grad_passes(graph, is_inference=True)
        lowering = GraphLowering(graph, example_inputs=inputs)
        with (
            V.set_debug_handler(DebugContext()),
            V.set_graph_handler(lowering),
            V.set_fake_mode(fake),
        ):
            lowering.run(*inputs)
            out: Any = lowering.codegen()
    first = out[0] if isinstance(out, tuple) else out
    return str(getattr(first, "value", first))


@functools.cache
def kl_kernel(architecture: int) -> bytes:
    """The cubin of the one kernel of that module."""
    import triton
    from triton.compiler import ASTSource

    device = _Device(architecture)
    kernels = re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", _source(device), re.S)
    ((name, text),) = kernels
    with tempfile.TemporaryDirectory() as folder, _as_if(device):
        path = Path(folder) / f"{name}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        tuner = getattr(module, name)
        function, meta, config = tuner.fn, tuner.triton_meta, tuner.configs[0]
        given = {**meta.get("constants", {}), **config.kwargs}
        constants = {k: v for k, v in given.items() if k in function.arg_names}
        signature = {
            k: "constexpr" if k in constants else v for k, v in meta["signature"].items()
        } | {k: "constexpr" for k in constants}
        attributes = {key: value for known in meta["configs"] for key, value in dict(known).items()}
        source = ASTSource(function, signature, constants, attributes)
        launch = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        target = capture.target(f"cuda:{architecture}")
        compiled: bytes = triton.compile(source, target=target, options=launch).asm["cubin"]
    return compiled
