"""Sums over tensors, deterministic: what strengths are made of before the step, and what a step reports after it.

Each program adds up its elements in float32 in a fixed order and writes one row; one program a tensor then adds up the
rows in float64, also in a fixed order. No atomics, so the same bits in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .config import (
    ABOVE,
    BELOW,
    CHUNK_AT,
    CHUNKS,
    DENSE,
    FACTS,
    FIRST,
    FOURTH,
    KEYS,
    MODE,
    NUMBERS,
    NUMEL,
    PARTIALS,
    RANKS,
    SEEN,
    SETTLE_AT,
    SETTLES,
    SUM_AT,
    SUM_COLUMNS,
    SUM_SHIFT,
    TIED,
)
from .elements import load_moved, pointers_of, read, row_of, select
from .numbers import REST, SELECTED
from .random import sample_position
from .strengths import column_sum


@triton.jit
def terms(chosen, g, u, m, mask, CFG: tl.constexpr):
    """What each element adds to the three sums that this strength needs; 0 for those it does not."""
    first, second, third = tl.zeros_like(g), tl.zeros_like(g), tl.zeros_like(g)
    if CFG.strength == "mean_preserving":
        first = tl.where(chosen & mask, 1.0, 0.0)
    elif CFG.strength == "norm_preserving":
        x = u
        if CFG.of == "momentum":
            x = m
        elif CFG.of == "gradient":
            x = g
        squares = tl.where(mask, x * x, 0.0)
        first, second = tl.where(chosen, squares, 0.0), tl.where(chosen, 0.0, squares)
    elif CFG.strength == "alignment":
        first, second, third = tl.where(mask, m * g, 0.0), tl.where(mask, m * m, 0.0), tl.where(mask, g * g, 0.0)
    return first, second, third


@triton.jit
def store_sums(out, first, second, third, CFG: tl.constexpr):
    """One program's row."""
    tl.store(out, tl.sum(first))
    if CFG.strength != "mean_preserving":
        tl.store(out + 1, tl.sum(second))
    if CFG.strength == "alignment":
        tl.store(out + 2, tl.sum(third))


@triton.jit
def sums_kernel(
    sums_ptr, work_ptr, pointers_ptr, numbers_ptr, ranks_ptr, facts_ptr, keys_ptr,
    FUNCTION: tl.constexpr, CFG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK drawn elements of one tensor a program: what a sampled strength needs of them, before anything moves.

    Reads at those places what selection and norm are made of (a tensor of no more elements than the sample: all of it).
    Writes 16 bytes a program. Exact sums are `summed_step.py`'s.
    """
    program = tl.program_id(0)
    t, part = tl.load(work_ptr + 2 * program), tl.load(work_ptr + 2 * program + 1)
    facts, row, keys = row_of(facts_ptr, t, FACTS), row_of(numbers_ptr, t, NUMBERS), row_of(keys_ptr, t, KEYS)
    ranks, pointers = row_of(ranks_ptr, t, RANKS), pointers_of(pointers_ptr, t)
    numel, shift = tl.load(facts + NUMEL), tl.load(facts + SUM_SHIFT)
    count = tl.where(shift < 0, numel, tl.full((), 8, tl.int64) << tl.maximum(shift, 0))
    i = part.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    first = tl.load(keys + 2).to(tl.uint32, bitcast=True)
    second = tl.load(keys + 3).to(tl.uint32, bitcast=True)
    offs = i
    if shift >= 0:
        offs = sample_position(i, numel, shift, first, second)
    _, g, u, m, previous, _, _, _ = load_moved(pointers, offs, mask, row, False, False, CFG)
    chosen, _, _ = select(offs, g, u, m, previous, row, ranks, facts, keys, FUNCTION, CFG)
    one, two, three = terms(chosen, g, u, m, mask, CFG)
    store_sums(sums_ptr + (tl.load(facts + SUM_AT) + part) * SUM_COLUMNS, one, two, three, CFG)


@triton.jit
def seen_kernel(ranks_ptr, work_ptr, pointers_ptr, facts_ptr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
                CFG: tl.constexpr):  # fmt: skip
    """Sets SEEN where a tensor's momentum before the step is anything but zero; a program looks at PARTS blocks.

    Not at all where it is seen already: launched over one block of each tensor first and then over all, little more
    than one block of each is read.
    """
    program = tl.program_id(0)
    t, part = tl.load(work_ptr + 2 * program), tl.load(work_ptr + 2 * program + 1)
    seen = row_of(ranks_ptr, t, RANKS) + SEEN
    pointers, numel = pointers_of(pointers_ptr, t), tl.load(row_of(facts_ptr, t, FACTS) + NUMEL)
    if tl.load(seen) == 0:
        found = tl.zeros([BLOCK], tl.int32)
        for i in range(PARTS):
            offs = (part.to(tl.int64) * PARTS + i) * BLOCK + tl.arange(0, BLOCK)
            if CFG.rule == "given":
                previous = read(pointers, offs, offs < numel, FOURTH, CFG.fourth, False, CFG)
            else:
                previous = read(pointers, offs, offs < numel, FIRST, CFG.first, False, CFG)
            found = found | (previous != 0).to(tl.int32)
        if tl.sum(found) > 0:
            tl.store(seen, tl.full((), 1, tl.int64))


@triton.jit
def report_kernel(
    out_ptr, partials_ptr, settled_ptr, tied_ptr, repaired_ptr, numbers_ptr, hyper_ptr, ranks_ptr, facts_ptr, programs,
    FIXED: tl.constexpr, CFG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tensor a program: the seven sums of `spec.Sums`, float64, from all programs' rows."""
    t = tl.program_id(0)
    facts, ranks = row_of(facts_ptr, t, FACTS), row_of(ranks_ptr, t, RANKS)
    row, out = row_of(numbers_ptr, t, NUMBERS), out_ptr + t * 7
    at, rows = tl.load(facts + CHUNK_AT), tl.load(facts + CHUNKS).to(tl.int32)
    selected = column_sum(partials_ptr, at, rows, 0, PARTIALS, BLOCK)
    masked = column_sum(partials_ptr, at, rows, 4, PARTIALS, BLOCK)
    if CFG.bracketed:
        if tl.load(ranks + TIED) < 0:  # the repair has counted everything anew
            selected = column_sum(repaired_ptr, t.to(tl.int64) * programs, programs, 0, 2, BLOCK)
            masked = column_sum(repaired_ptr, t.to(tl.int64) * programs, programs, 1, 2, BLOCK)
        else:
            first, settles = tl.load(facts + SETTLE_AT), tl.load(facts + SETTLES).to(tl.int32)
            tied = tied_ptr + t.to(tl.int64) * PARTIALS
            selected += column_sum(settled_ptr, first, settles, 0, PARTIALS, BLOCK) + tl.load(tied)
            masked += column_sum(settled_ptr, first, settles, 4, PARTIALS, BLOCK) + tl.load(tied + 4)
    above, below = tl.load(row + ABOVE).to(tl.float64), tl.load(row + BELOW).to(tl.float64)
    if FIXED:  # as they are written, not as they were rounded to be multiplied with
        dense = tl.load(ranks + MODE) == DENSE
        above = tl.where(dense, 1.0, tl.load(hyper_ptr + SELECTED))
        below = tl.where(dense, 1.0, tl.load(hyper_ptr + REST))
    tl.store(out + 0, selected)
    tl.store(out + 1, above)
    tl.store(out + 2, below)
    tl.store(out + 3, column_sum(partials_ptr, at, rows, 1, PARTIALS, BLOCK))
    tl.store(out + 4, column_sum(partials_ptr, at, rows, 2, PARTIALS, BLOCK))
    tl.store(out + 5, column_sum(partials_ptr, at, rows, 3, PARTIALS, BLOCK))
    tl.store(out + 6, masked)
