"""Strengths: from the sums of a tensor to its two multipliers, as `kernels/reference/strengths.py`, in float64."""

from __future__ import annotations

import triton
import triton.language as tl

from .config import (
    AVERAGE,
    CHUNK_AT,
    CHUNKS,
    DENSE,
    FACTS,
    MODE,
    NUMBERS,
    NUMEL,
    RANKS,
    SETTLE_AT,
    SETTLES,
    STRENGTH_REST,
    STRENGTH_SELECTED,
    SUM_AT,
    SUM_COLUMNS,
    SUM_SHIFT,
    SUMS,
    TIED,
)
from .elements import pointers_of, row_of
from .numbers import CAP, REST, SMOOTHING, TEMPERATURE, group_row
from .share import mean_preserving


@triton.jit
def column_sum(table, at, rows, COLUMN: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of one column over these rows, in float64."""
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, rows, BLOCK):
        i = first + tl.arange(0, BLOCK)
        total += tl.load(table + (at + i) * WIDTH + COLUMN, mask=i < rows, other=0.0).to(tl.float64)
    return tl.sum(total)


@triton.jit
def is_finite(x):
    """True if a number is neither infinite nor NaN."""
    return tl.abs(x) < float("inf")


@triton.jit
def _norm_preserving(selected_sq, rest_sq, rest, cap):
    wanted = tl.maximum(selected_sq + rest_sq - rest * rest * rest_sq, 0.0)
    value = tl.minimum(tl.sqrt(wanted / tl.where(selected_sq == 0, 1.0, selected_sq)), cap)
    return tl.where((selected_sq != 0) & is_finite(selected_sq + rest_sq), value, 1.0)


@triton.jit
def _alignment(average_ptr, dot, momentum_sq, grad_sq, temperature, smoothing):
    norms = tl.sqrt(momentum_sq) * tl.sqrt(grad_sq)
    cosine = tl.where(norms == 0, 0.0, dot / tl.where(norms == 0, 1.0, norms))
    cosine = tl.where(is_finite(cosine), cosine, 0.0)
    aligned = 1.0 / (1.0 + tl.exp(-cosine / temperature))
    new = (smoothing * tl.load(average_ptr).to(tl.float64) + (1.0 - smoothing) * aligned).to(tl.float32)
    tl.store(average_ptr, new)
    return new.to(tl.float64)


@triton.jit
def multipliers_of(sums, apart, rows, hyper, pointers, facts, WIDTH: tl.constexpr, CFG: tl.constexpr,
                   BLOCK: tl.constexpr):  # fmt: skip
    """One tensor's two multipliers, float64, from its rows of sums. Moves the average of an alignment.

    `sums` is the tensor's first row. Columns lie `apart` numbers apart, rows WIDTH.
    """
    rest, cap = tl.load(hyper + REST), tl.load(hyper + CAP)
    first = column_sum(sums, 0, rows, 0, WIDTH, BLOCK)
    if CFG.strength == "mean_preserving":
        shift = tl.load(facts + SUM_SHIFT)
        sampled = tl.full((), 8, tl.int64) << tl.maximum(shift, 0)
        numel = tl.where(shift < 0, tl.load(facts + NUMEL), sampled).to(tl.float64)
        selected = mean_preserving(first, numel, rest, cap)
    elif CFG.strength == "norm_preserving":
        selected = _norm_preserving(first, column_sum(sums + apart, 0, rows, 0, WIDTH, BLOCK), rest, cap)
    else:
        tl.static_assert(CFG.strength == "alignment", "the GPU has no strength of this kind")
        average_ptr = tl.load(pointers + AVERAGE).to(tl.pointer_type(tl.float32))
        second = column_sum(sums + apart, 0, rows, 0, WIDTH, BLOCK)
        third = column_sum(sums + 2 * apart, 0, rows, 0, WIDTH, BLOCK)
        selected = _alignment(average_ptr, first, second, third, tl.load(hyper + TEMPERATURE),
                              tl.load(hyper + SMOOTHING))  # fmt: skip
    return selected, rest


@triton.jit
def with_settled(selected_sq, rest_sq, settled_ptr, tied_ptr, repaired_ptr, programs, ranks, facts,
                 BLOCK: tl.constexpr):  # fmt: skip
    """A tensor's sums over the selected and over the rest, from those of a count: with what was settled after it.

    A repair, whose `programs` have a row of two sums each, has added up everything anew.
    """
    if tl.load(ranks + TIED) < 0:
        repaired = repaired_ptr + tl.program_id(0).to(tl.int64) * programs * 2
        selected_sq = column_sum(repaired, 0, programs, 0, 2, BLOCK)
        rest_sq = column_sum(repaired, 0, programs, 1, 2, BLOCK)
    else:
        settles, first = tl.load(facts + SETTLES).to(tl.int32), tl.load(facts + SETTLE_AT)
        tied = tied_ptr + tl.program_id(0).to(tl.int64) * 2
        selected_sq += column_sum(settled_ptr, first, settles, 0, 2, BLOCK)
        rest_sq += column_sum(settled_ptr, first, settles, 1, 2, BLOCK)
        selected_sq += tl.load(tied).to(tl.float64)
        rest_sq += tl.load(tied + 1).to(tl.float64)
    return selected_sq, rest_sq


@triton.jit
def ranked_strengths_kernel(
    numbers_ptr, sums_ptr, settled_ptr, tied_ptr, repaired_ptr, hyper_ptr, ranks_ptr, facts_ptr, programs, apart,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Store one tensor's two multipliers a program, which preserve a norm, from sums that were formed while ranking.

    Those of the pass over everything lie in two columns `apart` numbers apart, a row for each block; those of what was
    settled in rows of two for each program of settle; those of the ties in one. A repair has added up everything anew,
    in rows of two for each of its `programs`. Reads 8 bytes for each of these.
    """
    t = tl.program_id(0)
    facts, ranks, row = row_of(facts_ptr, t, FACTS), row_of(ranks_ptr, t, RANKS), row_of(numbers_ptr, t, NUMBERS)
    at, chunks = tl.load(facts + CHUNK_AT), tl.load(facts + CHUNKS).to(tl.int32)
    selected_sq = column_sum(sums_ptr, at, chunks, 0, 1, BLOCK)
    rest_sq = column_sum(sums_ptr + apart, at, chunks, 0, 1, BLOCK)
    selected_sq, rest_sq = with_settled(selected_sq, rest_sq, settled_ptr, tied_ptr, repaired_ptr, programs, ranks,
                                        facts, BLOCK)  # fmt: skip
    hyper = group_row(hyper_ptr, facts)
    rest, dense = tl.load(hyper + REST), tl.load(ranks + MODE) == DENSE
    selected = _norm_preserving(selected_sq, rest_sq, rest, tl.load(hyper + CAP))
    tl.store(row + STRENGTH_SELECTED, tl.where(dense, 1.0, selected).to(tl.float32))
    tl.store(row + STRENGTH_REST, tl.where(dense, 1.0, rest).to(tl.float32))


@triton.jit
def strength_of_count(hyper_ptr, facts, count):
    """The multiplier, float32, of a tensor of which `count` elements are selected and whose mean is preserved."""
    hyper, numel = group_row(hyper_ptr, facts), tl.load(facts + NUMEL).to(tl.float64)
    return mean_preserving(count.to(tl.float64), numel, tl.load(hyper + REST), tl.load(hyper + CAP)).to(tl.float32)


@triton.jit
def strengths_kernel(
    numbers_ptr, sums_ptr, hyper_ptr, pointers_ptr, ranks_ptr, facts_ptr, CFG: tl.constexpr, BLOCK: tl.constexpr
):
    """Add up one tensor's rows of sums a program, and store its two multipliers. Moves the average of an alignment."""
    t = tl.program_id(0)
    facts, row = row_of(facts_ptr, t, FACTS), row_of(numbers_ptr, t, NUMBERS)
    at, rows = tl.load(facts + SUM_AT), tl.load(facts + SUMS).to(tl.int32)
    pointers, sums = pointers_of(pointers_ptr, t), sums_ptr + at * SUM_COLUMNS
    hyper = group_row(hyper_ptr, facts)
    selected, rest = multipliers_of(sums, 1, rows, hyper, pointers, facts, SUM_COLUMNS, CFG, BLOCK)
    dense = tl.load(row_of(ranks_ptr, t, RANKS) + MODE) == DENSE
    tl.store(row + STRENGTH_SELECTED, tl.where(dense, 1.0, selected).to(tl.float32))
    tl.store(row + STRENGTH_REST, tl.where(dense, 1.0, rest).to(tl.float32))
