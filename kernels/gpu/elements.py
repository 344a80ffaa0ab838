"""A block of elements of one tensor: loaded, selected, stepped, stored. What the kernels have in common."""

from __future__ import annotations

import triton
import triton.language as tl

from .config import (
    ABOVE,
    BELOW,
    BRACKET,
    COLUMNS,
    CUTOFF,
    DENSE,
    FACTOR,
    FIRST,
    FOURTH,
    GRAD,
    HIGH,
    LOW,
    MODE,
    PARAM,
    RATE,
    ROW_LENGTH,
    SECOND,
    SEEN,
    THIRD,
    USER,
)
from .keys import key_of
from .random import random_bits
from .rounding import narrow, store, widen
from .rules import gradient, moved, score_of


@triton.jit
def column(pointers, COLUMN: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr):
    """One tensor's memory, from the row of its addresses. FAST promises that the address is a multiple of 16."""
    pointer = tl.load(pointers + COLUMN).to(tl.pointer_type(DTYPE))
    if FAST:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def is_aligned(pointers):
    """Whether all addresses of a row are multiples of 16; absent tensors are 0."""
    together = tl.load(pointers + PARAM) | tl.load(pointers + GRAD) | tl.load(pointers + FIRST)
    together = together | tl.load(pointers + SECOND) | tl.load(pointers + THIRD) | tl.load(pointers + FOURTH)
    return (together & 15) == 0


@triton.jit
def read(pointers, offs, mask, COLUMN: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr):
    """These elements of one column as float32; 0 where masked off, and where there is no such column."""
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
def agrees(x, g, CFG: tl.constexpr):
    """Whether x g > 0 (>= 0 where not strict), by the signs: a product that underflows in float32 is still not 0."""
    agree = ((x > 0) & (g > 0)) | ((x < 0) & (g < 0))
    if not CFG.strict:
        agree = agree | ((x == 0) & (g == g)) | ((g == 0) & (x == x))
    return agree


@triton.jit
def agreement(g, u, m, previous, row, ranks, CFG: tl.constexpr):
    """Selected by the sign of a product.

    Before anything is written, in the sums of a strength, Adam's update goes by its momentum, which has the same sign
    wherever the second moment is a number and the rate is not 0: so the second moment is not read.
    """
    if CFG.product == "previous_momentum":
        unseen = (previous * 0.0 + tl.load(ranks + SEEN)) == 0
        chosen = agrees(previous, g, CFG) | unseen
    elif CFG.product == "momentum":
        chosen = agrees(m, g, CFG)
    elif CFG.rule == "adam" and not CFG.writes:
        rate = tl.load(row + RATE)
        chosen = agrees(m * tl.where(rate > 0, 1.0, tl.where(rate < 0, -1.0, 0.0)), g, CFG)
    else:
        chosen = agrees(u, g, CFG)
    return chosen


@triton.jit
def coin(offs, row, facts, keys, CFG: tl.constexpr):
    """Selected where the 24-bit number of the element, of its row, or of the tensor is below a limit."""
    index = offs.to(tl.uint32)
    if CFG.selection == "row":
        index = index // tl.load(facts + ROW_LENGTH).to(tl.uint32)
    elif CFG.selection == "tensor":
        index = index * 0
    first = tl.load(keys + 0).to(tl.uint32, bitcast=True)
    second = tl.load(keys + 1).to(tl.uint32, bitcast=True)
    return random_bits(index, first, second).to(tl.float32) < tl.load(row + USER)


@triton.jit
def _number(like, row, INDEX: tl.constexpr):
    """One of the function's numbers, a block of it: the interpreter can't combine blocks and single bools."""
    return tl.zeros(like.shape, tl.float32) + tl.load(row + USER + INDEX)


@triton.jit
def by_function(g, u, m, row, FUNCTION: tl.constexpr, CFG: tl.constexpr):
    """Selected by a user's function of (gradient, update, momentum) and up to four numbers; no momentum: the update."""
    if (CFG.rule == "given" and CFG.third is None) or (CFG.rule == "sgd" and not CFG.moves):
        m = u
    if CFG.arguments == 0:
        chosen = FUNCTION(g, u, m)
    elif CFG.arguments == 1:
        chosen = FUNCTION(g, u, m, _number(u, row, 0))
    elif CFG.arguments == 2:
        chosen = FUNCTION(g, u, m, _number(u, row, 0), _number(u, row, 1))
    elif CFG.arguments == 3:
        chosen = FUNCTION(g, u, m, _number(u, row, 0), _number(u, row, 1), _number(u, row, 2))
    else:
        chosen = FUNCTION(g, u, m, _number(u, row, 0), _number(u, row, 1), _number(u, row, 2), _number(u, row, 3))
    tl.static_assert(chosen.dtype == tl.int1, "a selection's kernel has to return bools, which comparisons give")
    return chosen


@triton.jit
def by_rank(offs, key, ranks):
    """(selected, undecided) by the bracket or the threshold of the tensor's keys.

    EXACT: above HIGH, or equal to it up to flat index CUTOFF. BRACKET: above HIGH; undecided from LOW to HIGH.
    DENSE: everything. A key of 0 is a NaN, which is not selected.
    """
    mode = offs * 0 + tl.load(ranks + MODE)  # a block, because the interpreter can't combine blocks and single bools
    low, high = tl.load(ranks + LOW).to(tl.uint32), tl.load(ranks + HIGH).to(tl.uint32)
    above = (key > high) | ((key == high) & (offs <= tl.load(ranks + CUTOFF)) & (key != 0))
    above = above | (mode == DENSE)
    return above, (key >= low) & (key <= high) & (mode == BRACKET)


@triton.jit
def by_bracket(key, ranks):
    """`by_rank` of a tensor that has a bracket."""
    low, high = tl.load(ranks + LOW).to(tl.uint32), tl.load(ranks + HIGH).to(tl.uint32)
    return key > high, key - low <= high - low


@triton.jit
def select(offs, g, u, m, previous, row, ranks, facts, keys, FUNCTION: tl.constexpr, HAS_BRACKET: tl.constexpr,
           CFG: tl.constexpr):  # fmt: skip
    """(selected, undecided, the key that top-K ranks), for a block of elements at flat indices `offs`.

    HAS_BRACKET promises that the tensor's MODE is BRACKET.
    """
    key = tl.zeros(offs.shape, tl.uint32)
    undecided = offs < 0
    if CFG.selection == "everything":
        chosen = offs >= 0
    elif CFG.selection == "agreement":
        chosen = agreement(g, u, m, previous, row, ranks, CFG)
    elif CFG.selection == "top_k":
        key = key_of(score_of(g, u, m, row, CFG))
        if HAS_BRACKET:
            chosen, undecided = by_bracket(key, ranks)
        else:
            chosen, undecided = by_rank(offs, key, ranks)
    elif CFG.selection == "function":
        chosen = by_function(g, u, m, row, FUNCTION, CFG)
    else:
        chosen = coin(offs, row, facts, keys, CFG)
    return chosen, undecided, key


@triton.jit
def multiplier(chosen, u, g, row, CFG: tl.constexpr):
    """The mask of these elements."""
    mask = tl.where(chosen, tl.load(row + ABOVE), tl.load(row + BELOW))
    if CFG.still:
        zero = 0.0
        if CFG.selection == "top_k":
            zero = tl.load(row + USER)  # 1 where the tensor is dense
        mask = tl.where((u == 0) | (g == 0), zero, mask)
    return mask


@triton.jit
def stepped(p, start, u, mask, row, CFG: tl.constexpr):
    """The new parameter in float32: factor p - mask u, or for a given update factor start + (offset - mask) u."""
    origin = p
    if CFG.rule == "given":
        origin = start
    if CFG.decays:
        origin = origin * tl.load(row + FACTOR)
    if CFG.rule == "given":
        new = tl.fma(CFG.offset - mask, u, origin)
    else:
        new = tl.fma(-mask, u, origin)
    return new


@triton.jit
def load_moved(pointers, offs, mask, row, NEEDS_PARAM: tl.constexpr, FAST: tl.constexpr, CFG: tl.constexpr):
    """(p, g, u, m, previous, state columns to store, start) of these elements; p is 0 where nobody needs it."""
    p = tl.zeros(offs.shape, tl.float32)
    if NEEDS_PARAM or CFG.coupled:
        p = read(pointers, offs, mask, PARAM, CFG.param, FAST)
    a = read(pointers, offs, mask, FIRST, CFG.first, FAST)
    b = read(pointers, offs, mask, SECOND, CFG.second, FAST)
    c = read(pointers, offs, mask, THIRD, CFG.third, FAST)
    d = read(pointers, offs, mask, FOURTH, CFG.fourth, FAST)
    g = gradient(read(pointers, offs, mask, GRAD, CFG.grad, FAST), p, row, CFG)
    u, m, previous, x, y, z = moved(g, a, b, c, d, row, CFG)
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
    return row_of(table, t, COLUMNS)
