"""Exact ranking of whole tensors, whatever their scores look like: for those whose bracket missed or list overflowed.

One launch, whose programs run at the same time and wait for each other: a radix select over the keys (11, 11 and 10
bits), then the index that splits the equal ones, then the step of the elements that are still undecided. The first part
is left out where the K-th key is known (TIE): that of an embedding is 0 in each step in which fewer than K coordinates
have a gradient. If no tensor needs it, the launch ends after a few microseconds. The host never learns which it was.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..config import (
    CHUNK_AT,
    CRITICAL,
    CUTOFF,
    EXACT,
    FACTS,
    HIGH,
    LEFT,
    LOW,
    MODE,
    NUMBERS,
    NUMEL,
    PARAM,
    PICKED,
    RANKS,
    STRENGTH_SELECTED,
    TIE,
    TIED,
    WANTED,
)
from ..elements import column, mask_of, multiplier, pointers_of, row_of, stepped
from ..rounding import narrow
from ..scores import DIGIT, bin_of, descend, keys_at, store_marks
from ..strengths import strength_of_count


@triton.jit
def _meet(counter_ptr, target):
    """Wait until all programs are here. Loads that go past the L1 then see the stores that came before."""
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="acq_rel")
    while tl.atomic_add(counter_ptr, 0, sem="acquire") < target:
        pass
    tl.debug_barrier()


@triton.jit
def _count_digits(histogram_ptr, pointers, row, start, end, numel, prefix, taken, to, BLOCK: tl.constexpr,
                  CFG: tl.constexpr):  # fmt: skip
    """Count the digits that begin at bit `to`, of the keys whose first `taken` bits are `prefix`.

    They are added up here first, because many may be equal.
    """
    counts = tl.zeros([DIGIT], tl.int32)
    for at in range(start, end, BLOCK):
        offs = at + tl.arange(0, BLOCK)
        key, _, _, _ = keys_at(pointers, row, offs, offs < numel, False, CFG)
        inside = (offs < numel) & ((key.to(tl.uint64) >> (32 - taken).to(tl.uint64)) == prefix.to(tl.uint64))
        digit = (key >> to.to(tl.uint32)) & tl.where(to == 0, 1023, 2047).to(tl.uint32)
        counts += tl.histogram(digit.to(tl.int32), DIGIT, mask=inside)
    tl.atomic_add(histogram_ptr + tl.arange(0, DIGIT), counts, mask=counts > 0, sem="relaxed")


@triton.jit
def _equal(pointers, row, start, end, numel, wanted, BLOCK: tl.constexpr, CFG: tl.constexpr):
    """The number of keys of this range that are equal to `wanted`."""
    count = tl.zeros([BLOCK], tl.int32)
    for at in range(start, end, BLOCK):
        offs = at + tl.arange(0, BLOCK)
        key, _, _, _ = keys_at(pointers, row, offs, offs < numel, False, CFG)
        count += ((key == wanted) & (offs < numel)).to(tl.int32)
    return tl.sum(count).to(tl.int64)


@triton.jit
def _owner(equals_ptr, left, programs, PROGRAMS: tl.constexpr):
    """(the program in whose range the left-th of the equal keys lies, its rank there); -1 if there is none."""
    others = tl.arange(0, PROGRAMS)
    equals = tl.load(equals_ptr + others, mask=others < programs, other=0, cache_modifier=".cg")
    so_far = tl.cumsum(equals, 0)
    owner = tl.max(tl.where((so_far - equals < left) & (left <= so_far), others, -1))
    return owner, left - tl.sum(tl.where(others < owner, equals, 0))


@triton.jit
def _share(equals_ptr, left, pid, numel, programs, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    """A program's share (start, end) of the range in which the left-th equal key lies, and its rank in that range."""
    each = tl.cdiv(tl.cdiv(numel, BLOCK), programs) * BLOCK
    owner, left_there = _owner(equals_ptr, left, programs, PROGRAMS)
    share = tl.cdiv(each, BLOCK * programs) * BLOCK
    begin = owner * each + pid * share
    stop = tl.where(owner < 0, begin, tl.minimum(begin + share, tl.minimum((owner + 1) * each, numel)))
    return begin, stop, left_there


@triton.jit
def _place(pointers, row, start, end, numel, wanted, left, BLOCK: tl.constexpr, CFG: tl.constexpr):
    """The index of the left-th key of this range that is equal to `wanted`."""
    found = start * 0 - 1
    for at in range(start, end, BLOCK):
        offs = at + tl.arange(0, BLOCK)
        key, _, _, _ = keys_at(pointers, row, offs, offs < numel, False, CFG)
        equal = ((key == wanted) & (offs < numel)).to(tl.int64)
        here = tl.max(tl.where((tl.cumsum(equal, 0) == left) & (equal > 0), offs, -1))
        found = tl.maximum(found, here)
        left = left - tl.sum(equal)
    return found


@triton.jit
def _finish(pointers, row, ranks, start, end, numel, wanted, cutoff, selected, BINS: tl.constexpr,
            BLOCK: tl.constexpr, CFG: tl.constexpr):  # fmt: skip
    """Step the undecided elements and correct those decided wrongly. Returns (number selected, sum of (mask u)^2).

    An element that was decided has been rounded already, so its correction rounds a second time: it is off by two units
    in the last place of the largest number at most. Undecided elements are rounded once. `selected` is the multiplier
    of the selected: another than the elements were decided with, if fewer than K scores are numbers.
    """
    changed = tl.zeros([BLOCK], tl.float32) + tl.load(row + STRENGTH_SELECTED) != selected
    low, high = tl.load(ranks + LOW).to(tl.uint32), tl.load(ranks + HIGH).to(tl.uint32)
    critical = tl.arange(0, BLOCK) * 0 + tl.load(ranks + CRITICAL)
    counted, summed = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for at in range(start, end, BLOCK):
        offs = at + tl.arange(0, BLOCK)
        mask = offs < numel
        key, u, g, p = keys_at(pointers, row, offs, mask, False, CFG)
        chosen = (key > wanted) | ((key == wanted) & (offs <= cutoff) & (key != 0))
        inside = (key >= low) & (key <= high)
        place = bin_of(tl.where(inside, key, low), low, high)
        undecided = inside & ((critical < 0) | (place == critical))
        was = (key > high) | (inside & (critical >= 0) & (place > critical))
        multiples = mask_of(chosen, u, g, selected, row, CFG)
        exact = stepped(p, p, g, u, multiples, row, CFG)
        corrected = tl.fma(multiplier(was, u, g, row, CFG) - multiples, u, p)
        new = tl.where(undecided, exact, corrected)
        todo = mask & (undecided | (chosen != was) | (chosen & changed))
        tl.store(column(pointers, PARAM, CFG.param, False) + offs, narrow(new, CFG.param), mask=todo)
        counted += (chosen & mask).to(tl.float32)
        summed += tl.where(mask, (multiples * u) * (multiples * u), 0.0)
    return tl.sum(counted), tl.sum(summed)


@triton.jit
def _mark(marks_ptr, pointers, row, start, end, numel, wanted, cutoff, BLOCK: tl.constexpr, CFG: tl.constexpr):
    """Mark the selected elements of this range anew. Returns the sums of u^2 over them and over the rest.

    `marks_ptr` is the tensor's first word.
    """
    tl.static_assert(BLOCK == CFG.block, "marks are of whole blocks")
    selected_sq, rest_sq = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for at in range(start, end, BLOCK):
        offs = at + tl.arange(0, BLOCK)
        mask = offs < numel
        key, u, _, _ = keys_at(pointers, row, offs, mask, False, CFG)
        chosen = ((key > wanted) | ((key == wanted) & (offs <= cutoff) & (key != 0))) & mask
        store_marks(marks_ptr + at // 32, chosen, CFG)
        squares = tl.where(mask, u * u, 0.0)
        selected_sq += tl.where(chosen, squares, 0.0)
        rest_sq += tl.where(chosen, 0.0, squares)
    return tl.sum(selected_sq), tl.sum(rest_sq)


@triton.jit
def repair_kernel(
    repaired_ptr, selected_ptr, broken_ptr, meeting_ptr, histograms_ptr, equals_ptr,
    pointers_ptr, numbers_ptr, ranks_ptr, facts_ptr, hyper_ptr, programs,
    BINS: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr, CFG: tl.constexpr,
):  # fmt: skip
    """Rank the tensors on the list `broken_ptr` exactly, and finish their step. Reads a tensor's scores five times.

    Where the K-th key is known (TIE), it reads them twice: to count its equals, and to finish. The last one of them
    that is selected lies in the range of one program. All programs share that range out to look for it.

    All `programs` of the launch have to run at the same time. `meeting_ptr` and `histograms_ptr` (twice three
    histograms) have to be zero before. `equals_ptr` has room for two numbers a program. PROGRAMS is a power of two, not
    less than `programs`. Without `CFG.writes` only the threshold is kept, the multiplier with `CFG.share_known`, and
    marks and sums with `CFG.sums`.
    """
    pid = tl.program_id(0)
    met, ranked = 0, 0  # of the tensors, those without a TIE
    for i in range(tl.load(broken_ptr)):
        t = tl.load(broken_ptr + 1 + i)
        pointers, row = pointers_of(pointers_ptr, t), row_of(numbers_ptr, t, NUMBERS)
        ranks, facts = row_of(ranks_ptr, t, RANKS), row_of(facts_ptr, t, FACTS)
        numel, selected = tl.load(facts + NUMEL), tl.load(row + STRENGTH_SELECTED)
        each = tl.cdiv(tl.cdiv(numel, BLOCK), programs) * BLOCK
        start = pid.to(tl.int64) * each
        end = tl.minimum(start + each, numel)
        histograms = histograms_ptr + (ranked % 2) * (3 * DIGIT)
        tie = tl.load(ranks + TIE)
        left = tl.where(tie >= 0, tl.load(ranks + LEFT), tl.load(ranks + WANTED)).to(tl.int32)
        prefix = tl.where(tie >= 0, tie, 0).to(tl.uint32)
        places = tl.arange(0, DIGIT)
        to = left * 0 + 21
        for digit in range(tl.where(tie >= 0, 0, 3)):
            taken = 11 * digit + left * 0
            _count_digits(histograms + digit * DIGIT, pointers, row, start, end, numel, prefix, taken, to, BLOCK, CFG)
            met += programs
            _meet(meeting_ptr, met)
            if (digit == 0) & (pid == 0):  # everybody is done with the histograms of the tensor that was ranked before
                other = histograms_ptr + ((ranked + 1) % 2) * (3 * DIGIT)
                for k in range(3):
                    tl.store(other + k * DIGIT + places, tl.zeros([DIGIT], tl.int32))
            found, left, _ = descend(tl.load(histograms + digit * DIGIT + places, cache_modifier=".cg"), left)
            prefix = (prefix << tl.where(digit < 2, 11, 10).to(tl.uint32)) | found
            to = tl.maximum(to - 11, 0)
        ranked += tl.where(tie >= 0, 0, 1)
        tl.store(equals_ptr + pid, _equal(pointers, row, start, end, numel, prefix, BLOCK, CFG))
        met += programs
        _meet(meeting_ptr, met)
        begin, stop, left_there = _share(equals_ptr, left, pid, numel, programs, PROGRAMS, BLOCK)
        tl.store(equals_ptr + programs + pid, _equal(pointers, row, begin, stop, numel, prefix, BLOCK, CFG))
        met += programs
        _meet(meeting_ptr, met)
        owner, left_there = _owner(equals_ptr + programs, left_there, programs, PROGRAMS)
        if owner == pid:
            tl.store(ranks + LEFT, _place(pointers, row, begin, stop, numel, prefix, left_there, BLOCK, CFG))
        met += programs
        _meet(meeting_ptr, met)
        cutoff = tl.load(ranks + LEFT, cache_modifier=".cg")
        if CFG.share_known:
            more = tl.load(ranks + WANTED) - left  # scores above the K-th; none of those that equal a NaN is selected
            selected = tl.where(prefix == 0, strength_of_count(hyper_ptr, facts, more), selected)
        if CFG.writes:
            count, masked = _finish(pointers, row, ranks, start, end, numel, prefix, cutoff, selected, BINS, BLOCK,
                                    CFG)  # fmt: skip
            if CFG.statistics:
                tl.store(repaired_ptr + (t.to(tl.int64) * programs + pid) * 2, count)
                tl.store(repaired_ptr + (t.to(tl.int64) * programs + pid) * 2 + 1, masked)
        if CFG.sums:
            marks = selected_ptr + tl.load(facts + CHUNK_AT) * (CFG.block // 32)
            selected_sq, rest_sq = _mark(marks, pointers, row, start, end, numel, prefix, cutoff, BLOCK, CFG)
            tl.store(repaired_ptr + (t.to(tl.int64) * programs + pid) * 2, selected_sq)
            tl.store(repaired_ptr + (t.to(tl.int64) * programs + pid) * 2 + 1, rest_sq)
        met += programs
        _meet(meeting_ptr, met)
        if pid == 0:
            if CFG.share_known:
                tl.store(row + STRENGTH_SELECTED, selected)
            tl.store(ranks + HIGH, prefix.to(tl.int64))
            tl.store(ranks + CUTOFF, cutoff)
            tl.store(ranks + MODE, cutoff * 0 + EXACT)
            if CFG.ranked:
                wanted = tl.load(ranks + WANTED)
                tl.store(ranks + PICKED, tl.where(prefix == 0, wanted - left, wanted))
            tl.store(ranks + TIED, cutoff * 0 - 1)
