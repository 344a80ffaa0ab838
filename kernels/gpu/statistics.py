"""Sums over tensors, deterministic: what strengths are made of before the step, and what a step reports after it.

Each program adds up its elements in float32 in a fixed order and writes one row; one program a tensor then adds up the
rows in float64, also in a fixed order. No atomics, so the same bits in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .config import (
    ABOVE,
    AVERAGE,
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
    SUMS,
    TIED,
)
from .elements import load_moved, pointers_of, read, row_of, select
from .numbers import CAP, REST, SELECTED, SMOOTHING, TEMPERATURE
from .random import sample_position


@triton.jit
def _add_up(out, chosen, g, u, m, mask, CFG: tl.constexpr):
    """One program's row for this strength."""
    chosen = chosen & mask
    if CFG.strength == "mean_preserving":
        tl.store(out, tl.sum(chosen.to(tl.float32)))
    elif CFG.strength == "norm_preserving":
        x = u
        if CFG.of == "momentum":
            x = m
        elif CFG.of == "gradient":
            x = g
        squares = tl.where(mask, x * x, 0.0)
        tl.store(out, tl.sum(tl.where(chosen, squares, 0.0)))
        tl.store(out + 1, tl.sum(tl.where(chosen, 0.0, squares)))
    elif CFG.strength == "alignment":
        m, g = tl.where(mask, m, 0.0), tl.where(mask, g, 0.0)
        tl.store(out, tl.sum(m * g))
        tl.store(out + 1, tl.sum(m * m))
        tl.store(out + 2, tl.sum(g * g))


@triton.jit
def sums_kernel(
    ranks_ptr, sums_ptr, work_ptr, pointers_ptr, numbers_ptr, facts_ptr, keys_ptr,
    FUNCTION: tl.constexpr, CFG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK elements of one tensor a program: what the strength needs of them, before anything moves.

    Reads what selection and norm are made of (agreement and mean, or norm of the momentum: gradient and first moment, 8
    bytes an element in float32), at drawn positions where the estimate is sampled. Writes 16 bytes a program.
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
    _add_up(sums_ptr + (tl.load(facts + SUM_AT) + part) * SUM_COLUMNS, chosen, g, u, m, mask, CFG)


@triton.jit
def seen_kernel(ranks_ptr, work_ptr, pointers_ptr, facts_ptr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
                CFG: tl.constexpr):  # fmt: skip
    """Sets SEEN where a tensor's momentum before the step is anything but zero; a program looks at PARTS blocks.

    Stops where somebody else has seen it: after the first step, little more is read than one block a tensor.
    """
    program = tl.program_id(0)
    t, part = tl.load(work_ptr + 2 * program), tl.load(work_ptr + 2 * program + 1)
    seen = row_of(ranks_ptr, t, RANKS) + SEEN
    pointers, numel = pointers_of(pointers_ptr, t), tl.load(row_of(facts_ptr, t, FACTS) + NUMEL)
    start = part.to(tl.int64) * (BLOCK * PARTS)
    for i in range(PARTS):
        if tl.load(seen, volatile=True) == 0:
            offs = start + i * BLOCK + tl.arange(0, BLOCK)
            if CFG.rule == "given":
                previous = read(pointers, offs, offs < numel, FOURTH, CFG.fourth, False)
            else:
                previous = read(pointers, offs, offs < numel, FIRST, CFG.first, False)
            if tl.sum((previous != 0).to(tl.int32)) > 0:
                tl.store(seen, tl.full((), 1, tl.int64))


@triton.jit
def _column_sum(table, at, rows, COLUMN: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of one column over these rows, in float64."""
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, rows, BLOCK):
        i = first + tl.arange(0, BLOCK)
        total += tl.load(table + (at + i) * WIDTH + COLUMN, mask=i < rows, other=0.0).to(tl.float64)
    return tl.sum(total)


@triton.jit
def _is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _mean_preserving(count, numel, rest, cap):
    share = count / numel
    value = (1.0 - rest * (1.0 - share)) / tl.maximum(share, 0.5 / numel)
    return tl.where(count > 0, tl.minimum(value, cap), 1.0)


@triton.jit
def _norm_preserving(chosen, others, rest, cap):
    wanted = tl.maximum(chosen + others - rest * rest * others, 0.0)
    value = tl.minimum(tl.sqrt(wanted / tl.where(chosen == 0, 1.0, chosen)), cap)
    return tl.where((chosen != 0) & _is_finite(chosen + others), value, 1.0)


@triton.jit
def _alignment(average_ptr, dot, momentum_sq, grad_sq, temperature, smoothing):
    norms = tl.sqrt(momentum_sq) * tl.sqrt(grad_sq)
    cosine = tl.where(norms == 0, 0.0, dot / tl.where(norms == 0, 1.0, norms))
    cosine = tl.where(_is_finite(cosine), cosine, 0.0)
    aligned = 1.0 / (1.0 + tl.exp(-cosine / temperature))
    new = (smoothing * tl.load(average_ptr).to(tl.float64) + (1.0 - smoothing) * aligned).to(tl.float32)
    tl.store(average_ptr, new)
    return new.to(tl.float64)


@triton.jit
def strengths_kernel(
    numbers_ptr, sums_ptr, hyper_ptr, pointers_ptr, ranks_ptr, facts_ptr, CFG: tl.constexpr, BLOCK: tl.constexpr
):
    """One tensor a program: from the rows of sums to the two multipliers, float64 rounded once. Moves the average."""
    t = tl.program_id(0)
    facts, row = row_of(facts_ptr, t, FACTS), row_of(numbers_ptr, t, NUMBERS)
    at, rows = tl.load(facts + SUM_AT), tl.load(facts + SUMS).to(tl.int32)
    rest, cap = tl.load(hyper_ptr + REST), tl.load(hyper_ptr + CAP)
    first = _column_sum(sums_ptr, at, rows, 0, SUM_COLUMNS, BLOCK)
    if CFG.strength == "mean_preserving":
        shift = tl.load(facts + SUM_SHIFT)
        sampled = tl.full((), 8, tl.int64) << tl.maximum(shift, 0)
        above = _mean_preserving(first, tl.where(shift < 0, tl.load(facts + NUMEL), sampled).to(tl.float64), rest, cap)
    elif CFG.strength == "norm_preserving":
        above = _norm_preserving(first, _column_sum(sums_ptr, at, rows, 1, SUM_COLUMNS, BLOCK), rest, cap)
    else:
        average_ptr = tl.load(pointers_of(pointers_ptr, t) + AVERAGE).to(tl.pointer_type(tl.float32))
        second = _column_sum(sums_ptr, at, rows, 1, SUM_COLUMNS, BLOCK)
        third = _column_sum(sums_ptr, at, rows, 2, SUM_COLUMNS, BLOCK)
        above = _alignment(average_ptr, first, second, third, tl.load(hyper_ptr + TEMPERATURE),
                           tl.load(hyper_ptr + SMOOTHING))  # fmt: skip
    dense = tl.load(row_of(ranks_ptr, t, RANKS) + MODE) == DENSE
    tl.store(row + ABOVE, tl.where(dense, 1.0, above).to(tl.float32))
    tl.store(row + BELOW, tl.where(dense, 1.0, rest).to(tl.float32))


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
    selected = _column_sum(partials_ptr, at, rows, 0, PARTIALS, BLOCK)
    masked = _column_sum(partials_ptr, at, rows, 4, PARTIALS, BLOCK)
    if CFG.bracketed:
        if tl.load(ranks + TIED) < 0:  # the repair has counted everything anew
            selected = _column_sum(repaired_ptr, t.to(tl.int64) * programs, programs, 0, 2, BLOCK)
            masked = _column_sum(repaired_ptr, t.to(tl.int64) * programs, programs, 1, 2, BLOCK)
        else:
            first, settles = tl.load(facts + SETTLE_AT), tl.load(facts + SETTLES).to(tl.int32)
            tied = tied_ptr + t.to(tl.int64) * PARTIALS
            selected += _column_sum(settled_ptr, first, settles, 0, PARTIALS, BLOCK) + tl.load(tied)
            masked += _column_sum(settled_ptr, first, settles, 4, PARTIALS, BLOCK) + tl.load(tied + 4)
    above, below = tl.load(row + ABOVE).to(tl.float64), tl.load(row + BELOW).to(tl.float64)
    if FIXED:  # as they are written, not as they were rounded to be multiplied with
        dense = tl.load(ranks + MODE) == DENSE
        above = tl.where(dense, 1.0, tl.load(hyper_ptr + SELECTED))
        below = tl.where(dense, 1.0, tl.load(hyper_ptr + REST))
    tl.store(out + 0, selected)
    tl.store(out + 1, above)
    tl.store(out + 2, below)
    tl.store(out + 3, _column_sum(partials_ptr, at, rows, 1, PARTIALS, BLOCK))
    tl.store(out + 4, _column_sum(partials_ptr, at, rows, 2, PARTIALS, BLOCK))
    tl.store(out + 5, _column_sum(partials_ptr, at, rows, 3, PARTIALS, BLOCK))
    tl.store(out + 6, masked)
