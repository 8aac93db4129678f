"""The matrix products of a fused lm_head: by torch's own library, summed over tiles in fp32.

Tiles of logits are stored in fp32; those of "fast" in the 16-bit type of the operands. On a
CPU "fast" also rounds each bfloat16 product of a tile of gradients to it before adding it up.

On the CPU torch has no bfloat16 x bfloat16 -> float32 product. The one used here is the float32
product that oneDNN computes with bfloat16 multipliers: the operands, widened by blocks, are exact
in bfloat16, so only the accumulation rounds, in float32. docs/linear.md has what else was measured.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

_MKLDNN: Any = torch.backends.mkldnn
_lock = threading.Lock()
_users = 0
_before = "none"


@contextmanager
def bf16_multipliers() -> Iterator[None]:
    """oneDNN's float32 products with bfloat16 multipliers, while at least one thread is inside.

    The setting is torch's, and global: a float32 product that another thread runs meanwhile is
    computed so too. Where the machine has no such multipliers, float32 ones are used.
    """
    global _users, _before
    setting = _MKLDNN.matmul
    with _lock:
        _users += 1
        if _users == 1:
            _before = setting.fp32_precision
            setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                setting.fp32_precision = _before


def multiplied_natively(operands: torch.dtype, device: str) -> bool:
    """Whether there are 16-bit products: without, torch emulates them, slower than float32 ones."""
    if device != "cpu":
        return True
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    try:
        return bool(getattr(torch.ops.mkldnn, name[operands])())
    except AttributeError:  # a build without oneDNN
        return False


def tile_dtype(operands: torch.dtype, device: str, fast: bool) -> torch.dtype:
    """Of a tile of logits: float32 or better; `fast`: that of the operands where it is faster."""
    half = operands in (torch.bfloat16, torch.float16)
    if not half or (fast and multiplied_natively(operands, device)):
        return operands
    return torch.float32


class Products:
    """Products of one pair of operands' dtype, and their workspace, which is allocated once.

    Operands that must be widened are widened by `inner` columns at a time.
    """

    def __init__(self, like: Tensor, fast: bool, inner: int) -> None:
        half = like.dtype in (torch.bfloat16, torch.float16)
        self.operands, self.device, self.inner = like.dtype, like.device, inner
        self.tile = tile_dtype(like.dtype, like.device.type, fast)
        # the library stores what is wanted: one dtype throughout, or the accumulators on a GPU
        self.plain = self.tile == like.dtype
        self.stores_wide = half and like.device.type == "cuda"
        self.total = torch.float32 if half else like.dtype
        # of a tile of gradients: 16-bit where its product is summed in fp32, and stored so or, of
        # bfloat16, "fast"; a float16 one would overflow
        fast_one = self.plain and like.dtype == torch.bfloat16
        self.gradient = like.dtype if self.stores_wide or fast_one else self.total
        self.narrow = torch.float16 in (self.tile, self.gradient)
        exact = like.dtype == torch.bfloat16 and like.device.type == "cpu"
        self._multipliers = bf16_multipliers if exact else nullcontext
        self._rooms: dict[str, Tensor] = {}

    def room(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """A [rows, columns] piece of workspace, kept under its name for the next call."""
        kept = self._rooms.get(name)
        if kept is None or kept.numel() < rows * columns:
            self._rooms[name] = kept = torch.empty(rows * columns, dtype=dtype, device=self.device)
        return kept[: rows * columns].view(rows, columns)

    def as_operand(self, gradient: Tensor) -> Tensor:
        """A tile of gradients in the dtype that `add` takes; valid until the next one."""
        if gradient.dtype == self.gradient:
            return gradient
        rows, columns = gradient.shape
        return self.room("gradient", rows, columns, self.gradient).copy_(gradient)

    def _widened(self, name: str, t: Tensor) -> Tensor:
        return self.room(name, t.shape[0], t.shape[1], self.total).copy_(t)

    def logits(self, out: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
        """out [n, v] = hidden [n, H] weight [v, H]^T."""
        if self.plain:
            return torch.mm(hidden, weight.t(), out=out)
        if self.stores_wide:
            return torch.mm(hidden, weight.t(), out_dtype=self.tile, out=out)
        for at in range(0, hidden.shape[1], self.inner):
            a = self._widened("left", hidden[:, at : at + self.inner])
            b = self._widened("right", weight[:, at : at + self.inner])
            with self._multipliers():
                if at == 0:
                    torch.mm(a, b.t(), out=out)
                else:
                    torch.addmm(out, a, b.t(), out=out)
        return out

    def add(self, total: Tensor, gradient: Tensor, other: Tensor, fresh: bool = False) -> None:
        """total [m, H] += gradient [m, k] other [k, H]; the gradient is a tile or its transpose.

        The gradient's dtype is `self.gradient`. fresh: the total is not read; it may hold anything.
        """
        beta = 0 if fresh else 1
        if self.operands == self.total:
            torch.addmm(total, gradient, other, beta=beta, out=total)
        elif self.stores_wide:
            torch.addmm(total, gradient, other, out_dtype=self.total, beta=beta, out=total)
        elif self.gradient == self.operands:
            room = self.room("product", total.shape[0], total.shape[1], self.operands)
            product = torch.mm(gradient, other, out=room)
            total.copy_(product) if fresh else total.add_(product)
        else:
            for at in range(0, other.shape[1], self.inner):
                part = total[:, at : at + self.inner]
                widened = self._widened("right", other[:, at : at + self.inner])
                with self._multipliers():
                    torch.addmm(part, gradient, widened, beta=beta, out=part)
