"""Sums over tensors, deterministic: those that strengths are made of, before the step, and statistics, after it.

Each program adds up its elements in float32 in a fixed order and writes one row; one program a tensor then adds up the
rows in float64, also in a fixed order. No atomics, so the same bits in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .config import (
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
    PICKED,
    RANKS,
    SEEN,
    SETTLE_AT,
    SETTLES,
    STRENGTH_REST,
    STRENGTH_SELECTED,
    SUM_AT,
    SUM_COLUMNS,
    SUM_SHIFT,
    TIED,
)
from .elements import is_aligned, load_moved, pointers_of, read, row_of, store_moments
from .numbers import REST, SELECTED, group_row
from .random import sample_position
from .rounding import INTERPRETED
from .scores import store_marks
from .selections import select
from .strengths import column_sum


@triton.jit
def normed(g, u, m, CFG: tl.constexpr):
    """x: the quantity whose norm a strength keeps."""
    x = u
    if CFG.of == "momentum":
        x = m
    elif CFG.of == "gradient":
        x = g
    return x


@triton.jit
def _add_two(a, b, c, d):
    return a + c, b + d


@triton.jit
def two_sums(a, b):
    """The sums of two blocks in one reduction, which share its barriers."""
    if INTERPRETED:  # one element after the other there
        first, second = tl.sum(a), tl.sum(b)
    else:
        first, second = tl.reduce((a, b), 0, _add_two)
    return first, second


@triton.jit
def _add_three(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def three_sums(a, b, c):
    """The sums of three blocks in one reduction, which share its barriers."""
    if INTERPRETED:  # one element after the other there
        first, second, third = tl.sum(a), tl.sum(b), tl.sum(c)
    else:
        first, second, third = tl.reduce((a, b, c), 0, _add_three)
    return first, second, third


@triton.jit
def sums_of_squares(chosen, mask, g, u, m, CFG: tl.constexpr):
    """The sums over the selected and over the rest of these elements, of the squares whose sum a strength keeps."""
    x = normed(g, u, m, CFG)
    squares = tl.where(mask, x * x, 0.0)
    return two_sums(tl.where(chosen, squares, 0.0), tl.where(chosen, 0.0, squares))


@triton.jit
def store_sums(out, apart, chosen, g, u, m, mask, CFG: tl.constexpr):
    """Store the sums over these elements that this strength needs, in up to three columns `apart` numbers apart."""
    if CFG.strength == "mean_preserving":
        tl.store(out, tl.sum((chosen & mask).to(tl.float32)))
    elif CFG.strength == "norm_preserving":
        selected_sq, rest_sq = sums_of_squares(chosen, mask, g, u, m, CFG)
        tl.store(out, selected_sq)
        tl.store(out + apart, rest_sq)
    elif CFG.strength == "alignment":
        m, g = tl.where(mask, m, 0.0), tl.where(mask, g, 0.0)
        dot, momentum_sq, grad_sq = three_sums(m * g, m * m, g * g)
        tl.store(out, dot)
        tl.store(out + apart, momentum_sq)
        tl.store(out + 2 * apart, grad_sq)


@triton.jit
def _sum(out, marks_ptr, offs, mask, pointers, row, ranks, facts, keys, FUNCTION: tl.constexpr, FAST: tl.constexpr,
         MOVES: tl.constexpr, CFG: tl.constexpr):  # fmt: skip
    """One program's row: the sums of these elements that this strength needs. MOVES: also their moments and marks."""
    _, g, u, m, previous, x, y, z = load_moved(pointers, offs, mask, row, False, FAST, CFG)
    if MOVES:
        store_moments(pointers, offs, x, y, z, mask, FAST, CFG)
    chosen, _, _ = select(offs, g, u, m, previous, row, ranks, facts, keys, FUNCTION, False, CFG)
    if MOVES:
        store_marks(marks_ptr, chosen & mask, CFG)
    store_sums(out, 1, chosen, g, u, m, mask, CFG)


@triton.jit
def sums_kernel(
    sums_ptr, marks_ptr, work_ptr, pointers_ptr, numbers_ptr, ranks_ptr, facts_ptr, keys_ptr,
    FUNCTION: tl.constexpr, MOVES: tl.constexpr, CFG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up the sums of a strength over BLOCK elements of one tensor a program, before anything moves.

    Reads the tensors that selection and norm are made of: for agreement with a mean, or with the norm of the momentum,
    gradient and first moment, 8 bytes an element of AdamW in float32. If the estimate is sampled and the tensor is
    larger than the sample, it reads at drawn places only. Writes 16 bytes a program.

    MOVES also stores the moments, which are final, and a bit an element that says if it is selected: AdamW in float32
    reads 12 and writes 8.125 bytes an element. Then the step reads neither the gradient nor writes moments. The sums
    have to be made of whole tensors, and BLOCK has to be `CFG.block`.
    """
    program = tl.program_id(0)
    t, part = tl.load(work_ptr + 2 * program), tl.load(work_ptr + 2 * program + 1)
    facts, row, keys = row_of(facts_ptr, t, FACTS), row_of(numbers_ptr, t, NUMBERS), row_of(keys_ptr, t, KEYS)
    ranks, pointers = row_of(ranks_ptr, t, RANKS), pointers_of(pointers_ptr, t)
    numel, shift = tl.load(facts + NUMEL), tl.load(facts + SUM_SHIFT)
    start, out = part.to(tl.int64) * BLOCK, sums_ptr + (tl.load(facts + SUM_AT) + part) * SUM_COLUMNS
    # Drawn places are compiled in only where there is a sample: with them, the indices of the other two branches take
    # another layout, for which 8 bytes an element go through shared memory.
    i = tl.multiple_of(start, BLOCK) + tl.arange(0, BLOCK)
    marks = marks_ptr + program.to(tl.int64) * (BLOCK // 32)
    if (shift < 0) & (start + BLOCK <= numel) & is_aligned(pointers):
        _sum(out, marks, i, i >= 0, pointers, row, ranks, facts, keys, FUNCTION, True, MOVES, CFG)
    elif shift < 0:
        _sum(out, marks, i, i < numel, pointers, row, ranks, facts, keys, FUNCTION, False, MOVES, CFG)
    elif CFG.estimate == "sampled":
        first = tl.load(keys + 2).to(tl.uint32, bitcast=True)
        second = tl.load(keys + 3).to(tl.uint32, bitcast=True)
        mask = i < (tl.full((), 8, tl.int64) << shift)
        places = tl.where(mask, sample_position(i, numel, shift, first, second), 0)
        _sum(out, marks, places, mask, pointers, row, ranks, facts, keys, FUNCTION, False, False, CFG)


@triton.jit
def seen_kernel(ranks_ptr, work_ptr, pointers_ptr, facts_ptr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
                CFG: tl.constexpr):  # fmt: skip
    """Set SEEN of a tensor if its momentum before the step is not zero everywhere. A program looks at PARTS blocks.

    A program reads nothing if SEEN is set already. As one block of each tensor is looked at in a launch before, little
    more than that is read of most tensors.
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
                previous = read(pointers, offs, offs < numel, FOURTH, CFG.fourth, False)
            else:
                previous = read(pointers, offs, offs < numel, FIRST, CFG.first, False)
            found = found | (previous != 0).to(tl.int32)
        if tl.sum(found) > 0:
            tl.store(seen, tl.full((), 1, tl.int64))


@triton.jit
def _five_sums(partials_ptr, at, count, rows, BLOCK: tl.constexpr):
    """The five columns of partial statistics, added up over `count` rows from `at` on, in float64."""
    a, b, c = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    d, e = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for first in range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK)
        inside, row = i < count, partials_ptr + at + i
        a += tl.load(row, mask=inside, other=0.0).to(tl.float64)
        b += tl.load(row + rows, mask=inside, other=0.0).to(tl.float64)
        c += tl.load(row + 2 * rows, mask=inside, other=0.0).to(tl.float64)
        d += tl.load(row + 3 * rows, mask=inside, other=0.0).to(tl.float64)
        e += tl.load(row + 4 * rows, mask=inside, other=0.0).to(tl.float64)
    return tl.sum(a), tl.sum(b), tl.sum(c), tl.sum(d), tl.sum(e)


@triton.jit
def report_kernel(
    out_ptr, partials_ptr, settled_ptr, tied_ptr, repaired_ptr, numbers_ptr, hyper_ptr, ranks_ptr, facts_ptr, programs,
    rows, FIXED: tl.constexpr, CFG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up one tensor's statistics a program: the seven sums of `spec.Sums`, float64, from all launches' rows."""
    t = tl.program_id(0)
    facts, ranks = row_of(facts_ptr, t, FACTS), row_of(ranks_ptr, t, RANKS)
    row, out = row_of(numbers_ptr, t, NUMBERS), out_ptr + t * 7
    at, count = tl.load(facts + CHUNK_AT), tl.load(facts + CHUNKS).to(tl.int32)
    selected, update_sq, grad_sq, update_grad, masked = _five_sums(partials_ptr, at, count, rows, BLOCK)
    if CFG.bracketed:
        if tl.load(ranks + TIED) < 0:  # the repair has counted everything anew
            selected = column_sum(repaired_ptr, t.to(tl.int64) * programs, programs, 0, 2, BLOCK)
            masked = column_sum(repaired_ptr, t.to(tl.int64) * programs, programs, 1, 2, BLOCK)
        else:
            first, settles = tl.load(facts + SETTLE_AT), tl.load(facts + SETTLES).to(tl.int32)
            tied = tied_ptr + t.to(tl.int64) * 2
            selected += column_sum(settled_ptr, first, settles, 0, 2, BLOCK) + tl.load(tied)
            masked += column_sum(settled_ptr, first, settles, 1, 2, BLOCK) + tl.load(tied + 1)
    if CFG.pending:
        tied = tied_ptr + t.to(tl.int64) * 2
        selected += tl.load(tied).to(tl.float64)
        masked += tl.load(tied + 1).to(tl.float64)
    if CFG.control:  # coordinates that stand still are counted, too
        selected = tl.load(ranks + PICKED).to(tl.float64)
    on_selected, on_rest = tl.load(row + STRENGTH_SELECTED).to(tl.float64), tl.load(row + STRENGTH_REST).to(tl.float64)
    if FIXED:  # the user's numbers, and not these as they were rounded to be multiplied with
        dense = tl.load(ranks + MODE) == DENSE
        hyper = group_row(hyper_ptr, facts)
        on_selected = tl.where(dense, 1.0, tl.load(hyper + SELECTED))
        on_rest = tl.where(dense, 1.0, tl.load(hyper + REST))
    tl.store(out + 0, selected)
    tl.store(out + 1, on_selected)
    tl.store(out + 2, on_rest)
    tl.store(out + 3, update_sq)
    tl.store(out + 4, grad_sq)
    tl.store(out + 5, update_grad)
    tl.store(out + 6, masked)
