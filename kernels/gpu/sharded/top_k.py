"""Exactly the K largest scores of sharded tensors: the kernels that each rank runs between the collectives.

A radix search over the keys, eight bits a round; `kernels/sharded/top_k.py` is the definition and says why. A program
works on a *span*, SPAN neighbours of one shard. Its keys are kept from round to round, SPAN for each program; those
behind the shard's end are 0, which is also NaN's key.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..device.config import CUTOFF, FACTS, HIGH, LEFT, NUMBERS, NUMEL, RANKS, TIED, WANTED
from ..device.elements import is_aligned, pointers_of, row_of
from ..device.scores import LAST, descend, keys_at

BINS = tl.constexpr(256)
NOTHING = tl.constexpr(0xFFFFFFFF)  # a key that no score has


@triton.jit
def _load(keys_ptr, program, at, BLOCK: tl.constexpr, SPAN: tl.constexpr):
    """A block of a program's keys."""
    first = keys_ptr + program.to(tl.int64) * SPAN + at
    return tl.load(first + tl.arange(0, BLOCK)).to(tl.uint32, bitcast=True)


@triton.jit
def _count_block(keys_ptr, i, mask, pointers, row, FAST: tl.constexpr, CFG: tl.constexpr):
    key, _, _, _ = keys_at(pointers, row, i, mask, FAST, CFG)
    if not FAST:
        key = tl.where(mask, key, 0)
    tl.store(keys_ptr, key.to(tl.int32, bitcast=True))
    return tl.histogram((key >> 24).to(tl.int32), BINS, mask=key != 0)


@triton.jit
def keys_kernel(
    keys_ptr, counts_ptr, work_ptr, pointers_ptr, numbers_ptr, facts_ptr,
    SPAN: tl.constexpr, BLOCK: tl.constexpr, CFG: tl.constexpr,
):  # fmt: skip
    """Store a span's keys, and count their highest bytes: int32 [tensors, 256], which has to be zero before.

    Reads the tensors that a score is made of (12 bytes an element of AdamW in float32), writes 4.
    """
    program = tl.program_id(0)
    t, part = tl.load(work_ptr + 2 * program), tl.load(work_ptr + 2 * program + 1)
    pointers, row = pointers_of(pointers_ptr, t), row_of(numbers_ptr, t, NUMBERS)
    numel, start = tl.load(row_of(facts_ptr, t, FACTS) + NUMEL), part.to(tl.int64) * SPAN
    whole = (start + SPAN <= numel) & is_aligned(pointers)
    counts = tl.zeros([BINS], tl.int32)
    for at in range(0, SPAN, BLOCK):
        i = tl.multiple_of(start + at, BLOCK) + tl.arange(0, BLOCK)
        here = keys_ptr + program.to(tl.int64) * SPAN + at + tl.arange(0, BLOCK)
        if whole:
            counts += _count_block(here, i, i >= 0, pointers, row, True, CFG)
        else:
            counts += _count_block(here, i, i < numel, pointers, row, False, CFG)
    tl.atomic_add(counts_ptr + t * BINS + tl.arange(0, BINS), counts, mask=counts > 0, sem="relaxed")


@triton.jit
def count_kernel(counts_ptr, keys_ptr, work_ptr, ranks_ptr, SHIFT: tl.constexpr, SPAN: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    """Count the bytes at bit SHIFT of the keys that begin with the known bytes of the K-th. Reads 4 bytes a key."""
    program = tl.program_id(0)
    t = tl.load(work_ptr + 2 * program)
    prefix = tl.load(row_of(ranks_ptr, t, RANKS) + HIGH).to(tl.uint32)
    counts = tl.zeros([BINS], tl.int32)
    for at in range(0, SPAN, BLOCK):
        key = _load(keys_ptr, program, at, BLOCK, SPAN)
        inside = ((key >> (SHIFT + 8)) == prefix) & (key != 0)
        counts += tl.histogram(((key >> SHIFT) & 255).to(tl.int32), BINS, mask=inside)
    tl.atomic_add(counts_ptr + t * BINS + tl.arange(0, BINS), counts, mask=counts > 0, sem="relaxed")


@triton.jit
def narrow_kernel(ranks_ptr, counts_ptr, FIRST: tl.constexpr, FINAL: tl.constexpr):
    """From all ranks' counts of one tensor a program, find its K-th key's next byte (HIGH), and its rank there (LEFT).

    FINAL: keys above the K-th are selected, and none yet of those that equal it (TIED is their number). If no score is
    a number, nothing is selected.
    """
    t = tl.program_id(0)
    ranks = row_of(ranks_ptr, t, RANKS)
    counts = tl.load(counts_ptr + t * BINS + tl.arange(0, BINS))
    if FIRST:
        left = tl.minimum(tl.load(ranks + WANTED), tl.sum(counts).to(tl.int64))
        prefix = left * 0
    else:
        left, prefix = tl.load(ranks + LEFT), tl.load(ranks + HIGH)
    digit, rest, among = descend(counts, left.to(tl.int32))
    prefix = (prefix << 8) | digit.to(tl.int64)
    if FINAL:
        prefix = tl.where(left > 0, prefix, prefix * 0 + NOTHING)
        tl.store(ranks + CUTOFF, left * 0 - 1)
        tl.store(ranks + TIED, among.to(tl.int64))
    tl.store(ranks + HIGH, prefix)
    tl.store(ranks + LEFT, rest.to(tl.int64))


@triton.jit
def equals_kernel(equals_ptr, keys_ptr, work_ptr, ranks_ptr, SPAN: tl.constexpr, BLOCK: tl.constexpr):
    """Count the keys of each span that equal the K-th: int32 [programs]. Reads 4 bytes a key."""
    program = tl.program_id(0)
    wanted = tl.load(row_of(ranks_ptr, tl.load(work_ptr + 2 * program), RANKS) + HIGH).to(tl.uint32)
    found = tl.zeros([BLOCK], tl.int32)
    for at in range(0, SPAN, BLOCK):
        found += (_load(keys_ptr, program, at, BLOCK, SPAN) == wanted).to(tl.int32)
    tl.store(equals_ptr + program, tl.sum(found))


@triton.jit
def cells_kernel(table_ptr, equals_ptr, spans_ptr, cells, BLOCK: tl.constexpr):
    """Store one tensor's number of keys equal to the K-th a program, in the column of its cell: int32 [tensors, cells].

    `spans_ptr` is int64 [tensors, 4]: a tensor's first span, the number of its spans, its cell, whether it is counted.
    """
    t = tl.program_id(0)
    spans = spans_ptr + t * 4
    first, count, cell = tl.load(spans), tl.load(spans + 1), tl.load(spans + 2)
    found = tl.zeros([BLOCK], tl.int32)
    for at in range(0, count, BLOCK):
        i = at + tl.arange(0, BLOCK)
        found += tl.load(equals_ptr + first + i, mask=i < count, other=0)
    tl.store(table_ptr + t * cells + cell, tl.where(tl.load(spans + 3) > 0, tl.sum(found), 0))


@triton.jit
def cutoff_kernel(ranks_ptr, table_ptr, equals_ptr, keys_ptr, spans_ptr, cells, CELLS: tl.constexpr,
                  SPAN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """From all ranks' cells of one tensor a program, find the last flat index here that a tie is selected at (CUTOFF).

    Reads a shard's numbers of equal keys, and one span of its keys. CELLS is a power of two, not less than `cells`.
    """
    t = tl.program_id(0)
    spans, ranks = spans_ptr + t * 4, row_of(ranks_ptr, t, RANKS)
    first, count, cell = tl.load(spans), tl.load(spans + 1), tl.load(spans + 2)
    wanted = tl.load(ranks + HIGH).to(tl.uint32)
    others = tl.arange(0, CELLS)
    before = tl.sum(tl.load(table_ptr + t * cells + others, mask=others < cell, other=0).to(tl.int64))
    left = tl.load(ranks + LEFT) - before
    behind, span, rest = left * 0, left * 0 - 1, left * 0  # those in the spans before; the span of the last one
    for at in range(0, count, BLOCK):
        i = at + tl.arange(0, BLOCK)
        here = tl.load(equals_ptr + first + i, mask=i < count, other=0).to(tl.int64)
        upto = tl.cumsum(here, 0) + behind
        hit = (upto - here < left) & (left <= upto)
        span = tl.maximum(span, tl.max(tl.where(hit, i, -1)))
        rest += tl.sum(tl.where(hit, left - (upto - here), 0))
        behind += tl.sum(here)
    cutoff = tl.where(left > behind, left * 0 + LAST, left * 0 - 1)
    if span >= 0:
        for inside in range(0, SPAN, BLOCK):
            equal = (_load(keys_ptr, first + span, inside, BLOCK, SPAN) == wanted).to(tl.int64)
            places = span * SPAN + inside + tl.arange(0, BLOCK)
            cutoff = tl.maximum(cutoff, tl.max(tl.where((tl.cumsum(equal, 0) == rest) & (equal > 0), places, -1)))
            rest -= tl.sum(equal)
    tl.store(ranks + CUTOFF, cutoff)
