"""From a sample of its scores to a tensor's threshold or bracket.

Tensors with a drawn sample (up to 131,072 scores) are ranked by many programs in a few launches, digit by digit of the
key: the histogram of the first 11 bits comes with the sample, from it `spread_kernel` finds how far the sample's rank
may be off, `digits_kernel` counts the next bits, `bracket_kernel` reads off the result. A small tensor is its own
sample, and `whole_kernel` does all of it in one program.
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
    LARGE,
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
from .elements import pointers_of, row_of
from .random import sample_position
from .top_k import DIGIT, descend, keys_at

LAST = tl.constexpr(0x7FFFFFFFFFFFFFFF)  # a cutoff behind every index
SLOTS = tl.constexpr(3)  # histograms of a tensor: of the first digit, and two further ones


@triton.jit
def _slot(histograms_ptr, large, SLOT: tl.constexpr):
    return histograms_ptr + (large.to(tl.int64) * SLOTS + SLOT) * DIGIT


@triton.jit
def _digits_in(histograms_ptr, large, SLOT: tl.constexpr):
    """A histogram that earlier launches have filled."""
    return tl.load(_slot(histograms_ptr, large, SLOT) + tl.arange(0, DIGIT))


@triton.jit
def _add(histogram_ptr, digit, inside):
    """Count these digits into a histogram in memory. `tl.histogram` of so many bins took five times as long."""
    tl.atomic_add(histogram_ptr + digit, 1, mask=inside, sem="relaxed")


@triton.jit
def sample_kernel(
    samples_ptr, histograms_ptr, work_ptr, pointers_ptr, numbers_ptr, facts_ptr, keys_ptr,
    CFG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The keys of up to BLOCK sampled scores of one tensor a program: reads what a score is made of at those places.

    Four bytes are written a sample; read are whole sectors of 32 bytes for 8 neighbours. Counts the keys' first digits.
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
    if shift >= 0:
        _add(_slot(histograms_ptr, tl.load(facts + LARGE), 0), key >> 21, mask)


@triton.jit
def _load_keys(samples, i, count):
    return tl.load(samples + i, mask=i < count, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def _place(ranks, facts):
    """Where in the sample, counted from its largest, the wanted rank of the tensor is expected; float64."""
    count = tl.load(facts + SAMPLES).to(tl.float64)
    return tl.load(ranks + WANTED).to(tl.float64) / tl.load(facts + NUMEL).to(tl.float64) * count


@triton.jit
def spread_kernel(spreads_ptr, samples_ptr, histograms_ptr, work_ptr, ranks_ptr, facts_ptr, BLOCK: tl.constexpr):
    """For each run of 8 neighbours, how many of its keys are about the wanted rank or above: adds up the numbers and
    their squares. What was drawn are runs, and neighbours are alike, so their variance says how far the rank is off.
    """
    program = tl.program_id(0)
    t, part = tl.load(work_ptr + 2 * program), tl.load(work_ptr + 2 * program + 1)
    facts = row_of(facts_ptr, t, FACTS)
    large, count = tl.load(facts + LARGE), tl.load(facts + SAMPLES).to(tl.int32)
    place = _place(row_of(ranks_ptr, t, RANKS), facts).to(tl.int32)
    near, _, _ = descend(_digits_in(histograms_ptr, large, 0), tl.minimum(tl.maximum(place, 1), count))
    i = part * BLOCK + tl.arange(0, BLOCK)
    key = _load_keys(samples_ptr + tl.load(facts + SAMPLES_AT), i, count)
    in_run = tl.sum(tl.reshape(((key >> 21) >= near).to(tl.int32), [BLOCK // 8, 8]), 1)
    tl.atomic_add(spreads_ptr + 2 * large, tl.sum(in_run), sem="relaxed")
    tl.atomic_add(spreads_ptr + 2 * large + 1, tl.sum(in_run * in_run), sem="relaxed")


@triton.jit
def _targets(spreads_ptr, ranks, facts, width, SAMPLED: tl.constexpr):
    """The two ranks of the sample that the bracket ends at; below 1 or above the count where it is open.

    SAMPLED: the one rank that is wanted, twice.
    """
    if SAMPLED:
        above = tl.load(ranks + WANTED).to(tl.int32)
        below = above
    else:
        large, place = tl.load(facts + LARGE), _place(ranks, facts)
        runs = tl.load(facts + SAMPLES).to(tl.float64) / 8
        total = tl.load(spreads_ptr + 2 * large).to(tl.float64)
        variance = tl.load(spreads_ptr + 2 * large + 1).to(tl.float64) - total * total / runs
        margin = width * tl.sqrt(tl.maximum(variance, 0.0)) + 2.0
        above, below = (place - margin).to(tl.int32), (place + margin).to(tl.int32) + 1
    return above, below


@triton.jit
def digits_kernel(
    histograms_ptr, spreads_ptr, samples_ptr, work_ptr, ranks_ptr, facts_ptr, width,
    SAMPLED: tl.constexpr, LEVEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count the second (LEVEL 1) or third (2) digit of the keys that share the digits before it with the wanted one."""
    program = tl.program_id(0)
    t, part = tl.load(work_ptr + 2 * program), tl.load(work_ptr + 2 * program + 1)
    facts, ranks = row_of(facts_ptr, t, FACTS), row_of(ranks_ptr, t, RANKS)
    large, count = tl.load(facts + LARGE), tl.load(facts + SAMPLES).to(tl.int32)
    i = part * BLOCK + tl.arange(0, BLOCK)
    key = _load_keys(samples_ptr + tl.load(facts + SAMPLES_AT), i, count)
    above, below = _targets(spreads_ptr, ranks, facts, width, SAMPLED)
    first = _digits_in(histograms_ptr, large, 0)
    digit, left, _ = descend(first, tl.minimum(tl.maximum(above, 1), count))
    if LEVEL == 1:
        _add(_slot(histograms_ptr, large, 1), (key >> 10) & 2047, ((key >> 21) == digit) & (i < count))
        if not SAMPLED:
            digit, left, _ = descend(first, tl.minimum(tl.maximum(below, 1), count))
            _add(_slot(histograms_ptr, large, 2), (key >> 10) & 2047, ((key >> 21) == digit) & (i < count))
    else:
        second, _, _ = descend(_digits_in(histograms_ptr, large, 1), left)
        upper = (digit << 11) | second
        _add(_slot(histograms_ptr, large, 2), key & 1023, ((key >> 10) == upper) & (i < count))


@triton.jit
def bracket_kernel(
    ranks_ptr, histograms_ptr, spreads_ptr, facts_ptr, tensors_ptr, width, SAMPLED: tl.constexpr
):  # fmt: skip
    """One tensor a program: its bracket, rounded outwards to 22 bits; SAMPLED: its threshold, the sample's quantile.

    `width`: half the bracket in standard deviations.
    """
    t = tl.load(tensors_ptr + tl.program_id(0))
    facts, ranks = row_of(facts_ptr, t, FACTS), row_of(ranks_ptr, t, RANKS)
    large, count = tl.load(facts + LARGE), tl.load(facts + SAMPLES).to(tl.int32)
    none = tl.load(ranks + WANTED) * 0
    above, below = _targets(spreads_ptr, ranks, facts, width, SAMPLED)
    first = _digits_in(histograms_ptr, large, 0)
    digit, left, _ = descend(first, tl.minimum(tl.maximum(above, 1), count))
    second, left, _ = descend(_digits_in(histograms_ptr, large, 1), left)
    upper = (digit << 11) | second
    if SAMPLED:
        third, _, _ = descend(_digits_in(histograms_ptr, large, 2), left)
        high = ((upper << 10) | third).to(tl.int64)
        low, cutoff, mode = high, none + LAST, none + EXACT
    else:
        high = tl.where(above >= 1, ((upper << 10) | 1023).to(tl.int64), none + 0xFFFFFFFF)
        digit, left, _ = descend(first, tl.minimum(tl.maximum(below, 1), count))
        second, _, _ = descend(_digits_in(histograms_ptr, large, 2), left)
        low = tl.where(below <= count, (((digit << 11) | second) << 10).to(tl.int64), none)
        cutoff, mode = none - 1, none + BRACKET
    if tl.load(ranks + MODE) != DENSE:
        _keep(ranks, low, high, cutoff, mode)


@triton.jit
def _keep(ranks, low, high, cutoff, mode):
    tl.store(ranks + LOW, low)
    tl.store(ranks + HIGH, high)
    tl.store(ranks + CUTOFF, cutoff)
    tl.store(ranks + MODE, mode)
    tl.store(ranks + COUNTED, low * 0)
    tl.store(ranks + TIED, low * 0)


@triton.jit
def _count(samples, count, least, BLOCK: tl.constexpr):
    """How many keys are `least` or more."""
    found = tl.zeros([BLOCK], tl.int32)
    for at in range(0, count, BLOCK):
        i = at + tl.arange(0, BLOCK)
        found += ((_load_keys(samples, i, count) >= least) & (i < count)).to(tl.int32)
    return tl.sum(found)


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
def whole_kernel(ranks_ptr, samples_ptr, facts_ptr, tensors_ptr, BLOCK: tl.constexpr):
    """One small tensor a program: its K-th largest key, and the index that splits those equal to it.

    By bisection: the largest key that K keys reach, bit by bit. Reads the keys 33 times, from the cache.
    """
    t = tl.load(tensors_ptr + tl.program_id(0))
    facts, ranks = row_of(facts_ptr, t, FACTS), row_of(ranks_ptr, t, RANKS)
    if tl.load(ranks + MODE) != DENSE:
        count, samples = tl.load(facts + SAMPLES).to(tl.int32), samples_ptr + tl.load(facts + SAMPLES_AT)
        wanted, key = tl.load(ranks + WANTED).to(tl.int32), tl.full((), 0, tl.uint32)
        bit = tl.full((), 0x80000000, tl.uint32)
        for _ in range(32):
            key = tl.where(_count(samples, count, key | bit, BLOCK) >= wanted, key | bit, key)
            bit = bit >> 1
        # the keys above it; no key is above the largest there is
        more = tl.where(key == 0xFFFFFFFF, 0, _count(samples, count, key + 1, BLOCK))
        cutoff = tl.full((), LAST, tl.int64)
        if _count(samples, count, key, BLOCK) > wanted:
            cutoff = _cutoff(samples, count, key, wanted - more, BLOCK)
        wide = key.to(tl.int64)
        _keep(ranks, wide, wide, cutoff, wide * 0 + EXACT)
