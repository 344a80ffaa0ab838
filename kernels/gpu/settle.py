"""After the pass over everything: the bin that holds the K-th score, the undecided elements, the ties."""

from __future__ import annotations

import triton
import triton.language as tl

from .config import (
    BRACKET,
    COUNTED,
    CRITICAL,
    CUTOFF,
    EXACT,
    FACTS,
    HIGH,
    LARGE,
    LEFT,
    LIST_AT,
    LISTS,
    LOW,
    MODE,
    NUMBERS,
    PARAM,
    RANKS,
    ROOM,
    TIED,
    WANTED,
)
from .elements import column, multiplier, pointers_of, read, row_of, stepped
from .rounding import narrow
from .top_k import bin_of, keys_at

TINY = 1024  # how many elements of the one bin can be listed; more are ranked by repair.py


@triton.jit
def _note(broken_ptr, t):
    """Put a tensor on the list of those that need repair; the order is whoever comes first, the result is not."""
    place = tl.atomic_add(broken_ptr, 1, sem="relaxed")
    tl.store(broken_ptr + 1 + place, t)


@triton.jit
def bins_kernel(histograms_ptr, counters_ptr, lists_ptr, tensors_ptr, ranks_ptr, facts_ptr, room_in_all,
                BINS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One list a program: count its keys into the histogram of its tensor's bracket. Reads 4 bytes an entry."""
    program = tl.program_id(0)
    t, which = tl.load(tensors_ptr + program // LISTS), program % LISTS
    ranks, facts = row_of(ranks_ptr, t, RANKS), row_of(facts_ptr, t, FACTS)
    low, high = tl.load(ranks + LOW).to(tl.uint32), tl.load(ranks + HIGH).to(tl.uint32)
    room = tl.load(facts + ROOM).to(tl.int32)
    count = tl.minimum(tl.load(counters_ptr + program), room)
    keys = lists_ptr + room_in_all + tl.load(facts + LIST_AT) + which * room
    histogram = histograms_ptr + tl.load(facts + LARGE) * BINS
    for at in range(0, count, BLOCK):
        i = at + tl.arange(0, BLOCK)
        key = tl.load(keys + i, mask=i < count, other=0).to(tl.uint32, bitcast=True)
        place = bin_of(tl.where(i < count, key, low), low, high, BINS)
        tl.atomic_add(histogram + place, 1, mask=i < count, sem="relaxed")


@triton.jit
def find_kernel(ranks_ptr, histograms_ptr, counters_ptr, broken_ptr, tensors_ptr, facts_ptr, BINS: tl.constexpr):
    """One tensor a program: the histogram's bin that holds the K-th score, and the rank inside of it.

    CRITICAL becomes that bin, BINS where nothing of the bracket is selected, -1 where the bracket has missed or where
    a list has overflowed.
    """
    t = tl.load(tensors_ptr + tl.program_id(0))
    ranks, facts = row_of(ranks_ptr, t, RANKS), row_of(facts_ptr, t, FACTS)
    large = tl.load(facts + LARGE)
    if tl.load(ranks + MODE) == BRACKET:
        places = tl.arange(0, BINS)
        histogram = tl.load(histograms_ptr + large * BINS + places)
        total = tl.sum(histogram)
        rank = tl.load(ranks + WANTED) - tl.load(ranks + COUNTED)
        from_here = total - tl.cumsum(histogram, 0) + histogram
        critical = tl.max(tl.where(from_here >= rank, places, -1))
        critical = tl.where(rank == 0, BINS, critical)
        longest = tl.max(tl.load(counters_ptr + large * LISTS + tl.arange(0, LISTS)))
        broken = (rank < 0) | (rank > total) | (longest > tl.load(facts + ROOM))
        tl.store(ranks + CRITICAL, tl.where(broken, -1, critical).to(tl.int64))
        tl.store(ranks + LEFT, rank - tl.sum(tl.where(places > critical, histogram, 0)))
        if broken:
            _note(broken_ptr, t)


@triton.jit
def decide(pointers, row, offs, todo, chosen, u, g, p, CFG: tl.constexpr):
    """Step the elements in `todo` that are now decided (float32 parameters); (mask u)^2 of these, 0 elsewhere."""
    multiples = multiplier(chosen, u, g, row, CFG)
    new = stepped(p, p, u, multiples, row, CFG)
    tl.store(column(pointers, PARAM, CFG.param, False) + offs, narrow(new, CFG.param), mask=todo)
    masked = multiples * u
    return tl.where(todo, masked * masked, 0.0)


@triton.jit
def _list(tiny_ptr, ranks, offs, key, listed, TINY: tl.constexpr):
    """Append elements to a tensor's list; those that do not fit are only counted."""
    index = tl.atomic_add(ranks + TIED + offs * 0, tl.full(offs.shape, 1, tl.int64), mask=listed, sem="relaxed")
    fits = listed & (index < TINY)
    tl.store(tiny_ptr + index, offs.to(tl.uint32).to(tl.int32, bitcast=True), mask=fits)
    tl.store(tiny_ptr + TINY + index, key.to(tl.int32, bitcast=True), mask=fits)


@triton.jit
def settle_kernel(
    partials_ptr, tiny_ptr, counters_ptr, lists_ptr, tensors_ptr, pointers_ptr, numbers_ptr, ranks_ptr, facts_ptr,
    room_in_all, TINY: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, CFG: tl.constexpr,
):  # fmt: skip
    """One list a program: decide what lies in other bins than the critical one, and list the elements of that one.

    Reads 12 bytes an entry and, where `CFG.writes`, reads and writes the parameters, each in a sector of its own.
    `tiny_ptr`: for each tensor TINY indices, then TINY keys.
    """
    program = tl.program_id(0)
    t, which = tl.load(tensors_ptr + program // LISTS), program % LISTS
    ranks, facts, row = row_of(ranks_ptr, t, RANKS), row_of(facts_ptr, t, FACTS), row_of(numbers_ptr, t, NUMBERS)
    pointers, tiny = pointers_of(pointers_ptr, t), tiny_ptr + tl.load(facts + LARGE) * (2 * TINY)
    critical, room = tl.load(ranks + CRITICAL), tl.load(facts + ROOM).to(tl.int32)
    low, high = tl.load(ranks + LOW).to(tl.uint32), tl.load(ranks + HIGH).to(tl.uint32)
    entries = lists_ptr + tl.load(facts + LIST_AT) + which * room
    length = tl.load(counters_ptr + program)
    if (tl.load(ranks + MODE) != BRACKET) | (critical < 0):
        length = length * 0
    counted, masked = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for at in range(0, length, BLOCK):
        i = at + tl.arange(0, BLOCK)
        todo = i < length
        offs = tl.load(entries + i, mask=todo, other=0).to(tl.uint32, bitcast=True).to(tl.int64)
        key = tl.load(entries + room_in_all + i, mask=todo, other=0).to(tl.uint32, bitcast=True)
        place = bin_of(tl.where(todo, key, low), low, high, BINS)
        _list(tiny, ranks, offs, key, todo & (place == critical), TINY)
        if CFG.writes:
            u = tl.load(entries + 2 * room_in_all + i, mask=todo, other=0).to(tl.float32, bitcast=True)
            chosen = place > critical
            todo = todo & (place != critical)
            p = read(pointers, offs, todo, PARAM, CFG.param, False)
            masked += decide(pointers, row, offs, todo, chosen, u, u, p, CFG)
            counted += (todo & chosen).to(tl.float32)
    if CFG.writes and CFG.statistics:
        partial = partials_ptr + program.to(tl.int64) * 2
        tl.store(partial, tl.sum(counted))
        tl.store(partial + 1, tl.sum(masked))


@triton.jit
def ties_kernel(
    partials_ptr, tiny_ptr, broken_ptr, tensors_ptr, pointers_ptr, numbers_ptr, ranks_ptr, facts_ptr,
    TINY: tl.constexpr, BINS: tl.constexpr, CFG: tl.constexpr,
):  # fmt: skip
    """One tensor a program: rank the listed elements, equal scores by index, step them, and keep the threshold.

    What was listed depends on the order of atomics, the ranks and so the result do not.
    """
    t = tl.load(tensors_ptr + tl.program_id(0))
    ranks = row_of(ranks_ptr, t, RANKS)
    critical, listed = tl.load(ranks + CRITICAL), tl.load(ranks + TIED).to(tl.int32)
    count, masked = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
    if (tl.load(ranks + MODE) == BRACKET) & (critical >= 0):
        if listed > TINY:
            _note(broken_ptr, t)
        else:
            row, pointers = row_of(numbers_ptr, t, NUMBERS), pointers_of(pointers_ptr, t)
            i = tl.arange(0, TINY)
            tiny = tiny_ptr + tl.load(row_of(facts_ptr, t, FACTS) + LARGE) * (2 * TINY)
            index = tl.load(tiny + i, mask=i < listed, other=0).to(tl.uint32, bitcast=True).to(tl.int64)
            key = tl.load(tiny + TINY + i, mask=i < listed, other=0).to(tl.uint32, bitcast=True)
            place = tl.zeros([TINY], tl.int32)
            for j in range(listed):
                other = tl.load(tiny + TINY + j).to(tl.uint32, bitcast=True)
                before = tl.load(tiny + j).to(tl.uint32, bitcast=True).to(tl.int64)
                place += ((other > key) | ((other == key) & (before < index))).to(tl.int32)
            left = tl.load(ranks + LEFT)
            todo = i < listed
            chosen = (place < left) & (key != 0)
            if CFG.writes:
                key, u, g, p = keys_at(pointers, row, index, todo, False, CFG)
                masked = tl.sum(decide(pointers, row, index, todo, chosen, u, g, p, CFG))
                count = tl.sum((todo & chosen).to(tl.float32))
            if critical < BINS:
                last = todo & (place == left - 1)
                tl.store(ranks + HIGH, tl.max(tl.where(last, key.to(tl.int64), 0)))
                tl.store(ranks + CUTOFF, tl.max(tl.where(last, index, -1)))
            tl.store(ranks + MODE, left * 0 + EXACT)
    if CFG.writes and CFG.statistics:
        partial = partials_ptr + t.to(tl.int64) * 2
        tl.store(partial, count)
        tl.store(partial + 1, masked)
