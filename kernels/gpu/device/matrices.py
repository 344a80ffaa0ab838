"""Norm control on the device: a copy before a step, the sums over each matrix after it, and the turn.

Parameters of one shape lie anywhere, and are found by a table of addresses. Their copy is one stack. A parameter is
`count` matrices of `numel` elements each, one after the other in memory. ALIGNED says of each kernel that all of them
begin at a multiple of 16 bytes. The compiler forgets such a hint if a function is given the address that it is of, so
that each kernel gives its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...reference import matrices as reference
from .rounding import narrow, widen

LEAST = tl.constexpr(reference.LEAST)
MOST = tl.constexpr(reference.MOST)
NEAR_SQUARED = tl.constexpr(reference.NEAR**2)


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

    A program takes BLOCKS times BLOCK elements.

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
        w, d = w.to(tl.float64), d.to(tl.float64)
        square += tl.sum(w * w)
        product += tl.sum(w * d)
        length += tl.sum(d * d)
    tl.store(out_ptr + program, square)
    tl.store(out_ptr + apart + program, product)
    tl.store(out_ptr + 2 * apart + program, length)


@triton.jit
def turn_kernel(
    pointers_ptr, old_ptr, totals_ptr, rate_ptr, rate, noise, numel, count, tiles, apart,
    GIVEN: tl.constexpr, FROM_ZERO: tl.constexpr, ALIGNED: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """parameters <- (W + c d) ‖W‖ / ‖W + c d‖ with c = rate ‖W‖ / ‖d‖, rounded.

    GIVEN: the rate is in memory. A matrix stays as it is if ‖d‖ is at most `noise` times ‖W‖, and if W + c d would be
    next to 0.

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
    # Comparisons are False where there is a NaN, which goes on.
    still = (length <= LEAST) | (length <= noise * noise * square)
    step = tl.where(still, 0.0, relative * tl.sqrt(square / tl.where(still, 1.0, length)))
    after = square + 2 * step * product + step * step * length
    still = still | (after <= NEAR_SQUARED * square)
    shrink = tl.sqrt(square / tl.where(still, 1.0, after))
    still = still | (shrink * step >= MOST)
    shrink, step = tl.where(still, 1.0, shrink), tl.where(still, 0.0, step)
    at = tl.load(pointers_ptr + matrix // count).to(tl.pointer_type(DTYPE)) + (matrix % count) * numel
    if ALIGNED:
        at = tl.multiple_of(at, 16)
    offs = (program % tiles) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    w, d = _before_and_moved(at, old_ptr + matrix * numel, offs, mask, FROM_ZERO)
    new = w * shrink.to(tl.float32) + d * (shrink * step).to(tl.float32)
    tl.store(at + offs, narrow(new, DTYPE), mask=mask)
