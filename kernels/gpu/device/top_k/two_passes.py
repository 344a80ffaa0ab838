"""Exact top-K where a step that is written can't be taken back: count everything, then write everything but a few.

Moments that were rounded don't give the update again, so an element is written when it is known if it is selected:

1. `count_kernel` reads what scores are made of. It counts those above the bracket, and those inside of it by bins.
2. `narrow_kernel` finds the bin that holds the K-th score, the *critical* one, which becomes the bracket. If the
   bracket has missed, or the bin holds more than the list, `repair.py` finds the threshold before anything is written.
3. The pass over everything (`selective_step_kernel` with `CFG.pending`) writes all elements. Those in the critical bin,
   some hundred of a tensor, go to a list besides, with all that their step is made of.
4. `finish_kernel` ranks the list, equal scores by index, and writes its elements again, as they should be.

Scores are compared as floats, which takes fewer instructions than their keys, and is the same order. NaN is never
inside of a bracket, so that a bracket misses if the K-th score is NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..config import (
    BRACKET,
    COUNTED,
    CROWD,
    CUTOFF,
    EXACT,
    FACTS,
    HIGH,
    KEYS,
    LARGE,
    LEFT,
    LOW,
    MODE,
    NUMBERS,
    NUMEL,
    RANKS,
    TIED,
)
from ..elements import is_aligned, load_moved, multiplier, pointers_of, row_of, stepped, store_param
from ..rounding import IN_PTX
from ..rules import score_of
from ..scores import key_of, shift_of
from .settle import by_rank_of_list, critical_bin, note

LOWEST = tl.constexpr(0x007FFFFF)  # the key of minus infinity: below it is NaN's alone
BELOW_ZERO = tl.constexpr(0x7FFFFFFE)  # the key of the largest number below zero; 0x7FFFFFFF is no score's
LAST = tl.constexpr(0x7FFFFFFF)  # a cutoff behind every index: top-K takes tensors of fewer elements
FIELDS = tl.constexpr(5)  # of a list's entries: index, score, update, gradient, parameter


@triton.jit
def _score_with(key):
    """The score with this key, float32; NaN for keys above that of infinity."""
    return (key ^ tl.where(key >= 0x80000000, 0x80000000, 0xFFFFFFFF).to(tl.uint32)).to(tl.float32, bitcast=True)


@triton.jit
def _ends(low, high):
    """The lowest and the highest key of a bracket, uint32, as keys that scores can have."""
    low, high = tl.maximum(low, LOWEST), tl.maximum(high, LOWEST)
    high = tl.where(high == BELOW_ZERO + 1, BELOW_ZERO, high)
    return tl.minimum(low, high).to(tl.uint32), high.to(tl.uint32)


@triton.jit
def _count_inside(histogram_ptr, score, low, high, lowest, shift, crowded):
    """Add 1 to the bins of the scores from `low` to `high`, except `crowded`, a crowd's bin.

    Returns int32: 1 where a score is above, 65,536 where it is in the crowd's bin, else 0. `lowest` is the key of
    `low`. In NVIDIA's instructions the keys are made behind a branch, of the few inside.
    """
    if IN_PTX:
        above = tl.inline_asm_elementwise(
            """
            {
                .reg .pred above, inside, crowded;
                .reg .b32 key, flip;
                .reg .b64 address;
                .reg .f32 score;
                setp.gt.f32 above, $2, $4;
                selp.s32 $0, 1, 0, above;
                setp.ge.and.f32 inside, $2, $3, !above;
                @!inside bra DONE;
                add.f32 score, $2, 0f00000000;
                mov.b32 key, score;
                shr.s32 flip, key, 31;
                or.b32 flip, flip, 0x80000000;
                xor.b32 key, key, flip;
                sub.s32 key, key, $5;
                shr.u32 key, key, $6;
                setp.eq.s32 crowded, key, $7;
                @crowded mov.b32 $0, 65536;
                mad.wide.u32 address, key, 4, $1;
                @!crowded red.relaxed.gpu.global.add.s32 [address], 1;
            DONE:
            }
            """,
            "=r,l,f,f,f,r,r,r", [histogram_ptr.to(tl.int64), score, low, high, lowest, shift, crowded],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        above = (score > high).to(tl.int32)
        inside = (score >= low) & (above == 0)
        bins = ((key_of(score) - lowest) >> shift.to(tl.uint32)).to(tl.int32)
        tl.atomic_add(histogram_ptr + tl.where(inside, bins, 0), 1, mask=inside & (bins != crowded), sem="relaxed")
        above += tl.where(inside & (bins == crowded), 65536, 0)
    return above


@triton.jit
def _count(offs, mask, pointers, row, ranks, histogram, FAST: tl.constexpr, CFG: tl.constexpr):
    """Count the scores of one block, for `count_kernel`."""
    lowest, highest = _ends(tl.load(ranks + LOW), tl.load(ranks + HIGH))
    _, g, u, m, _, _, _, _ = load_moved(pointers, offs, mask, row, False, FAST, CFG)
    score = score_of(g, u, m, row, CFG)
    if not FAST:
        score = tl.where(mask, score, float("nan"))
    shift, crowd = shift_of(lowest, highest), tl.load(ranks + CROWD)
    at = tl.where(crowd > 0, ((crowd.to(tl.uint32) - lowest) >> shift.to(tl.uint32)).to(tl.int32), -1)
    tl.static_assert(score.shape[0] < 32768, "a block's two counts fit into an int32")
    found = tl.sum(_count_inside(histogram, score, _score_with(lowest), _score_with(highest), lowest, shift, at))
    tl.atomic_add(ranks + COUNTED, (found & 65535).to(tl.int64), sem="relaxed")
    tl.atomic_add(histogram + at, found >> 16, mask=found > 65535, sem="relaxed")


@triton.jit
def count_kernel(
    histograms_ptr, work_ptr, pointers_ptr, numbers_ptr, ranks_ptr, facts_ptr,
    BINS: tl.constexpr, CFG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count the scores of BLOCK elements of one tensor a program: above its bracket, and inside of it by bins.

    Reads what scores are made of: AdamW 12 bytes an element in float32 and 6 in 16 bits, by momentum 8 and 4. Writes
    nothing but an atomic for each score inside of the bracket, and two a program: one of them for a crowd of equals.
    Nothing is counted of a tensor without a bracket.
    """
    program = tl.program_id(0)
    t, part = tl.load(work_ptr + 2 * program), tl.load(work_ptr + 2 * program + 1)
    facts, ranks = row_of(facts_ptr, t, FACTS), row_of(ranks_ptr, t, RANKS)
    pointers, row = pointers_of(pointers_ptr, t), row_of(numbers_ptr, t, NUMBERS)
    start, numel = part.to(tl.int64) * BLOCK, tl.load(facts + NUMEL)
    histogram = histograms_ptr + tl.load(facts + LARGE) * BINS
    offs = tl.multiple_of(start, BLOCK) + tl.arange(0, BLOCK)
    if tl.load(ranks + MODE) == BRACKET:
        if (start + BLOCK <= numel) & is_aligned(pointers):
            _count(offs, offs >= 0, pointers, row, ranks, histogram, True, CFG)
        else:
            _count(offs, offs < numel, pointers, row, ranks, histogram, False, CFG)


@triton.jit
def narrow_kernel(
    ranks_ptr, histograms_ptr, broken_ptr, tensors_ptr, facts_ptr, BINS: tl.constexpr, TINY: tl.constexpr
):  # fmt: skip
    """Narrow the bracket of one tensor a program to the bin that holds the K-th score. Reads a histogram, 8 KiB.

    A tensor that `critical_bin` has lost is noted. If everything above the bracket is selected, and nothing inside,
    then its upper end is the threshold.
    """
    t = tl.load(tensors_ptr + tl.program_id(0))
    ranks, large = row_of(ranks_ptr, t, RANKS), tl.load(row_of(facts_ptr, t, FACTS) + LARGE)
    if tl.load(ranks + MODE) == BRACKET:
        low, high = _ends(tl.load(ranks + LOW), tl.load(ranks + HIGH))
        critical, lost = critical_bin(ranks, histograms_ptr + large * BINS, low, high, BINS, TINY)
        shift, highest = shift_of(low, high), high.to(tl.int64)
        begin = low.to(tl.int64) + (critical.to(tl.int64) << shift)
        if lost:
            note(broken_ptr, t)
        elif critical == BINS:
            tl.store(ranks + HIGH, highest)
            tl.store(ranks + CUTOFF, highest * 0 - 1)
            tl.store(ranks + MODE, highest * 0 + EXACT)
        else:
            tl.store(ranks + LOW, begin)
            tl.store(ranks + HIGH, tl.minimum(begin + (tl.full((), 1, tl.int64) << shift) - 1, highest))


@triton.jit
def has_one_border(ranks, start, BLOCK: tl.constexpr):
    """True if one comparison selects among BLOCK elements from index `start` on, except for those that go to a list.

    That is if all scores that equal an exact threshold, which counts up to an index, are selected there, or none is. A
    threshold of 0 is that of a tensor with fewer than K scores, and a dense tensor has none.
    """
    mode, cutoff = tl.load(ranks + MODE), tl.load(ranks + CUTOFF)
    alike = (cutoff < start) | (cutoff >= start + BLOCK - 1)
    return (mode == BRACKET) | ((mode == EXACT) & alike & (tl.load(ranks + HIGH) > LOWEST))


@triton.jit
def borders_of(start, ranks, BLOCK: tl.constexpr, FAST: tl.constexpr):
    """(border, low, last) of the BLOCK elements from index `start` on.

    A score above the border is selected. One from `low` to the border is in the bracket; where the threshold is exact,
    there is none, and `low` is NaN. Scores equal to the border are selected up to index `last`; with FAST, which
    promises `has_one_border`, none is.
    """
    exact, top = tl.load(ranks + MODE) != BRACKET, tl.load(ranks + HIGH)
    cutoff = tl.where(exact, tl.load(ranks + CUTOFF), -1)
    if FAST:  # where all that equal the threshold are selected, the border is the score below it
        top = tl.where(cutoff >= start + BLOCK - 1, top - 1, top)
    else:
        cutoff = tl.where(top == 0, LAST, tl.minimum(cutoff, LAST))
    lowest, highest = _ends(tl.load(ranks + LOW), top)
    return _score_with(highest), tl.where(exact, float("nan"), _score_with(lowest)), cutoff.to(tl.int32)


@triton.jit
def list_undecided(undecided, list_ptr, score, offs, u, g, p, ranks, TINY: tl.constexpr):
    """Append the undecided elements of a block to their tensor's list, of TINY entries, a field after the other.

    They have been counted before, and fit. Most blocks have none, which costs a meeting of their warps. The others find
    theirs by keys anew: the compiler would exchange `undecided` between threads before the branch.
    """
    if tl.max(undecided.to(tl.int32), 0) > 0:
        low, high = _ends(tl.load(ranks + LOW), tl.load(ranks + HIGH))
        key, index = key_of(score), offs.to(tl.int32)
        inside = (key >= low) & (key <= high)
        one = tl.full(index.shape, 1, tl.int64)
        place = tl.atomic_add(ranks + TIED + index * 0, one, mask=inside, sem="relaxed")
        fits, entry = inside & (place < TINY), list_ptr + place
        tl.store(entry, index, mask=fits)
        tl.store(entry + TINY, score.to(tl.int32, bitcast=True), mask=fits)
        tl.store(entry + 2 * TINY, u.to(tl.int32, bitcast=True), mask=fits)
        tl.store(entry + 3 * TINY, g.to(tl.int32, bitcast=True), mask=fits)
        tl.store(entry + 4 * TINY, p.to(tl.int32, bitcast=True), mask=fits)


@triton.jit
def finish_kernel(
    partials_ptr, lists_ptr, tensors_ptr, pointers_ptr, numbers_ptr, ranks_ptr, facts_ptr, keys_ptr,
    TINY: tl.constexpr, CFG: tl.constexpr,
):  # fmt: skip
    """Rank the listed elements of one tensor a program, equal scores by index, and write their parameters.

    Reads 20 bytes an entry, and the scores once for each entry, from the cache. With `CFG.statistics` it stores 8 bytes
    a program: how many are selected, and the sum of their (mask u)^2, added up in the order of their ranks.
    """
    t = tl.load(tensors_ptr + tl.program_id(0))
    ranks, facts = row_of(ranks_ptr, t, RANKS), row_of(facts_ptr, t, FACTS)
    listed = tl.load(ranks + TIED).to(tl.int32)
    if (tl.load(ranks + MODE) == BRACKET) & (listed > 0):
        row, pointers, keys = row_of(numbers_ptr, t, NUMBERS), pointers_of(pointers_ptr, t), row_of(keys_ptr, t, KEYS)
        i, entries = tl.arange(0, TINY), lists_ptr + tl.load(facts + LARGE) * (FIELDS * TINY)
        todo = i < listed
        index = tl.load(entries + i, mask=todo, other=0)
        u = tl.load(entries + 2 * TINY + i, mask=todo, other=0).to(tl.float32, bitcast=True)
        g = tl.load(entries + 3 * TINY + i, mask=todo, other=0).to(tl.float32, bitcast=True)
        p = tl.load(entries + 4 * TINY + i, mask=todo, other=0).to(tl.float32, bitcast=True)
        place = tl.zeros([TINY], tl.int32)
        key = key_of(tl.load(entries + TINY + i, mask=todo, other=0).to(tl.float32, bitcast=True))
        for j in range(listed):
            other = key_of(tl.load(entries + TINY + j).to(tl.float32, bitcast=True))
            place += ((other > key) | ((other == key) & (tl.load(entries + j) < index))).to(tl.int32)
        chosen = place < tl.load(ranks + LEFT)
        multiples = multiplier(chosen, u, g, row, CFG)
        new, offs = stepped(p, p, g, u, multiples, row, CFG), index.to(tl.int64)
        store_param(pointers, offs, new, todo, keys, False, CFG)
        if CFG.statistics:
            masked = by_rank_of_list(entries + TINY, place, (multiples * u) * (multiples * u), i, todo)
            tl.store(partials_ptr + 2 * t.to(tl.int64), tl.sum((todo & chosen).to(tl.float32)))
            tl.store(partials_ptr + 2 * t.to(tl.int64) + 1, tl.sum(masked))
