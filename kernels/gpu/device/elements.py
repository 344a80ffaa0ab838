"""A block of elements of one tensor: loading, stepping and storing it, for all kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from .config import (
    COLUMNS,
    FACTOR,
    FIRST,
    FOURTH,
    GRAD,
    PARAM,
    RATE,
    SECOND,
    STRENGTH_REST,
    STRENGTH_SELECTED,
    THIRD,
    USER,
)
from .decay import decaying
from .rounding import narrow, store, widen
from .rules import gradient, moved


@triton.jit
def column(pointers, COLUMN: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr):
    """One tensor's memory, from the row of its addresses. FAST promises that the address is a multiple of 16."""
    pointer = tl.load(pointers + COLUMN).to(tl.pointer_type(DTYPE))
    if FAST:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def is_aligned(pointers):
    """True if all addresses of a row are multiples of 16. Those of absent tensors are 0."""
    together = tl.load(pointers + PARAM) | tl.load(pointers + GRAD) | tl.load(pointers + FIRST)
    together = together | tl.load(pointers + SECOND) | tl.load(pointers + THIRD) | tl.load(pointers + FOURTH)
    return (together & 15) == 0


@triton.jit
def read(pointers, offs, mask, COLUMN: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr):
    """These elements of one column as float32; 0 where masked off, and 0 everywhere if there is no such column."""
    if DTYPE is None:
        x = tl.zeros(offs.shape, tl.float32)
    elif FAST:
        x = widen(tl.load(column(pointers, COLUMN, DTYPE, FAST) + offs))
    else:
        x = widen(tl.load(column(pointers, COLUMN, DTYPE, FAST) + offs, mask=mask, other=0.0))
    return x


@triton.jit
def write(pointers, offs, x, mask, COLUMN: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr):
    """Store float32 elements to a column, rounded to nearest."""
    if FAST:
        tl.store(column(pointers, COLUMN, DTYPE, FAST) + offs, narrow(x, DTYPE))
    else:
        tl.store(column(pointers, COLUMN, DTYPE, FAST) + offs, narrow(x, DTYPE), mask=mask)


@triton.jit
def multiplier(chosen, u, g, row, CFG: tl.constexpr):
    """The mask of these elements."""
    return mask_of(chosen, u, g, tl.load(row + STRENGTH_SELECTED), row, CFG)


@triton.jit
def mask_of(chosen, u, g, selected, row, CFG: tl.constexpr):
    """The mask of these elements, with this multiplier of the selected."""
    mask = tl.where(chosen, selected, tl.load(row + STRENGTH_REST))
    if CFG.still:
        zero = 0.0
        if CFG.selection == "top_k":
            zero = tl.load(row + USER)  # 1 where the tensor is dense
        mask = tl.where((u == 0) | (g == 0), zero, mask)
    return mask


@triton.jit
def stepped(p, start, g, u, mask, row, CFG: tl.constexpr):
    """The new parameter in float32: factor p - mask u, or for a given update factor start + (offset - mask) u."""
    origin = p
    if CFG.rule == "given":
        origin = start
    if CFG.decays:
        if CFG.decay == "everywhere":
            origin = origin * tl.load(row + FACTOR)
        else:
            decays = decaying(origin, g, u, mask, row, CFG)
            origin = tl.where(decays, origin * tl.load(row + FACTOR), origin)
    if CFG.rule == "given":
        new = tl.fma(CFG.offset - mask, u, origin)
    else:
        new = tl.fma(-mask, u, origin)
    return new


@triton.jit
def load_moved(pointers, offs, mask, row, NEEDS_PARAM: tl.constexpr, FAST: tl.constexpr, CFG: tl.constexpr):
    """(p, g, u, m, previous momentum, three state columns to store) of these elements.

    p is 0 unless NEEDS_PARAM or decay is coupled. The second state column of a given update is its start.
    """
    p = tl.zeros(offs.shape, tl.float32)
    if NEEDS_PARAM or CFG.coupled:
        p = read(pointers, offs, mask, PARAM, CFG.param, FAST)
    a = read(pointers, offs, mask, FIRST, CFG.first, FAST)
    b = read(pointers, offs, mask, SECOND, CFG.second, FAST)
    c = read(pointers, offs, mask, THIRD, CFG.third, FAST)
    d = read(pointers, offs, mask, FOURTH, CFG.fourth, FAST)
    g = gradient(read(pointers, offs, mask, GRAD, CFG.grad, FAST), p, row, CFG)
    u, m, previous, x, y, z = moved(g, a, b, c, d, row, CFG)
    if not CFG.usual:  # by a negative rate it climbs: `as_seen` of the reference
        climbs = tl.where(tl.load(row + RATE) < 0, -1.0, 1.0)
        g, m, previous = g * climbs, m * climbs, previous * climbs
    return p, g, u, m, previous, x, y, z


@triton.jit
def store_moments(pointers, offs, x, y, z, mask, FAST: tl.constexpr, CFG: tl.constexpr):
    """Store the state columns that the rule moves."""
    if (CFG.rule == "adam") or (CFG.rule == "lion") or (CFG.rule == "sgd" and CFG.moves):
        write(pointers, offs, x, mask, FIRST, CFG.first, FAST)
    if CFG.rule == "adam":
        write(pointers, offs, y, mask, SECOND, CFG.second, FAST)
        if CFG.amsgrad:
            write(pointers, offs, z, mask, THIRD, CFG.third, FAST)


@triton.jit
def store_param(pointers, offs, new, mask, keys, FAST: tl.constexpr, CFG: tl.constexpr):
    """Round the new parameter once, to nearest or stochastically, and store it."""
    rounded = store(new, offs, keys, CFG)
    pointer = column(pointers, PARAM, CFG.param, FAST) + offs
    if FAST:
        tl.store(pointer, rounded)
    else:
        tl.store(pointer, rounded, mask=mask)


@triton.jit
def row_of(table, t, WIDTH: tl.constexpr):
    """The row of tensor `t` in a table of `WIDTH` columns."""
    return table + t.to(tl.int64) * WIDTH


@triton.jit
def pointers_of(table, t):
    """The row of tensor `t` in the pointer table."""
    return row_of(table, t, COLUMNS)
