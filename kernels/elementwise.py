"""log_softmax and its backward, sums in index order, and the scaling of a gradient made ahead."""

from __future__ import annotations

import triton
import triton.language as tl

from .layout import row_pointer


@triton.jit
def _exp(z):
    return tl.exp(z) if z.dtype == tl.float64 else tl.exp2(z * 1.4426950408889634)


@unspecialised
def log_softmax(
    logits, out, inner: tl.int64, first: tl.int64, width: tl.int64, x_outer: tl.int64, x_inner: tl.int64,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[n, width] of rows first .. ; a program takes a row, twice from memory."""
    local = tl.program_id(0).to(tl.int64)
    x_row = row_pointer(logits, local, inner, x_outer, x_inner)
    lane = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), float("-inf"), DTYPE)
    mass = tl.zeros((BLOCK,), DTYPE)
    for i in tl.range(0, width, BLOCK):
        inside = i + lane < width
        x = tl.load(x_row + (i + lane), mask=inside, other=float("-inf")).to(DTYPE)
        higher = tl.maximum(largest, x, propagate_nan=tl.PropagateNan.ALL)
        known = higher > float("-inf")
        mass = tl.where(
            known, mass * _exp(largest - higher) + _exp(x - higher), tl.where(x == x, 0.0, x)
        )
        largest = higher
    top = tl.max(largest, 0)
    weight = tl.where(largest > float("-inf"), _exp(largest - top), 0.0)
    bad = tl.sum((largest != largest).to(tl.int32), 0) > 0
    bad = bad | (top == float("inf")) | (top == float("-inf"))
    log_mass = tl.log(tl.sum(tl.where(weight == 0.0, 0.0, mass * weight), 0).to(tl.float64))
    log_mass = tl.where(bad, float("nan"), log_mass).to(DTYPE)
    out_row = out + (first + local) * width
    for i in tl.range(0, width, BLOCK):
        inside = i + lane < width
        x = tl.load(x_row + (i + lane), mask=inside, other=0.0).to(DTYPE)
        tl.store(out_row + (i + lane), ((x - top) - log_mass).to(out.dtype.element_ty), mask=inside)


@unspecialised
def log_softmax_backward(
    grad, output, out, inner: tl.int64, first: tl.int64, width: tl.int64, g_outer: tl.int64, g_inner: tl.int64,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = grad - exp(output) sum(grad), of rows first ..; output and out are contiguous."""
    local = tl.program_id(0).to(tl.int64)
    g_row = row_pointer(grad, local, inner, g_outer, g_inner)
    lane = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float64)
    for i in tl.range(0, width, BLOCK):
        inside = i + lane < width
        sums += tl.load(g_row + (i + lane), mask=inside, other=0.0).to(tl.float64)
    total = tl.sum(sums, 0).to(DTYPE)
    row = (first + local) * width
    for i in tl.range(0, width, BLOCK):
        inside = i + lane < width
        g = tl.load(g_row + (i + lane), mask=inside, other=0.0).to(DTYPE)
        z = tl.load(output + row + (i + lane), mask=inside, other=0.0).to(DTYPE)
        tl.store(
            out + row + (i + lane), (g - _exp(z) * total).to(out.dtype.element_ty), mask=inside
        )


@unspecialised
def ordered_sum(
    values, weight, out, n: tl.int64, stride: tl.int64, weight_stride: tl.int64,
    WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[()] = sum of values times weights, in float64, in an order that n alone decides."""
    lane = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float64)
    for i in tl.range(0, n, BLOCK):
        inside = i + lane < n
        term = tl.load(values + (i + lane) * stride, mask=inside, other=0.0).to(tl.float64)
        if WEIGHTED:
            term *= tl.load(weight + (i + lane) * weight_stride, mask=inside, other=0.0).to(
                tl.float64
            )
        sums += term
    tl.store(out, tl.sum(sums, 0).to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["size"], do_not_specialize_on_alignment=["gradient", "factor"])
def scale_gradient(gradient, factor, size: tl.int64, BLOCK: tl.constexpr):
    """gradient[size] *= factor[()], exactly 0 where the factor is; nothing is read where it is 1."""
    by = tl.load(factor).to(tl.float32)
    if by == 1.0:
        return
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    found = tl.load(gradient + at, mask=at < size, other=0.0)
    scaled = tl.where(by == 0.0, 0.0, found.to(tl.float32) * by)
    tl.store(gradient + at, scaled.to(gradient.dtype.element_ty), mask=at < size)
