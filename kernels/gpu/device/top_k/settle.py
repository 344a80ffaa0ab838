"""After the pass over everything: the bin that holds the K-th score, the undecided elements, the ties."""

from __future__ import annotations

import triton
import triton.language as tl

from ..config import (
    BRACKET,
    CHUNK_AT,
    CHUNKS,
    COUNTED,
    CRITICAL,
    CUTOFF,
    EXACT,
    FACTS,
    HIGH,
    LARGE,
    LEFT,
    LOW,
    MODE,
    NUMBERS,
    PARAM,
    PICKED,
    RANKS,
    TIE,
    TIED,
    WANTED,
)
from ..elements import column, multiplier, pointers_of, row_of, stepped
from ..rounding import narrow
from ..scores import add_marks, bin_of, keys_at, population, shift_of

TINY = 1024  # elements of the critical bin that can be listed; if there are more, repair.py ranks the tensor


@triton.jit
def note(broken_ptr, t):
    """Put a tensor on the list of those that need repair. The list's order is arbitrary; the results are not."""
    place = tl.atomic_add(broken_ptr, 1, sem="relaxed")
    tl.store(broken_ptr + 1 + place, t)


@triton.jit
def critical_bin(ranks, histogram_ptr, low, high, BINS: tl.constexpr, TINY: tl.constexpr):
    """(bin, lost): the bin of a tensor's histogram that holds the K-th score; BINS if nothing in it is selected.

    `low` and `high` are the ends of the bracket, uint32 keys. Stores the rank inside of the bin (LEFT). `lost` is true
    if the bracket has missed, or the bin holds more than TINY elements; if such a bin is a single key, TIE becomes it.
    """
    places = tl.arange(0, BINS)
    histogram = tl.load(histogram_ptr + places)
    total, rank = tl.sum(histogram), tl.load(ranks + WANTED) - tl.load(ranks + COUNTED)
    from_here = total - tl.cumsum(histogram, 0) + histogram
    critical = tl.max(tl.where(from_here >= rank, places, -1))
    critical = tl.where(rank == 0, BINS, critical)
    missed = (rank < 0) | (rank > total)
    overfull = (missed == 0) & (tl.sum(tl.where(places == critical, histogram, 0)) > TINY)
    single = overfull & (shift_of(low, high) == 0)
    tl.store(ranks + TIE, tl.where(single, low.to(tl.int64) + critical, -1))
    tl.store(ranks + LEFT, rank - tl.sum(tl.where(places > critical, histogram, 0)))
    return critical, missed | overfull


@triton.jit
def find_kernel(
    ranks_ptr, histograms_ptr, broken_ptr, tensors_ptr, facts_ptr, BINS: tl.constexpr, TINY: tl.constexpr
):  # fmt: skip
    """Find the bin that holds the K-th score, for one tensor a program. Reads a histogram, 8 KiB.

    CRITICAL becomes that bin; BINS if nothing in the bracket is selected; -1 for a tensor that `critical_bin` has lost.
    Then `repair.py` steps what is undecided.
    """
    t = tl.load(tensors_ptr + tl.program_id(0))
    ranks, large = row_of(ranks_ptr, t, RANKS), tl.load(row_of(facts_ptr, t, FACTS) + LARGE)
    if tl.load(ranks + MODE) == BRACKET:
        low, high = tl.load(ranks + LOW).to(tl.uint32), tl.load(ranks + HIGH).to(tl.uint32)
        critical, lost = critical_bin(ranks, histograms_ptr + large * BINS, low, high, BINS, TINY)
        tl.store(ranks + CRITICAL, tl.where(lost, -1, critical).to(tl.int64))
        if lost:
            note(broken_ptr, t)


@triton.jit
def decide(pointers, row, offs, todo, chosen, u, g, p, CFG: tl.constexpr):
    """Step the elements in `todo`, which are decided now (float32 parameters). Returns their (mask u)^2, else 0."""
    multiples = multiplier(chosen, u, g, row, CFG)
    new = stepped(p, p, g, u, multiples, row, CFG)
    tl.store(column(pointers, PARAM, CFG.param, False) + offs, narrow(new, CFG.param), mask=todo)
    masked = multiples * u
    return tl.where(todo, masked * masked, 0.0)


@triton.jit
def _lowest(bits):
    """The place (0 to 31) of the lowest bit that is set in each uint32; undefined for 0."""
    lowest = bits & ((bits ^ 0xFFFFFFFF) + 1)
    return (lowest.to(tl.float32).to(tl.uint32, bitcast=True) >> 23).to(tl.int32) - 127


@triton.jit
def _list(tiny_ptr, ranks, offs, key, listed, TINY: tl.constexpr):
    """Append elements to a tensor's list. Those that do not fit are only counted."""
    index = tl.atomic_add(ranks + TIED + offs * 0, tl.full(offs.shape, 1, tl.int64), mask=listed, sem="relaxed")
    fits = listed & (index < TINY)
    tl.store(tiny_ptr + index, offs.to(tl.uint32).to(tl.int32, bitcast=True), mask=fits)
    tl.store(tiny_ptr + TINY + index, key.to(tl.int32, bitcast=True), mask=fits)


@triton.jit
def _gather(todo_ptr, word, bits, place, first, ROOM: tl.constexpr):
    """Store the flat indices of the set bits from number `first` on, as many as there is room for.

    `place` is the number of each word's first set bit.
    """
    rounds = tl.max(population(bits))
    for _ in range(rounds):
        offs = word * 32 + _lowest(bits)
        fits = (bits != 0) & (place >= first) & (place < first + ROOM)
        tl.store(todo_ptr + (place - first), offs.to(tl.uint32).to(tl.int32, bitcast=True), mask=fits)
        bits = bits & (bits - 1)
        place += 1


@triton.jit
def settle_kernel(
    partials_ptr, tiny_ptr, todo_ptr, marks_ptr, selected_ptr, work_ptr,
    pointers_ptr, numbers_ptr, ranks_ptr, facts_ptr,
    TINY: tl.constexpr, BINS: tl.constexpr, WORDS: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr,
    CFG: tl.constexpr,
):  # fmt: skip
    """Decide the undecided elements of all bins but the critical one, and list the elements of that.

    A program has WORDS words of 32 elements of one tensor. Few bits are set, so the indices of the set ones are stored
    first, ROOM at a time, and these elements are then worked on side by side. Reads a bit for each element, and for
    each undecided one the tensors that its score is made of; writes its parameter (if `CFG.writes`). With
    `CFG.sums` it sets a bit at `selected_ptr` if the element is selected, and stores 8 bytes a program: the sums over
    what is decided here. `tiny_ptr` has TINY indices, then TINY keys for each tensor.
    """
    program = tl.program_id(0)
    t, part = tl.load(work_ptr + 2 * program), tl.load(work_ptr + 2 * program + 1)
    ranks, facts, row = row_of(ranks_ptr, t, RANKS), row_of(facts_ptr, t, FACTS), row_of(numbers_ptr, t, NUMBERS)
    pointers, tiny = pointers_of(pointers_ptr, t), tiny_ptr + tl.load(facts + LARGE) * (2 * TINY)
    critical = tl.load(ranks + CRITICAL)
    low, high = tl.load(ranks + LOW).to(tl.uint32), tl.load(ranks + HIGH).to(tl.uint32)
    count, masked = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    selected_sq, rest_sq = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    PER: tl.constexpr = CFG.block // 32
    word = part.to(tl.int64) * WORDS + tl.arange(0, WORDS)
    there = word < tl.load(facts + CHUNKS) * PER
    bits = tl.load(marks_ptr + tl.load(facts + CHUNK_AT) * PER + word, mask=there, other=0)
    bits = bits.to(tl.uint32, bitcast=True)
    if (tl.load(ranks + MODE) != BRACKET) | (critical < 0):
        bits = bits * 0
    counts = population(bits)
    place, total = tl.cumsum(counts, 0) - counts, tl.sum(counts)
    mine = todo_ptr + program.to(tl.int64) * ROOM
    for first in range(0, total, ROOM):
        tl.debug_barrier()
        _gather(mine, word, bits, place, first, ROOM)
        tl.debug_barrier()
        for at in range(0, tl.minimum(total - first, ROOM), BLOCK):
            i = at + tl.arange(0, BLOCK)
            todo = i < tl.minimum(total - first, ROOM)
            offs = tl.load(mine + i, mask=todo, other=0).to(tl.uint32, bitcast=True).to(tl.int64)
            key, u, g, p = keys_at(pointers, row, offs, todo, False, CFG)
            where = bin_of(key, low, high)
            _list(tiny, ranks, offs, key, todo & (where == critical), TINY)
            if CFG.writes:
                chosen = where > critical
                todo = todo & (where != critical)
                masked += decide(pointers, row, offs, todo, chosen, u, g, p, CFG)
                count += (todo & chosen).to(tl.float32)
            if CFG.sums:
                above, below = todo & (where > critical), todo & (where < critical)
                add_marks(selected_ptr + tl.load(facts + CHUNK_AT) * PER, offs, above)
                selected_sq += tl.where(above, u * u, 0.0)
                rest_sq += tl.where(below, u * u, 0.0)
    partial = partials_ptr + program.to(tl.int64) * 2
    if CFG.writes and CFG.statistics:
        tl.store(partial, tl.sum(count))
        tl.store(partial + 1, tl.sum(masked))
    if CFG.sums:
        tl.store(partial, tl.sum(selected_sq))
        tl.store(partial + 1, tl.sum(rest_sq))


@triton.jit
def by_rank_of_list(keys_ptr, place, x, i, listed):
    """The numbers of a list in the order of their ranks, so that a sum does not depend on the list's order.

    They are stored over the list's keys, which are not needed any more.
    """
    tl.debug_barrier()
    tl.store(keys_ptr + place, x.to(tl.int32, bitcast=True), mask=listed)
    tl.debug_barrier()
    return tl.load(keys_ptr + i, mask=listed, other=0).to(tl.float32, bitcast=True)


@triton.jit
def ties_kernel(
    partials_ptr, tiny_ptr, broken_ptr, selected_ptr, tensors_ptr, pointers_ptr, numbers_ptr, ranks_ptr, facts_ptr,
    TINY: tl.constexpr, BINS: tl.constexpr, CFG: tl.constexpr,
):  # fmt: skip
    """Rank the listed elements of one tensor a program, equal scores by index; step them, and keep the threshold.

    With `CFG.sums` they are not stepped: those that are selected are marked, and their squares added up.

    The order of the list depends on the order of atomics; the ranks, and so the results, do not.
    """
    t = tl.load(tensors_ptr + tl.program_id(0))
    ranks = row_of(ranks_ptr, t, RANKS)
    critical, listed = tl.load(ranks + CRITICAL), tl.load(ranks + TIED).to(tl.int32)
    count, masked = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
    if (tl.load(ranks + MODE) == BRACKET) & (critical >= 0):
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
        chosen, last = (place < left) & (key != 0), todo & (place == left - 1)
        fewer = listed * 0
        if CFG.share_known:  # fewer than K are selected, so the multiplier was another: `repair.py` corrects it
            fewer = tl.sum((last & (key == 0)).to(tl.int32))
        if fewer > 0:
            note(broken_ptr, t)
        else:
            if CFG.writes:
                key, u, g, p = keys_at(pointers, row, index, todo, False, CFG)
                each = decide(pointers, row, index, todo, chosen, u, g, p, CFG)
                count = tl.sum((todo & chosen).to(tl.float32))
                masked = tl.sum(by_rank_of_list(tiny + TINY, place, each, i, todo))
            if CFG.sums:
                chunks = tl.load(row_of(facts_ptr, t, FACTS) + CHUNK_AT)
                add_marks(selected_ptr + chunks * (CFG.block // 32), index, todo & chosen)
                _, u, _, _ = keys_at(pointers, row, index, todo, False, CFG)
                # squares of the rest as negative numbers, NaN among them
                signed = by_rank_of_list(tiny + TINY, place, tl.where(chosen, u * u, -u * u), i, todo)
                count = tl.sum(tl.where(signed > 0, signed, 0.0))
                masked = tl.sum(tl.where(signed > 0, 0.0, -signed))
            if critical < BINS:
                tl.store(ranks + HIGH, tl.max(tl.where(last, key.to(tl.int64), 0)))
                tl.store(ranks + CUTOFF, tl.max(tl.where(last, index, -1)))
            if CFG.ranked:
                tl.store(ranks + PICKED, tl.load(ranks + WANTED) - left + tl.sum((todo & chosen).to(tl.int64)))
            tl.store(ranks + MODE, left * 0 + EXACT)
    if (CFG.writes and CFG.statistics) or CFG.sums:
        partial = partials_ptr + t.to(tl.int64) * 2
        tl.store(partial, count)
        tl.store(partial + 1, masked)
