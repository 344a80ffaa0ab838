"""The K-th largest score of a small tensor, which is its own sample: by bisection, in one program."""

from __future__ import annotations

import triton
import triton.language as tl

from ..config import (
    DENSE,
    EXACT,
    FACTS,
    MODE,
    NUMBERS,
    PICKED,
    RANKS,
    SAMPLES,
    SAMPLES_AT,
    STRENGTH_SELECTED,
    WANTED,
)
from ..elements import row_of
from ..scores import LAST
from ..strengths import strength_of_count
from .bracket import keep, load_keys


@triton.jit
def _count(samples, count, least, BLOCK: tl.constexpr):
    """The number of keys that are `least` or more."""
    found = tl.zeros([BLOCK], tl.int32)
    for at in range(0, count, BLOCK):
        i = at + tl.arange(0, BLOCK)
        found += ((load_keys(samples, i, count) >= least) & (i < count)).to(tl.int32)
    return tl.sum(found)


@triton.jit
def _cutoff(samples, count, key, left, BLOCK: tl.constexpr):
    """The index of the left-th key that is equal to `key`."""
    found = tl.full((), -1, tl.int64)
    for at in range(0, count, BLOCK):
        i = at + tl.arange(0, BLOCK)
        equal = ((load_keys(samples, i, count) == key) & (i < count)).to(tl.int32)
        place = tl.cumsum(equal, 0)
        here = tl.max(tl.where((place == left) & (equal > 0), i, -1)).to(tl.int64)
        found = tl.maximum(found, here)
        left = left - tl.sum(equal)
    return found


@triton.jit
def whole_kernel(
    ranks_ptr, samples_ptr, facts_ptr, tensors_ptr, numbers_ptr, hyper_ptr, CFG: tl.constexpr, BLOCK: tl.constexpr
):
    """Find the K-th largest key of one small tensor a program, and the index that splits those equal to it.

    Found bit by bit: the largest key that K keys reach. Reads the keys 33 times, from the cache.
    With `CFG.share_known` the multiplier of a tensor of which fewer than K scores are numbers is corrected.
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
        # the number of keys above it; none is above the largest uint32
        more = tl.where(key == 0xFFFFFFFF, 0, _count(samples, count, key + 1, BLOCK))
        cutoff = tl.full((), LAST, tl.int64)
        if _count(samples, count, key, BLOCK) > wanted:
            cutoff = _cutoff(samples, count, key, wanted - more, BLOCK)
        wide = key.to(tl.int64)
        keep(ranks, wide, wide, cutoff, wide * 0 + EXACT)
        if CFG.ranked:
            tl.store(ranks + PICKED, tl.where(key == 0, more, wanted).to(tl.int64))
        if CFG.share_known:
            if key == 0:
                row = row_of(numbers_ptr, t, NUMBERS)
                tl.store(row + STRENGTH_SELECTED, strength_of_count(hyper_ptr, facts, more))
