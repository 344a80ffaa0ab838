"""A matched control's limit among the random numbers, exactly, and its multipliers: the third part of `control.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from .config import (
    ABOVE,
    DENSE,
    FACTS,
    HIGHEST,
    KEYS,
    LIMIT,
    LIMIT_AT,
    LIST_AT,
    LISTED,
    LOWEST,
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
)
from .control import NUMBERS_END
from .elements import load_moved, pointers_of, row_of
from .numbers import CONTROL_CAP, REST, SELECTED, group_row
from .scores import descend
from .selections import random_number, stands_still
from .strengths import is_finite, multipliers_of, with_settled

NO_INDEX = tl.constexpr(0xFFFFFFFF)  # the largest uint32


@triton.jit
def _candidates(i, count, least, indices, squares_ptr, pointers, row, keys, LISTED_ONLY: tl.constexpr,
                CFG: tl.constexpr):  # fmt: skip
    """(key, u^2) of these entries of a list, or of these elements of the tensor. A key of -1 is no candidate.

    A key is the random number, less `least`, and below it the index, inverted: the larger one is selected first. int64
    of 56 bits.
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
    key = ((random_number(index, keys).to(tl.int64) - least) << 32) | (index ^ NO_INDEX)
    return tl.where(valid, key, -1), tl.where(valid, square, 0.0)


@triton.jit
def _last_key(
    rank, count, shift, least, indices, squares_ptr, pointers, row, keys,
    LISTED_ONLY: tl.constexpr, CFG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A key that exactly `rank` candidates reach, found digit by digit of 8 bits. Keys have `shift` bits.

    The digits of the number are always looked at, those of the index only where equal numbers are not all selected.
    """
    prefix, left, equal = rank * 0, rank, rank * 0 - 1
    while (shift > 0) & ((shift > 32) | (equal != left)):
        shift = shift - 8
        histogram = tl.zeros([256], tl.int64)
        for first in range(0, count, BLOCK):
            i = first + tl.arange(0, BLOCK).to(tl.int64)
            key, _ = _candidates(i, count, least, indices, squares_ptr, pointers, row, keys, LISTED_ONLY, CFG)
            inside = (key >= 0) & ((key >> (shift + 8)) == prefix)
            digits = tl.where(inside, (key >> shift) & 255, 0).to(tl.int32)
            histogram += tl.histogram(digits, 256, mask=inside).to(tl.int64)
        digit, left, equal = descend(histogram, left)
        prefix = (prefix << 8) | digit.to(tl.int64)
    return prefix << shift


@triton.jit
def _listed_sums(last, count, least, indices, squares_ptr, pointers, row, keys, CFG: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    """The sums of a list's squares from the key `last` on, and below it; float64.

    The order of the list is arbitrary, so integers are added up, each rounded to 43 bits of the largest: the same sum
    in any order. NaN where a square is not finite.
    """
    largest = tl.zeros([BLOCK], tl.int32)
    for first in range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK).to(tl.int64)
        _, square = _candidates(i, count, least, indices, squares_ptr, pointers, row, keys, True, CFG)
        largest = tl.maximum(largest, square.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    exponent = (tl.max(largest) >> 23).to(tl.int64)  # 126 + the number of bits before the point
    factor = ((1023 + 43 + 126 - exponent) << 52).to(tl.float64, bitcast=True)
    ours, others = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64)
    for first in range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK).to(tl.int64)
        key, square = _candidates(i, count, least, indices, squares_ptr, pointers, row, keys, True, CFG)
        whole = (square.to(tl.float64) * factor).to(tl.int64)
        ours += tl.where(key >= last, whole, 0)
        others += tl.where(key >= last, 0, whole)
    finite = tl.where(exponent < 255, 1.0, float("nan")).to(tl.float64)
    return tl.sum(ours).to(tl.float64) / factor * finite, tl.sum(others).to(tl.float64) / factor * finite


@triton.jit
def _all_sums(last, count, least, indices, squares_ptr, pointers, row, keys, CFG: tl.constexpr,
              BLOCK: tl.constexpr):  # fmt: skip
    """The same sums of a whole tensor, in the order of its elements."""
    ours, others = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for first in range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK).to(tl.int64)
        key, square = _candidates(i, count, least, indices, squares_ptr, pointers, row, keys, False, CFG)
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
    sums_ptr, indices_ptr, squares_ptr, settled_ptr, tied_ptr, repaired_ptr,
    numbers_ptr, hyper_ptr, pointers_ptr, ranks_ptr, facts_ptr, keys_ptr, plan_ptr, programs, apart,
    CFG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Find one tensor's limit a program, and store it and the two multipliers.

    Reads the tensor's rows of sums once, and its list five times or more, from the cache. A list that does not hold the
    limit, or has overflowed, is of no use: then the whole tensor is ranked here, which takes long. By chance that
    happens to one tensor in 10^8 steps. It may also happen to a top-K that selects fewer than K because of NaN.

    With `CFG.ranked`, what was settled after the count is added to the policy's sums: 8 bytes for each program of
    settle, or of repair (`programs`).
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
    if CFG.ranked:
        picked = tl.where(dense, numel, picked)
        tl.store(ranks + PICKED, picked)
    selected, rest = tl.where(dense, 1.0, selected), tl.where(dense, 1.0, rest)

    moving = numel
    if CFG.still:
        moving = tl.load(ranks + MOVING)
    theirs, their_rest, ours, others, above = _last_sums(sums_ptr + at, apart, rows, BLOCK, CFG)
    if CFG.ranked:
        theirs, their_rest = with_settled(theirs, their_rest, settled_ptr, tied_ptr, repaired_ptr, programs, ranks,
                                          facts, BLOCK)  # fmt: skip
    limit, cutoff = tl.where(picked >= moving, -1, NUMBERS_END).to(tl.int64), picked * 0 - 1
    if (picked > 0) & (picked < moving):
        need, listed = picked - above.to(tl.int64), tl.load(ranks + LISTED)
        first, least = tl.load(plan + LIST_AT), tl.load(ranks + LOWEST)
        indices, squares = indices_ptr + first, squares_ptr + first
        if (need > 0) & (need <= listed) & (listed <= tl.load(plan + ROOM)):
            bits = tl.where(tl.load(ranks + HIGHEST) - least < 65536, 48, 56).to(tl.int64)
            last = _last_key(need, listed, bits, least, indices, squares, pointers, row, keys, True, CFG, BLOCK)
            if CFG.control_norm:
                inside, outside = _listed_sums(last, listed, least, indices, squares, pointers, row, keys, CFG, BLOCK)
                ours += inside
                others += outside
        else:
            least = least * 0
            last = _last_key(picked, numel, least + 56, least, indices, squares, pointers, row, keys, False, CFG, BLOCK)
            if CFG.control_norm:
                ours, others = _all_sums(last, numel, least, indices, squares, pointers, row, keys, CFG, BLOCK)
        limit, cutoff = (last >> 32) + least, (last & NO_INDEX) ^ NO_INDEX
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
