"""Norm control on the device: a copy before a step, the sums over each matrix after it, and the turn.

Parameters of one shape lie anywhere, and are found by a table of addresses. Their copy is one stack. A parameter is
`count` matrices of `numel` elements each, one after the other in memory. ALIGNED says of each kernel that all of them
begin at a multiple of 16 bytes. The compiler forgets such a hint if a function is given the address that it is of, so
that each kernel gives its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rounding import narrow, widen

LEAST = tl.constexpr(1e-12)  # the least norm that is divided by, as in the reference


@triton.jit
def hold_kernel(
    pointers_ptr, old_ptr, numel, tiles,
    ZERO: tl.constexpr, ALIGNED: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """old <- parameters, and with ZERO parameters <- 0. A program takes BLOCK elements of one parameter.

    Reads an element once. Writes it once, or twice with ZERO: 8 or 12 bytes of float32.
    """
    program = tl.program_id(0)
    parameter = (program // tiles).to(tl.int64)
    offs = (program % tiles) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    at = tl.load(pointers_ptr + parameter).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        at = tl.multiple_of(at, 16)
    x = tl.load(at + offs, mask=mask)
    tl.store(old_ptr + parameter * numel + offs, x, mask=mask)
    if ZERO:
        tl.store(at + offs, tl.zeros_like(x), mask=mask)


@triton.jit
def _before_and_moved(at, old_ptr, offs, mask, FROM_ZERO: tl.constexpr):
    """W and d of these elements, float32."""
    w = widen(tl.load(old_ptr + offs, mask=mask, other=0.0))
    d = widen(tl.load(at + offs, mask=mask, other=0.0))
    if not FROM_ZERO:
        d = d - w
    return w, d


@triton.jit
def norm_sums_kernel(
    pointers_ptr, old_ptr, out_ptr, numel, count, tiles, apart,
    FROM_ZERO: tl.constexpr, ALIGNED: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """A program's part of ‖W‖², W·d and ‖d‖² of one matrix, float64, in three columns `apart` numbers apart.

    A program takes BLOCKS times BLOCK elements. A block is added up in float32, and the blocks in float64.

    Reads a parameter and its copy once: 8 bytes of float32 an element. Writes 24 bytes.
    """
    program = tl.program_id(0)
    matrix = (program // tiles).to(tl.int64)
    at = tl.load(pointers_ptr + matrix // count).to(tl.pointer_type(DTYPE)) + (matrix % count) * numel
    if ALIGNED:
        at = tl.multiple_of(at, 16)
    old_ptr += matrix * numel
    first = (program % tiles) * (BLOCK * BLOCKS)
    square = tl.full((), 0.0, tl.float64)
    product, length = square, square
    for block in range(BLOCKS):
        offs = first + block * BLOCK + tl.arange(0, BLOCK)
        w, d = _before_and_moved(at, old_ptr, offs, offs < numel, FROM_ZERO)
        square += tl.sum(w * w).to(tl.float64)
        product += tl.sum(w * d).to(tl.float64)
        length += tl.sum(d * d).to(tl.float64)
    tl.store(out_ptr + program, square)
    tl.store(out_ptr + apart + program, product)
    tl.store(out_ptr + 2 * apart + program, length)


@triton.jit
def _at_least(x, least):
    """The larger of both; NaN stays NaN."""
    return tl.maximum(x, least, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def turn_kernel(
    pointers_ptr, old_ptr, totals_ptr, rate_ptr, rate, numel, count, tiles, apart,
    GIVEN: tl.constexpr, FROM_ZERO: tl.constexpr, ALIGNED: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """parameters <- (W + c d) ‖W‖ / ‖W + c d‖ with c = rate ‖W‖ / ‖d‖, rounded. GIVEN: the rate is in memory.

    A program takes BLOCK elements of one matrix. `totals_ptr` has the three sums of each, `apart` numbers apart.

    Reads a parameter and its copy, and writes the parameter: 12 bytes of float32 an element.
    """
    program = tl.program_id(0)
    matrix = (program // tiles).to(tl.int64)
    square = tl.load(totals_ptr + matrix)
    product = tl.load(totals_ptr + apart + matrix)
    length = tl.load(totals_ptr + 2 * apart + matrix)
    relative = tl.full((), 0.0, tl.float64) + rate
    if GIVEN:
        relative = tl.load(rate_ptr).to(tl.float64)
    norm = tl.sqrt(square)
    step = relative * norm / _at_least(tl.sqrt(length), LEAST)
    after = tl.sqrt(_at_least(square + 2 * step * product + step * step * length, 0.0))
    shrink = norm / _at_least(after, LEAST)
    at = tl.load(pointers_ptr + matrix // count).to(tl.pointer_type(DTYPE)) + (matrix % count) * numel
    if ALIGNED:
        at = tl.multiple_of(at, 16)
    offs = (program % tiles) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    w, d = _before_and_moved(at, old_ptr + matrix * numel, offs, mask, FROM_ZERO)
    new = w * shrink.to(tl.float32) + d * (shrink * step).to(tl.float32)
    tl.store(at + offs, narrow(new, DTYPE), mask=mask)
