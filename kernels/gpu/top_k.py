"""Exactly the K largest scores of each tensor, without sorting: sample, count, settle, ties.

1. `sample_kernel` (sample.py) forms the scores at drawn positions; from their ranks come two keys which the K-th most
   likely lies between (a small tensor is its own sample: there the K-th itself is found).
2. The pass over everything (`selective_step_kernel`) counts what is above the bracket, and leaves what is inside of it
   undecided: index, score and update go to a list.
3. `bins_kernel` makes a histogram of the lists, `find_kernel` finds its bin that holds the K-th; `settle_kernel`
   decides every other bin, and puts the few elements of this one on a tiny list.
4. `ties_kernel` ranks those, equal scores by their index.
A bracket that missed and a list that overflowed are noted on the device, and mended there by `repair.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .config import COUNTED, LARGE, LIST_AT, LISTS, ROOM
from .elements import load_moved
from .keys import key_of
from .rules import score_of

DIGIT = tl.constexpr(2048)  # `repair.py` ranks a key's 32 bits as digits of 11, 11 and 10 bits
LAST = tl.constexpr(0x7FFFFFFFFFFFFFFF)  # a cutoff behind every index


@triton.jit
def bin_of(key, low, high, BINS: tl.constexpr):
    """Which of the equal parts of the bracket a key lies in: monotone, and the same wherever it is computed."""
    scale = BINS / ((high - low).to(tl.float32) + 1.0)
    return tl.minimum(((key - low).to(tl.float32) * scale).to(tl.int32), BINS - 1)


@triton.jit
def list_undecided(
    above, undecided, offs, key, u, chunk, ranks, facts, counters_ptr, lists_ptr, room_in_all, CFG: tl.constexpr
):
    """Count what is above the bracket, and put what is undecided on one of the tensor's lists.

    `lists_ptr`: all indices, all keys, and where something is written all updates, 4 bytes each. Where an element
    stands on its list is up to the order of atomics; nothing depends on it. What does not fit is only counted.
    """
    tl.atomic_add(ranks + COUNTED, tl.sum(above.to(tl.int32)).to(tl.int64), sem="relaxed")
    which = chunk % LISTS
    counter = counters_ptr + tl.load(facts + LARGE) * LISTS + which
    place = tl.atomic_add(counter + (offs * 0).to(tl.int32), 1, mask=undecided, sem="relaxed")
    room = tl.load(facts + ROOM)
    fits = undecided & (place < room)
    entry = lists_ptr + tl.load(facts + LIST_AT) + which * room + place
    tl.store(entry, offs.to(tl.uint32).to(tl.int32, bitcast=True), mask=fits)
    tl.store(entry + room_in_all, key.to(tl.int32, bitcast=True), mask=fits)
    if CFG.writes:
        tl.store(entry + 2 * room_in_all, u.to(tl.int32, bitcast=True), mask=fits)


@triton.jit
def keys_at(pointers, row, offs, mask, FAST: tl.constexpr, CFG: tl.constexpr):
    """(key, update, gradient, parameter) of elements at any indices."""
    p, g, u, m, _, _, _, _ = load_moved(pointers, offs, mask, row, CFG.writes and CFG.rule != "given", FAST, CFG)
    return key_of(score_of(g, u, m, row, CFG)), u, g, p


@triton.jit
def descend(histogram, rank):
    """(digit that holds the rank-th largest, its rank among the equal ones, how many those are)."""
    BINS: tl.constexpr = histogram.shape[0]
    from_here = tl.sum(histogram) - tl.cumsum(histogram, 0) + histogram
    places = tl.arange(0, BINS)
    digit = tl.max(tl.where(from_here >= rank, places, 0))
    left = rank - tl.sum(tl.where(places > digit, histogram, 0))
    return digit.to(tl.uint32), left, tl.sum(tl.where(places == digit, histogram, 0))
