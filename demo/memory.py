"""How much a piece of code makes this process grow at its peak."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType

_PROC = Path("/proc/self")


class PeakMemory:
    """Context manager: `bytes` is the growth of resident memory, from the start to the peak.

    Linux keeps the peak itself, and `method` is "kernel peak"; where it does not let a process
    reset that peak, a thread reads the resident memory every millisecond ("sampled");
    elsewhere `bytes` is None.

    Memory that an allocator kept from before is not growth. Blocks as large as a matrix of logits
    are mapped afresh by malloc each time, so they are always seen.
    """

    def __init__(self) -> None:
        self.bytes: int | None = None
        self.method = "not measured"

    def __enter__(self) -> PeakMemory:
        self._sampler: _Sampler | None = None
        if _reset_peak():
            self.method = "kernel peak"
        elif (_PROC / "statm").exists():
            self.method = "sampled"
            self._sampler = _Sampler()
            self._sampler.start()
        self._start = 0 if self.method == "not measured" else _resident()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._sampler is not None:
            self._sampler.stop()
            self.bytes = max(self._sampler.peak, _resident()) - self._start
        elif self.method == "kernel peak":
            self.bytes = _status("VmHWM") - self._start


class _Sampler(threading.Thread):
    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.001):
            self.peak = max(self.peak, _resident())

    def stop(self) -> None:
        self._done.set()
        self.join()


def _reset_peak() -> bool:
    try:
        (_PROC / "clear_refs").write_text("5")  # proc(5): VmHWM becomes the present VmRSS
        _status("VmHWM")
    except (OSError, KeyError):
        return False
    return True


def _resident() -> int:
    pages = int((_PROC / "statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _status(field: str) -> int:
    for line in (_PROC / "status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)
