"""What Triton's interpreter does otherwise than a GPU, mended: for tests only.

It truncates where it converts to bfloat16, rounds twice in a fused multiply-add, and looks through
all of triton.language at each call of one jitted function by another, which took nine tenths of the
time.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def _to_bfloat16(data: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16, ties to even."""
    values = np.ascontiguousarray(data, dtype=np.float32)
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).astype(np.uint16)


def mend() -> None:
    """Patches the interpreter of this process, once."""
    np.seterr(all="ignore")  # infinities and NaN are what half of the tests are about
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def cast_impl(self: Any, source: Any, dtype: Any) -> Any:
        if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
            bits = _to_bfloat16(source.data).reshape(source.data.shape)
            return TensorHandle(bits, dtype.scalar)
        return cast(self, source, dtype)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if x.data.dtype != np.float32:
            return TensorHandle(x.data * y.data + z.data, x.dtype.scalar)
        exact = x.data.astype(np.float64) * y.data  # exact: 48 bits
        return TensorHandle((exact + z.data).astype(np.float32), x.dtype.scalar)

    call = InterpretedFunction.__call__
    patched = set()  # modules whose view of triton.language the first call has patched

    def call_once_patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = self.fn.__module__
        if module in patched:
            return self.rewrite()(*args, **kwargs)
        patched.add(module)
        return call(self, *args, **kwargs)

    InterpretedFunction.__call__ = call_once_patched
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fma = create_fma
