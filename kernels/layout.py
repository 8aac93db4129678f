"""Where a row is, and how its logits are loaded: in full vectors if aligned, one by one if not."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl


def unspecialised(function: Callable[..., None]) -> Any:
    """A kernel that is compiled once for its dtypes and constexprs, whatever the other arguments.

    Triton by itself compiles again where an integer is 1, or it or a pointer a multiple of 16.
    """
    names = [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if "constexpr" not in str(parameter.annotation)
    ]
    return triton.jit(function, do_not_specialize=names, do_not_specialize_on_alignment=names)


@triton.jit
def row_pointer(base, row, inner, outer_stride, inner_stride):
    """First logit of a row of a matrix whose rows are strided in two levels; 64-bit."""
    return base + (row // inner) * outer_stride + (row % inner) * inner_stride


@triton.jit
def misalignment(pointer):
    """Bytes that a row starts beyond a multiple of 16."""
    return pointer.to(tl.int64, bitcast=True) & 15


@triton.jit
def vectorised(pointer):
    """The same pointer, as one the compiler knows to be a multiple of 16 bytes: it must be."""
    whole = (pointer.to(tl.int64, bitcast=True) & -16).to(pointer.dtype, bitcast=True)
    return tl.multiple_of(whole, 16)


@triton.jit
def is_half(pointer):
    """Whether logits have 16 bits. A tile of them is held as even and odd tokens."""
    return pointer.dtype.element_ty.primitive_bitwidth == 16


@triton.jit
def load_words(pointer, begin, words):
    """Logits begin + 2 words and begin + 2 words + 1, both [..] like words, from aligned pairs."""
    pair = tl.load(pointer.to(tl.pointer_type(tl.int32), bitcast=True) + (begin // 2 + words))
    if pointer.dtype.element_ty == tl.bfloat16:
        even = (pair << 16).to(tl.float32, bitcast=True)
        odd = (pair & -65536).to(tl.float32, bitcast=True)
    else:
        even = pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        odd = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return even, odd


@triton.jit
def load_each(pointer, offsets, end):
    """Logits in fp32, -inf from `end` on: tokens that neither row has."""
    found = tl.load(pointer + offsets, mask=offsets < end, other=0.0).to(tl.float32)
    return tl.where(offsets < end, found, float("-inf"))


@triton.jit
def load_wide(
    row, begin, cell, HALF: tl.constexpr, EXACT: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """Both half tiles [halves, width] of a whole tile, in fp32; EXACT: one row has 32 bits."""
    if ALIGNED and not EXACT:
        return load_words(row, begin, cell)
    else:
        even = cell if EXACT else cell * 2
        odd = even + (HALF if EXACT else 1)
        first = tl.load(row + (begin + even)).to(tl.float32)
        second = tl.load(row + (begin + odd)).to(tl.float32)
        return first, second


@triton.jit
def load_rest(row, begin, cell, HALF: tl.constexpr, EXACT: tl.constexpr, end):
    """The same of the last tile of a row, -inf from `end` on."""
    even = cell if EXACT else cell * 2
    odd = even + (HALF if EXACT else 1)
    return load_each(row, begin + even, end), load_each(row, begin + odd, end)


@triton.jit
def sum_in_order(columns):
    """The sum of [width] numbers, in an order that does not depend on which lanes hold them.

    tl.sum adds what one lane holds first, and loads of other widths put other numbers there.
    """
    a, b = tl.split(tl.reshape(columns, (columns.shape[0] // 2, 2)))
    columns = a + b
    a, b = tl.split(tl.reshape(columns, (columns.shape[0] // 2, 2)))
    return tl.sum(a + b, 0)
