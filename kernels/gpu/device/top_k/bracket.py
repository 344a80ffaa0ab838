"""From a sample of its scores to a tensor's threshold or bracket.

A drawn sample (up to 262,144 scores) is ranked by many programs in a few launches, digit by digit of the key (9, 12
and 11 bits). The histogram of the first digit, sign and exponent, comes with the sample. From it, `spread_kernel` finds
how far the sample's rank may be off, `digits_kernel` counts the next digit, and `bracket_kernel` reads off the result.
A small tensor is its own sample, and `whole_kernel` (`small.py`) does all of this in one program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..config import (
    BRACKET,
    BRACKET_RUN,
    COUNTED,
    CROWD,
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
from ..elements import pointers_of, row_of
from ..random import bracket_position, sample_position
from ..scores import LAST, descend, keys_at

FIRST_DIGIT = tl.constexpr(512)
NEXT_DIGIT = tl.constexpr(4096)  # of 12 bits; the last one's 11 fit too
MANY = tl.constexpr(64)  # a 64th of a sample between two neighbouring floats of 13 bits: no usual distribution has it
LOOKS, LOOK_BLOCK = tl.constexpr(16), tl.constexpr(1024)  # where a crowd is looked for in a sample
SLOTS = tl.constexpr(512 + 2 * 4096)  # counts of a tensor: of the first digit, and two histograms of a next one


@triton.jit
def _next(histograms_ptr, large, SLOT: tl.constexpr):
    """One of a tensor's two histograms of a next digit."""
    return histograms_ptr + large.to(tl.int64) * SLOTS + FIRST_DIGIT + SLOT * NEXT_DIGIT


@triton.jit
def _first_digits(histograms_ptr, large):
    return tl.load(histograms_ptr + large.to(tl.int64) * SLOTS + tl.arange(0, FIRST_DIGIT))


@triton.jit
def _next_digits(histograms_ptr, large, SLOT: tl.constexpr):
    return tl.load(_next(histograms_ptr, large, SLOT) + tl.arange(0, NEXT_DIGIT))


@triton.jit
def _add(histogram_ptr, digit, inside):
    """Count these digits into a histogram in memory."""
    tl.atomic_add(histogram_ptr + digit, 1, mask=inside, sem="relaxed")


@triton.jit
def sample_kernel(
    samples_ptr, histograms_ptr, work_ptr, pointers_ptr, numbers_ptr, facts_ptr, keys_ptr,
    SAMPLED: tl.constexpr, CFG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store the keys of up to BLOCK sampled scores of one tensor a program, and count their first digits.

    Reads the tensors that a score is made of at the drawn places. For a bracket, these are whole bursts of 64 bytes of
    float32, 16 neighbours each. For a sampled quantile (SAMPLED), whose places are drawn as on the CPU, they are one
    or two bursts for 8 neighbours. Writes 4 bytes a sample.
    """
    program = tl.program_id(0)
    t, part = tl.load(work_ptr + 2 * program), tl.load(work_ptr + 2 * program + 1)
    facts, keys, row = row_of(facts_ptr, t, FACTS), row_of(keys_ptr, t, 6), row_of(numbers_ptr, t, NUMBERS)
    numel, count, shift = tl.load(facts + NUMEL), tl.load(facts + SAMPLES), tl.load(facts + SHIFT)
    i = part.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    first = tl.load(keys + 2).to(tl.uint32, bitcast=True)
    second = tl.load(keys + 3).to(tl.uint32, bitcast=True)
    if SAMPLED:
        drawn = sample_position(i, numel, tl.maximum(shift, 0), first, second)
    else:
        drawn = bracket_position(i, numel, tl.maximum(shift, 0), first, second)
    places = tl.where(shift < 0, i, drawn)
    key, _, _, _ = keys_at(pointers_of(pointers_ptr, t), row, tl.where(mask, places, 0), mask, False, CFG)
    tl.store(samples_ptr + tl.load(facts + SAMPLES_AT) + i, key.to(tl.int32, bitcast=True), mask=mask)
    if shift >= 0:
        counts = tl.histogram(tl.where(mask, key >> 23, 0).to(tl.int32), FIRST_DIGIT, mask=mask)
        histogram = histograms_ptr + tl.load(facts + LARGE) * SLOTS + tl.arange(0, FIRST_DIGIT)
        tl.atomic_add(histogram, counts, mask=counts > 0, sem="relaxed")


@triton.jit
def load_keys(samples, i, count):
    """The keys at these places of a sample of `count` keys, uint32; 0 behind its end."""
    return tl.load(samples + i, mask=i < count, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def _place(ranks, facts):
    """The rank in the sample, from its largest, at which the wanted rank of the tensor is expected; float64."""
    count = tl.load(facts + SAMPLES).to(tl.float64)
    return tl.load(ranks + WANTED).to(tl.float64) / tl.load(facts + NUMEL).to(tl.float64) * count


@triton.jit
def spread_kernel(spreads_ptr, samples_ptr, histograms_ptr, work_ptr, ranks_ptr, facts_ptr, BLOCK: tl.constexpr):
    """Count the keys about the wanted rank or above in each run of BRACKET_RUN neighbours; add up counts and squares.

    Their variance says how far the sample's rank may be off. It is taken of runs, because runs were drawn, and
    neighbours are alike.
    """
    program = tl.program_id(0)
    t, part = tl.load(work_ptr + 2 * program), tl.load(work_ptr + 2 * program + 1)
    facts = row_of(facts_ptr, t, FACTS)
    large, count = tl.load(facts + LARGE), tl.load(facts + SAMPLES).to(tl.int32)
    place = _place(row_of(ranks_ptr, t, RANKS), facts).to(tl.int32)
    near, _, _ = descend(_first_digits(histograms_ptr, large), tl.minimum(tl.maximum(place, 1), count))
    i = part * BLOCK + tl.arange(0, BLOCK)
    key = load_keys(samples_ptr + tl.load(facts + SAMPLES_AT), i, count)
    in_run = tl.sum(tl.reshape(((key >> 23) >= near).to(tl.int32), [BLOCK // BRACKET_RUN, BRACKET_RUN]), 1)
    tl.atomic_add(spreads_ptr + 2 * large, tl.sum(in_run), sem="relaxed")
    tl.atomic_add(spreads_ptr + 2 * large + 1, tl.sum(in_run * in_run), sem="relaxed")


@triton.jit
def _targets(spreads_ptr, ranks, facts, width, SAMPLED: tl.constexpr):
    """The two ranks of the sample at which the bracket ends: below 1, or above the count, if it has no end there.

    SAMPLED: the wanted rank, twice.
    """
    if SAMPLED:
        above = tl.load(ranks + WANTED).to(tl.int32)
        below = above
    else:
        large, place = tl.load(facts + LARGE), _place(ranks, facts)
        samples = tl.load(facts + SAMPLES).to(tl.float64)
        total = tl.load(spreads_ptr + 2 * large).to(tl.float64)
        variance = tl.load(spreads_ptr + 2 * large + 1).to(tl.float64) - total * total * BRACKET_RUN / samples
        # This is the variance near the wanted rank. Its ratio to that of single draws is the same at the rank itself.
        alone, wanted = total * (1.0 - total / samples), place * (1.0 - place / samples)
        larger = tl.where(alone > 0, variance / tl.where(alone > 0, alone, 1.0), 1.0)
        margin = width * tl.sqrt(tl.maximum(larger, 0.125) * tl.maximum(wanted, 0.0)) + 2.0
        above, below = (place - margin).to(tl.int32), (place + margin).to(tl.int32) + 1
    return above, below


@triton.jit
def digits_kernel(
    histograms_ptr, spreads_ptr, samples_ptr, work_ptr, ranks_ptr, facts_ptr, width,
    SAMPLED: tl.constexpr, LEVEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count the second (LEVEL 1) or third (2) digit of the keys that share the earlier digits with the wanted key."""
    program = tl.program_id(0)
    t, part = tl.load(work_ptr + 2 * program), tl.load(work_ptr + 2 * program + 1)
    facts, ranks = row_of(facts_ptr, t, FACTS), row_of(ranks_ptr, t, RANKS)
    large, count = tl.load(facts + LARGE), tl.load(facts + SAMPLES).to(tl.int32)
    i = part * BLOCK + tl.arange(0, BLOCK)
    key = load_keys(samples_ptr + tl.load(facts + SAMPLES_AT), i, count)
    above, below = _targets(spreads_ptr, ranks, facts, width, SAMPLED)
    first = _first_digits(histograms_ptr, large)
    inside = i < count
    digit, left, _ = descend(first, tl.minimum(tl.maximum(above, 1), count))
    if LEVEL == 1:
        _add(_next(histograms_ptr, large, 0), (key >> 11) & 4095, ((key >> 23) == digit) & inside)
        if not SAMPLED:  # where both ends have the same first digit, one histogram is enough
            other, left, _ = descend(first, tl.minimum(tl.maximum(below, 1), count))
            another = tl.where(other == digit, FIRST_DIGIT, other).to(tl.uint32)
            _add(_next(histograms_ptr, large, 1), (key >> 11) & 4095, ((key >> 23) == another) & inside)
    else:
        second, _, _ = descend(_next_digits(histograms_ptr, large, 0), left)
        upper = (digit << 12) | second
        _add(_next(histograms_ptr, large, 1), key & 2047, ((key >> 11) == upper) & inside)


@triton.jit
def _crowd(samples, count, most):
    """The most frequent key with the first 21 bits `most`, in some blocks of a sample; the least of several."""
    counts, places = tl.zeros([2048], tl.int32), tl.arange(0, 2048)
    for look in range(LOOKS):
        i = look * (count // LOOKS) + tl.arange(0, LOOK_BLOCK)
        key = load_keys(samples, i, count)
        counts += tl.histogram((key & 2047).to(tl.int32), 2048, mask=(i < count) & ((key >> 11) == most))
    third = tl.min(tl.where(counts == tl.max(counts), places, 2048))
    return (most << 11) | third.to(tl.uint32)


@triton.jit
def bracket_kernel(
    ranks_ptr, histograms_ptr, spreads_ptr, samples_ptr, facts_ptr, tensors_ptr, width, SAMPLED: tl.constexpr
):  # fmt: skip
    """Store the bracket of one tensor a program, rounded outwards to 21 bits. SAMPLED: its threshold, a quantile.

    `width` is half the bracket in standard deviations. If many samples share the first 21 bits of an end, CROWD becomes
    the most frequent key among them.
    """
    t = tl.load(tensors_ptr + tl.program_id(0))
    facts, ranks = row_of(facts_ptr, t, FACTS), row_of(ranks_ptr, t, RANKS)
    large, count = tl.load(facts + LARGE), tl.load(facts + SAMPLES).to(tl.int32)
    none = tl.load(ranks + WANTED) * 0
    above, below = _targets(spreads_ptr, ranks, facts, width, SAMPLED)
    first, nexts = _first_digits(histograms_ptr, large), _next_digits(histograms_ptr, large, 0)
    digit, left, _ = descend(first, tl.minimum(tl.maximum(above, 1), count))
    second, left, alike = descend(nexts, left)
    upper = (digit << 12) | second
    if SAMPLED:
        third, _, _ = descend(_next_digits(histograms_ptr, large, 1), left)
        high = ((upper << 11) | third).to(tl.int64)
        low, cutoff, mode = high, none + LAST, none + EXACT
    else:
        high = tl.where(above >= 1, ((upper << 11) | 2047).to(tl.int64), none + 0xFFFFFFFF)
        other, left, _ = descend(first, tl.minimum(tl.maximum(below, 1), count))
        nexts += tl.where(other == digit, 0, _next_digits(histograms_ptr, large, 1) - nexts)
        second, _, others = descend(nexts, left)
        low = tl.where(below <= count, (((other << 12) | second) << 11).to(tl.int64), none)
        low = tl.minimum(low, high)  # a negative width, by which tests make a bracket miss
        cutoff, mode = none - 1, none + BRACKET
        crowd = none
        if tl.maximum(alike, others) > count // MANY:
            most = tl.where(alike > others, upper, (other << 12) | second)
            crowd = _crowd(samples_ptr + tl.load(facts + SAMPLES_AT), count, most).to(tl.int64)
        tl.store(ranks + CROWD, tl.where((crowd >= low) & (crowd <= high), crowd, 0))
    if tl.load(ranks + MODE) != DENSE:
        keep(ranks, low, high, cutoff, mode)


@triton.jit
def keep(ranks, low, high, cutoff, mode):
    """Store a tensor's bracket or threshold, and reset its counts."""
    tl.store(ranks + LOW, low)
    tl.store(ranks + HIGH, high)
    tl.store(ranks + CUTOFF, cutoff)
    tl.store(ranks + MODE, mode)
    tl.store(ranks + COUNTED, low * 0)
    tl.store(ranks + TIED, low * 0)
