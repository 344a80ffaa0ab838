"""A matched random control: as many coordinates of each tensor as its policy selects, those with the largest numbers.

The random numbers are hashes of an element's index, so to form one again costs no memory traffic. They are uniform:
where it is known how many are selected, the limit among the numbers is known but for a few standard deviations, the
*bracket*.

1. `control_kernel` with COUNTS looks at what the policy selects: how many, and their sums.
2. `control_kernel` with DRAWS adds up the control's coordinates above the bracket, and lists the few inside of it.
3. `limit_kernel` ranks the list of a tensor, which gives the limit exactly, and the two multipliers.

The pass over everything then selects by number and limit (`by_number` in `selections.py`). The same definition in plain
torch is `kernels/reference/control.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .config import (
    ABOVE,
    DENSE,
    FACTS,
    KEYS,
    LIMIT,
    LIMIT_AT,
    LIST_AT,
    LISTED,
    MODE,
    MOVING,
    NUMBERS,
    NUMEL,
    OUR_REST_SQ,
    OURS_SQ,
    PICKED,
    PLAN,
    RANKS,
    ROOM,
    ROWS,
    ROWS_AT,
    STRENGTH_REST,
    STRENGTH_SELECTED,
    THEIR_REST_SQ,
    THEIRS_SQ,
    WANTED,
)
from .elements import is_aligned, load_moved, pointers_of, row_of, store_moments
from .numbers import CONTROL_CAP, REST, SELECTED, group_row
from .rounding import INTERPRETED
from .scores import descend
from .selections import random_number, select, stands_still
from .strengths import is_finite, multipliers_of
from .sums import store_sums

NUMBERS_END = tl.constexpr(1 << 24)  # random numbers are below this
SLACK = tl.constexpr(24.0)  # ranks by which a bracket is wider: few selected are not spread as a normal distribution
NO_INDEX = tl.constexpr(0xFFFFFFFF)  # the largest uint32


@triton.jit
def bracket_of(picked, moving, width):
    """(lowest, highest) of the random numbers which the limit lies among, most likely; int32.

    The limit is the `picked`-th largest of `moving` numbers. `width` is half the bracket in standard deviations of its
    rank. If all are selected, or none, the bracket is empty, and all or none are above it.
    """
    total, count = tl.maximum(moving, 1).to(tl.float64), picked.to(tl.float64)
    reach = width * tl.sqrt(tl.maximum(count * (total - count), 0.0) / total) + SLACK
    end = total * 0.0 + NUMBERS_END
    middle, half = end * (1.0 - count / total), end * (reach / total)
    low = tl.minimum(tl.maximum(middle - half, 0.0), end).to(tl.int32)
    high = tl.minimum(tl.maximum(middle + half, -1.0), end - 1.0).to(tl.int32)
    low, high = tl.where(picked >= moving, 0, low), tl.where(picked >= moving, -1, high)
    return tl.where(picked <= 0, NUMBERS_END, low), tl.where(picked <= 0, NUMBERS_END, high)


@triton.jit
def _list(ranks, indices, squares_ptr, offs, squares, inside, room, CFG: tl.constexpr):
    """Append the elements inside of the bracket to the tensor's list. Those that do not fit are only counted."""
    index = tl.atomic_add(ranks + LISTED + offs * 0, tl.full(offs.shape, 1, tl.int64), mask=inside, sem="relaxed")
    fits = inside & (index < room)
    tl.store(indices + index, offs.to(tl.uint32).to(tl.int32, bitcast=True), mask=fits)
    if CFG.control_norm:
        tl.store(squares_ptr + index, squares, mask=fits)


@triton.jit
def _add_three(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def _three_sums(a, b, c):
    """The sums of three blocks in one reduction, which share its barriers."""
    if INTERPRETED:  # one element after the other there
        first, second, third = tl.sum(a), tl.sum(b), tl.sum(c)
    else:
        first, second, third = tl.reduce((a, b, c), 0, _add_three)
    return first, second, third


@triton.jit
def _look(
    offs, mask, pointers, row, ranks, facts, keys, out, apart, indices, squares_ptr, room, low, high,
    FUNCTION: tl.constexpr, FAST: tl.constexpr, COUNTS: tl.constexpr, DRAWS: tl.constexpr, MOVES: tl.constexpr,
    CFG: tl.constexpr,
):  # fmt: skip
    """Look at one block, for `control_kernel`. Columns of sums lie `apart` numbers apart."""
    _, g, u, m, previous, x, y, z = load_moved(pointers, offs, mask, row, False, FAST, CFG)
    if MOVES:
        store_moments(pointers, offs, x, y, z, mask, FAST, CFG)
    moving = mask
    if CFG.still:
        moving = mask & (stands_still(u, g) == 0)
    squares = tl.where(moving, u * u, 0.0)
    if COUNTS:
        chosen, _, _ = select(offs, g, u, m, previous, row, ranks, facts, keys, FUNCTION, False, CFG)
        if CFG.strength != "fixed" and CFG.estimate == "exact":
            store_sums(out, apart, chosen, g, u, m, mask, CFG)
        count = (chosen & mask).to(tl.float32)  # sums of up to 2^24 are exact
        if CFG.control_norm:
            picked, theirs, rest = _three_sums(count, tl.where(chosen, squares, 0.0), tl.where(chosen, 0.0, squares))
            tl.store(out + apart * THEIRS_SQ, theirs)
            tl.store(out + apart * THEIR_REST_SQ, rest)
        else:
            picked = tl.sum(count)
        tl.atomic_add(ranks + PICKED, picked.to(tl.int64), sem="relaxed")
        if CFG.still:
            tl.atomic_add(ranks + MOVING, tl.sum(moving.to(tl.int64)), sem="relaxed")
    if DRAWS:
        number = random_number(offs, keys)
        above, inside = moving & (number > high), moving & (number >= low) & (number <= high)
        count = above.to(tl.float32)
        if CFG.control_norm:
            drawn, ours, rest = _three_sums(
                count, tl.where(above, squares, 0.0), tl.where(above | inside, 0.0, squares)
            )
            tl.store(out + apart * OURS_SQ, ours)
            tl.store(out + apart * OUR_REST_SQ, rest)
        else:
            drawn = tl.sum(count)
        tl.store(out + apart * ABOVE, drawn)
        _list(ranks, indices, squares_ptr, offs, squares, inside, room, CFG)


@triton.jit
def control_kernel(
    sums_ptr, indices_ptr, squares_ptr, work_ptr, pointers_ptr, numbers_ptr, ranks_ptr, facts_ptr, keys_ptr, plan_ptr,
    apart, width, FUNCTION: tl.constexpr, COUNTS: tl.constexpr, DRAWS: tl.constexpr, MOVES: tl.constexpr,
    CFG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Look at BLOCK elements of one tensor a program: those of the policy are counted, or the control draws, or both.

    COUNTS reads what the selection, the strength's sums and the update are made of: AdamW in float32 12 bytes an
    element. MOVES also stores the moments, which are final: 8 bytes more. DRAWS reads what the update is made of (8 of
    moments that were stored), and nothing where the norm does not matter and nothing stands still; it writes 8 bytes
    for each element inside of the bracket, some 6 sqrt(n) of a tensor of n. Both in one launch read once: that needs
    the number that the policy selects in advance, and WANTED is it, for top-K. Besides, each program writes up to 36
    bytes. Nothing but the moments moves.
    """
    program = tl.program_id(0)
    t, part = tl.load(work_ptr + 2 * program), tl.load(work_ptr + 2 * program + 1)
    facts, row, keys = row_of(facts_ptr, t, FACTS), row_of(numbers_ptr, t, NUMBERS), row_of(keys_ptr, t, KEYS)
    ranks, pointers, plan = row_of(ranks_ptr, t, RANKS), pointers_of(pointers_ptr, t), row_of(plan_ptr, t, PLAN)
    numel, out = tl.load(facts + NUMEL), sums_ptr + program
    first, room = tl.load(plan + LIST_AT), tl.load(plan + ROOM)
    low, high = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    if DRAWS:
        picked, moving = tl.load(ranks + PICKED), numel
        if COUNTS:
            picked = tl.load(ranks + WANTED)
        if CFG.still:
            moving = tl.load(ranks + MOVING)
        low, high = bracket_of(picked, moving, width)
    start = part.to(tl.int64) * BLOCK
    offs = tl.multiple_of(start, BLOCK) + tl.arange(0, BLOCK)
    if (start + BLOCK <= numel) & is_aligned(pointers):
        _look(offs, offs >= 0, pointers, row, ranks, facts, keys, out, apart, indices_ptr + first, squares_ptr + first,
              room, low, high, FUNCTION, True, COUNTS, DRAWS, MOVES, CFG)  # fmt: skip
    else:
        _look(offs, offs < numel, pointers, row, ranks, facts, keys, out, apart, indices_ptr + first,
              squares_ptr + first, room, low, high, FUNCTION, False, COUNTS, DRAWS, MOVES, CFG)  # fmt: skip


@triton.jit
def _candidates(i, count, indices, squares_ptr, pointers, row, keys, LISTED_ONLY: tl.constexpr, CFG: tl.constexpr):
    """(key, u^2) of these entries of a list, or of these elements of the tensor. A key of -1 is no candidate.

    A key is the random number, and below it the index, inverted: the larger one is selected first. int64 of 56 bits.
    """
    valid = i < count
    square = tl.zeros(i.shape, tl.float32)
    if LISTED_ONLY:
        index = tl.load(indices + i, mask=valid, other=0).to(tl.uint32, bitcast=True).to(tl.int64)
        if CFG.control_norm:
            square = tl.load(squares_ptr + i, mask=valid, other=0.0)
    else:
        index = i
        _, g, u, _, _, _, _, _ = load_moved(pointers, i, valid, row, False, False, CFG)
        if CFG.still:
            valid = valid & (stands_still(u, g) == 0)
        square = u * u
    key = (random_number(index, keys).to(tl.int64) << 32) | (index ^ NO_INDEX)
    return tl.where(valid, key, -1), tl.where(valid, square, 0.0)


@triton.jit
def _last_key(
    rank, count, indices, squares_ptr, pointers, row, keys,
    LISTED_ONLY: tl.constexpr, CFG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A key that exactly `rank` candidates reach: digit by digit, 8 bits each, the largest first.

    The digits of the number are always looked at, those of the index only where equal numbers are not all selected.
    """
    prefix, shift = rank * 0, rank * 0 + 56
    left, equal = rank, rank * 0 - 1
    while (shift > 0) & ((shift > 32) | (equal != left)):
        shift = shift - 8
        histogram = tl.zeros([256], tl.int64)
        for first in range(0, count, BLOCK):
            key, _ = _candidates(first + tl.arange(0, BLOCK).to(tl.int64), count, indices, squares_ptr, pointers, row,
                                 keys, LISTED_ONLY, CFG)  # fmt: skip
            inside = (key >= 0) & ((key >> (shift + 8)) == prefix)
            digits = tl.where(inside, (key >> shift) & 255, 0).to(tl.int32)
            histogram += tl.histogram(digits, 256, mask=inside).to(tl.int64)
        digit, left, equal = descend(histogram, left)
        prefix = (prefix << 8) | digit.to(tl.int64)
    return prefix << shift


@triton.jit
def _listed_sums(last, count, indices, squares_ptr, pointers, row, keys, CFG: tl.constexpr, BLOCK: tl.constexpr):
    """The sums of a list's squares from the key `last` on, and below it; float64.

    The order of the list is arbitrary, so integers are added up, each rounded to 43 bits of the largest: the same sum
    in any order. NaN where a square is not finite.
    """
    largest = tl.zeros([BLOCK], tl.int32)
    for first in range(0, count, BLOCK):
        _, square = _candidates(first + tl.arange(0, BLOCK).to(tl.int64), count, indices, squares_ptr, pointers, row,
                                keys, True, CFG)  # fmt: skip
        largest = tl.maximum(largest, square.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    exponent = (tl.max(largest) >> 23).to(tl.int64)  # 126 + the number of bits before the point
    factor = ((1023 + 43 + 126 - exponent) << 52).to(tl.float64, bitcast=True)
    ours, others = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64)
    for first in range(0, count, BLOCK):
        key, square = _candidates(first + tl.arange(0, BLOCK).to(tl.int64), count, indices, squares_ptr, pointers, row,
                                  keys, True, CFG)  # fmt: skip
        whole = (square.to(tl.float64) * factor).to(tl.int64)
        ours += tl.where(key >= last, whole, 0)
        others += tl.where(key >= last, 0, whole)
    finite = tl.where(exponent < 255, 1.0, float("nan")).to(tl.float64)
    return tl.sum(ours).to(tl.float64) / factor * finite, tl.sum(others).to(tl.float64) / factor * finite


@triton.jit
def _all_sums(last, count, indices, squares_ptr, pointers, row, keys, CFG: tl.constexpr, BLOCK: tl.constexpr):
    """The same sums of a whole tensor, in the order of its elements."""
    ours, others = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for first in range(0, count, BLOCK):
        key, square = _candidates(first + tl.arange(0, BLOCK).to(tl.int64), count, indices, squares_ptr, pointers, row,
                                  keys, False, CFG)  # fmt: skip
        ours += tl.where(key >= last, square, 0.0).to(tl.float64)
        others += tl.where(key >= last, 0.0, square).to(tl.float64)
    return tl.sum(ours), tl.sum(others)


@triton.jit
def _last_sums(sums, apart, rows, BLOCK: tl.constexpr, CFG: tl.constexpr):
    """The sums of one tensor's columns THEIRS_SQ to ABOVE, float64, in one loop. 0 of those that are not stored."""
    a, b, c = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    d, e = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for first in range(0, rows, BLOCK):
        i = first + tl.arange(0, BLOCK)
        inside, row = i < rows, sums + i
        e += tl.load(row + apart * ABOVE, mask=inside, other=0.0).to(tl.float64)
        if CFG.control_norm:
            a += tl.load(row + apart * THEIRS_SQ, mask=inside, other=0.0).to(tl.float64)
            b += tl.load(row + apart * THEIR_REST_SQ, mask=inside, other=0.0).to(tl.float64)
            c += tl.load(row + apart * OURS_SQ, mask=inside, other=0.0).to(tl.float64)
            d += tl.load(row + apart * OUR_REST_SQ, mask=inside, other=0.0).to(tl.float64)
    return tl.sum(a), tl.sum(b), tl.sum(c), tl.sum(d), tl.sum(e)


@triton.jit
def _scale(wanted, have, cap):
    """The factor on both multipliers: `scale_of` of the reference."""
    possible = (have > 0) & is_finite(wanted + have)
    ratio = tl.sqrt(wanted / tl.where(have > 0, have, 1.0))
    return tl.where(possible, tl.minimum(ratio, cap), 1.0)


@triton.jit
def limit_kernel(
    sums_ptr, indices_ptr, squares_ptr, numbers_ptr, hyper_ptr, pointers_ptr, ranks_ptr, facts_ptr, keys_ptr, plan_ptr,
    apart, CFG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Find one tensor's limit a program, and store it and the two multipliers.

    Reads the tensor's rows of sums once, and its list five times or more, from the cache. A list that does not hold the
    limit, or has overflowed, is of no use: then the whole tensor is ranked here, which takes long. By chance that
    happens to one tensor in 10^8 steps. It may also happen to a top-K that selects fewer than K because of NaN.
    """
    t = tl.program_id(0)
    facts, row, keys = row_of(facts_ptr, t, FACTS), row_of(numbers_ptr, t, NUMBERS), row_of(keys_ptr, t, KEYS)
    ranks, pointers, plan = row_of(ranks_ptr, t, RANKS), pointers_of(pointers_ptr, t), row_of(plan_ptr, t, PLAN)
    at, rows = tl.load(plan + ROWS_AT), tl.load(plan + ROWS).to(tl.int32)
    numel, picked = tl.load(facts + NUMEL), tl.load(ranks + PICKED)
    hyper = group_row(hyper_ptr, facts)
    if CFG.strength == "fixed":
        selected, rest = tl.load(hyper + SELECTED), tl.load(hyper + REST)
    elif CFG.estimate == "exact":
        selected, rest = multipliers_of(sums_ptr + at, apart, rows, hyper, pointers, facts, 1, CFG, BLOCK)
    else:
        selected = tl.load(row + STRENGTH_SELECTED).to(tl.float64)
        rest = tl.load(row + STRENGTH_REST).to(tl.float64)
    dense = tl.load(ranks + MODE) == DENSE
    selected, rest = tl.where(dense, 1.0, selected), tl.where(dense, 1.0, rest)

    moving = numel
    if CFG.still:
        moving = tl.load(ranks + MOVING)
    theirs, their_rest, ours, others, above = _last_sums(sums_ptr + at, apart, rows, BLOCK, CFG)
    limit, cutoff = tl.where(picked >= moving, -1, NUMBERS_END).to(tl.int64), picked * 0 - 1
    if (picked > 0) & (picked < moving):
        need, listed = picked - above.to(tl.int64), tl.load(ranks + LISTED)
        first = tl.load(plan + LIST_AT)
        indices, squares = indices_ptr + first, squares_ptr + first
        if (need > 0) & (need <= listed) & (listed <= tl.load(plan + ROOM)):
            last = _last_key(need, listed, indices, squares, pointers, row, keys, True, CFG, BLOCK)
            if CFG.control_norm:
                inside, outside = _listed_sums(last, listed, indices, squares, pointers, row, keys, CFG, BLOCK)
                ours += inside
                others += outside
        else:
            last = _last_key(picked, numel, indices, squares, pointers, row, keys, False, CFG, BLOCK)
            if CFG.control_norm:
                ours, others = _all_sums(last, numel, indices, squares, pointers, row, keys, CFG, BLOCK)
        limit, cutoff = last >> 32, (last & NO_INDEX) ^ NO_INDEX
    tl.store(ranks + LIMIT, limit)
    tl.store(ranks + LIMIT_AT, cutoff)

    if CFG.control_norm:
        wanted = selected * selected * theirs + rest * rest * their_rest
        have = selected * selected * ours + rest * rest * others
        have = tl.where((picked == 0) | (picked == numel), wanted, have)  # then they are the policy's coordinates
        scale = tl.where(dense, 1.0, _scale(wanted, have, tl.load(hyper + CONTROL_CAP)))
        selected, rest = selected * scale, rest * scale
    tl.store(row + STRENGTH_SELECTED, selected.to(tl.float32))
    tl.store(row + STRENGTH_REST, rest.to(tl.float32))
