"""Compiles what a launcher launches, for a GPU that is not there.

Inside `capture("cuda:90")` every Triton launch is compiled for that target and recorded, and nothing
runs: tensors on the CPU go through the real launcher, its choice of sizes and Triton's own
specialisation of arguments. Not usable where TRITON_INTERPRET=1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch


def target(name: str) -> Any:
    """Triton's description of "cuda:90" or "hip:gfx942"."""
    from triton.backends.compiler import GPUTarget

    kind, architecture = name.split(":")
    if kind == "cuda":
        return GPUTarget(kind, int(architecture), 32)
    return GPUTarget(kind, architecture, 64 if architecture.startswith("gfx9") else 32)


class StandIn:
    """What Triton asks a driver while it compiles."""

    def __init__(self, name: str) -> None:
        self._target = target(name)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        nvidia = self._target.backend == "cuda"
        return divmod(int(self._target.arch), 10) if nvidia else (9, 4)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Callable[..., list[float]]:
        def first(fn: Callable[[], None], quantiles: object = None, **_: object) -> list[float]:
            fn()
            return [1.0, 1.0, 1.0]

        return first

    @classmethod
    def is_active(cls) -> bool:
        return True


@dataclass
class Launch:
    """One launch: the kernel's name and grid, and what it was compiled to."""

    name: str
    grid: tuple[int, ...]
    compiled: Any

    @property
    def cubin(self) -> bytes:
        found: bytes = self.compiled.asm["cubin"]
        return found

    @property
    def warps(self) -> int:
        return int(self.compiled.metadata.num_warps)


@contextlib.contextmanager
def capture(name: str) -> Iterator[list[Launch]]:
    """The launches made inside the block, compiled for the target `name`."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    found: list[Launch] = []
    run, before = JITFunction.run, getattr(driver, "_active", None)
    seen: set[int] = set()

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if id(self) not in seen:  # what it was compiled to for another target
            seen.add(id(self))
            self.device_caches.clear()
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        shape = grid(options) if callable(grid) else grid
        found.append(Launch(self.__name__, tuple(shape), compiled))
        return compiled

    driver.set_active(StandIn(name))
    JITFunction.run = record
    try:
        yield found
    finally:
        JITFunction.run = run
        driver._active = before
