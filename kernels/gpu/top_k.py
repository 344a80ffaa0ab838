"""Exactly the K largest scores of each tensor, without sorting: sample, count, settle, ties.

1. `sample_kernel` forms the scores at drawn positions, `rank_kernel` finds two keys which the K-th most likely lies
   between (a small tensor is its own sample: there it finds the K-th itself).
2. The pass over everything (`selective_step_kernel`) counts what is above the bracket, and leaves what is inside of it
   undecided: one bit an element, and a histogram.
3. `find_kernel` finds the histogram's bin that holds the K-th; `settle_kernel` decides every other bin, and lists the
   few elements of this one.
4. `ties_kernel` ranks those, equal scores by their index.
A bracket that missed and a list that overflowed are noted on the device, and mended there by `repair.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .config import (
    BRACKET,
    COUNTED,
    CUTOFF,
    DENSE,
    EXACT,
    FACTS,
    HIGH,
    LOW,
    MODE,
    NUMBERS,
    NUMEL,
    RANKS,
    SAMPLES,
    SAMPLES_AT,
    SHIFT,
    TIED,
    WANTED,
)
from .elements import load_moved, pointers_of, row_of
from .keys import key_of
from .random import sample_position
from .rules import score_of

DIGIT = tl.constexpr(2048)  # a key's 32 bits are ranked as digits of 11, 11 and 10 bits
LAST = tl.constexpr(0x7FFFFFFFFFFFFFFF)  # a cutoff behind every index


@triton.jit
def bin_of(key, low, high, BINS: tl.constexpr):
    """Which of the equal parts of the bracket a key lies in: monotone, and the same wherever it is computed."""
    scale = BINS / ((high - low).to(tl.float32) + 1.0)
    return tl.minimum(((key - low).to(tl.float32) * scale).to(tl.int32), BINS - 1)


@triton.jit
def count_scores(above, undecided, key, ranks, marks_ptr, histogram_ptr, BINS: tl.constexpr, CFG: tl.constexpr):
    """Note of a block what is above the bracket (a number) and what is undecided (a bit each, and a histogram)."""
    WORDS: tl.constexpr = CFG.block // 32
    tl.atomic_add(ranks + COUNTED, tl.sum(above.to(tl.int64)), sem="relaxed")
    bits = tl.reshape(undecided.to(tl.uint32), [WORDS, 32]) << tl.arange(0, 32).to(tl.uint32)[None, :]
    tl.store(marks_ptr + tl.arange(0, WORDS), tl.sum(bits, 1).to(tl.int32, bitcast=True))
    low, high = tl.load(ranks + LOW).to(tl.uint32), tl.load(ranks + HIGH).to(tl.uint32)
    where = tl.where(undecided, bin_of(key, low, high, BINS), 0)
    tl.atomic_add(histogram_ptr + where, 1, mask=undecided, sem="relaxed")


@triton.jit
def keys_at(pointers, row, offs, mask, FAST: tl.constexpr, CFG: tl.constexpr):
    """(key, update, gradient, parameter) of elements at any indices."""
    p, g, u, m, _, _, _, _ = load_moved(pointers, offs, mask, row, CFG.writes and CFG.rule != "given", FAST, CFG)
    return key_of(score_of(g, u, m, row, CFG)), u, g, p


@triton.jit
def sample_kernel(
    samples_ptr, work_ptr, pointers_ptr, numbers_ptr, facts_ptr, keys_ptr,
    CFG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The keys of up to BLOCK sampled scores of one tensor a program: reads what a score is made of at those places.

    Four bytes are written a sample; read are whole sectors of 32 bytes for 8 neighbours.
    """
    program = tl.program_id(0)
    t, part = tl.load(work_ptr + 2 * program), tl.load(work_ptr + 2 * program + 1)
    facts, keys, row = row_of(facts_ptr, t, FACTS), row_of(keys_ptr, t, 6), row_of(numbers_ptr, t, NUMBERS)
    numel, count, shift = tl.load(facts + NUMEL), tl.load(facts + SAMPLES), tl.load(facts + SHIFT)
    i = part.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    first = tl.load(keys + 2).to(tl.uint32, bitcast=True)
    second = tl.load(keys + 3).to(tl.uint32, bitcast=True)
    places = tl.where(shift < 0, i, sample_position(i, numel, tl.maximum(shift, 0), first, second))
    key, _, _, _ = keys_at(pointers_of(pointers_ptr, t), row, tl.where(mask, places, 0), mask, False, CFG)
    tl.store(samples_ptr + tl.load(facts + SAMPLES_AT) + i, key.to(tl.int32, bitcast=True), mask=mask)


@triton.jit
def _load_keys(samples, i, count):
    return tl.load(samples + i, mask=i < count, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def digits(samples, count, prefix, TAKEN: tl.constexpr, TO: tl.constexpr, BLOCK: tl.constexpr):
    """Histogram of the key digit that begins at bit TO, over the keys that begin with `prefix` (TAKEN bits)."""
    histogram = tl.zeros([DIGIT], tl.int32)
    for at in range(0, count, BLOCK):
        i = at + tl.arange(0, BLOCK)
        key = _load_keys(samples, i, count)
        inside = i < count
        if TAKEN > 0:
            inside = inside & ((key >> (32 - TAKEN)) == prefix)
        digit = (key >> TO) & (DIGIT - 1 if TAKEN < 22 else 1023)
        histogram += tl.histogram(tl.where(inside, digit, 0).to(tl.int32), DIGIT, mask=inside)
    return histogram


@triton.jit
def descend(histogram, rank):
    """(digit that holds the rank-th largest, its rank among the equal ones, how many those are)."""
    from_here = tl.sum(histogram) - tl.cumsum(histogram, 0) + histogram
    places = tl.arange(0, DIGIT)
    digit = tl.max(tl.where(from_here >= rank, places, 0))
    left = rank - tl.sum(tl.where(places > digit, histogram, 0))
    return digit.to(tl.uint32), left, tl.sum(tl.where(places == digit, histogram, 0))


@triton.jit
def _upper_bits(samples, count, rank, first, BLOCK: tl.constexpr):
    """The upper 22 bits of the rank-th largest key; `first` is the histogram of its first digit."""
    digit, left, _ = descend(first, rank)
    second, left, _ = descend(digits(samples, count, digit, 11, 10, BLOCK), left)
    return (digit << 11) | second, left


@triton.jit
def _cutoff(samples, count, key, left, BLOCK: tl.constexpr):
    """The index of the left-th key that is equal to `key`."""
    found = tl.full((), -1, tl.int64)
    for at in range(0, count, BLOCK):
        i = at + tl.arange(0, BLOCK)
        equal = ((_load_keys(samples, i, count) == key) & (i < count)).to(tl.int32)
        place = tl.cumsum(equal, 0)
        here = tl.max(tl.where((place == left) & (equal > 0), i, -1)).to(tl.int64)
        found = tl.maximum(found, here)
        left = left - tl.sum(equal)
    return found


@triton.jit
def _spread(samples, count, key, BLOCK: tl.constexpr):
    """The standard deviation of how many sampled keys are `key` or more: runs of 8 neighbours are what was drawn."""
    total, squares = tl.zeros([BLOCK // 8], tl.float32), tl.zeros([BLOCK // 8], tl.float32)
    for at in range(0, count, BLOCK):
        more = (_load_keys(samples, at + tl.arange(0, BLOCK), count) >= key).to(tl.float32)
        in_run = tl.sum(tl.reshape(more, [BLOCK // 8, 8]), 1)
        total += in_run
        squares += in_run * in_run
    runs = count.to(tl.float32) / 8
    mean = tl.sum(total) / runs
    return tl.sqrt(tl.maximum(tl.sum(squares) - runs * mean * mean, 0.0))


@triton.jit
def _ranked(samples, facts, count, whole, wanted, width, SAMPLED: tl.constexpr, BLOCK: tl.constexpr):
    """(LOW, HIGH, CUTOFF, MODE) of a tensor."""
    first = digits(samples, count, 0, 0, 21, BLOCK)
    if SAMPLED or whole:
        upper, left = _upper_bits(samples, count, wanted.to(tl.int32), first, BLOCK)
        lower, left, ties = descend(digits(samples, count, upper, 22, 0, BLOCK), left)
        key = (upper << 10) | lower
        cutoff = wanted * 0 + LAST
        if (left < ties) & whole:
            cutoff = _cutoff(samples, count, key, left, BLOCK)
        low, high, mode = key, key, wanted * 0 + EXACT
    else:
        place = wanted.to(tl.float64) / tl.load(facts + NUMEL).to(tl.float64) * count.to(tl.float64)
        near, _, _ = descend(first, tl.minimum(tl.maximum(place.to(tl.int32), 1), count))
        margin = width * _spread(samples, count, near << 21, BLOCK).to(tl.float64) + 2.0
        above, below = (place - margin).to(tl.int32), (place + margin).to(tl.int32) + 1
        high, low = tl.full((), 0xFFFFFFFF, tl.uint32), tl.full((), 0, tl.uint32)
        if above >= 1:
            upper, _ = _upper_bits(samples, count, above, first, BLOCK)
            high = (upper << 10) | 1023
        if below <= count:
            upper, _ = _upper_bits(samples, count, below, first, BLOCK)
            low = upper << 10
        cutoff, mode = wanted * 0 - 1, wanted * 0 + BRACKET
    return low, high, cutoff, mode


@triton.jit
def rank_kernel(ranks_ptr, samples_ptr, facts_ptr, tensors_ptr, width, SAMPLED: tl.constexpr, BLOCK: tl.constexpr):
    """One tensor a program: from its sampled keys to its threshold or its bracket. Reads the samples about four times.

    `width`: half the bracket in standard deviations. SAMPLED: the sample's own quantile is the threshold. What is
    WANTED of a tensor is the rank in it, of a sampled threshold the rank in the sample.
    """
    t = tl.load(tensors_ptr + tl.program_id(0))
    facts, ranks = row_of(facts_ptr, t, FACTS), row_of(ranks_ptr, t, RANKS)
    count, whole = tl.load(facts + SAMPLES).to(tl.int32), tl.load(facts + SHIFT) < 0
    samples = samples_ptr + tl.load(facts + SAMPLES_AT)
    wanted = tl.load(ranks + WANTED)
    if tl.load(ranks + MODE) != DENSE:
        low, high, cutoff, mode = _ranked(samples, facts, count, whole, wanted, width, SAMPLED, BLOCK)
        tl.store(ranks + HIGH, high.to(tl.int64))
        tl.store(ranks + LOW, low.to(tl.int64))
        tl.store(ranks + CUTOFF, cutoff)
        tl.store(ranks + MODE, mode)
    tl.store(ranks + COUNTED, wanted * 0)
    tl.store(ranks + TIED, wanted * 0)
