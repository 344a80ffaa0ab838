"""A matched random control: as many coordinates of each tensor as its policy selects, those with the largest numbers.

The random numbers are hashes of an element's index, so to form one again costs no memory traffic. They are uniform:
where it is known how many are selected, the limit among the numbers is known except for a few standard deviations, the
*bracket*.

1. `control_kernel` with COUNTS looks at what the policy selects: how many, and their sums.
2. `control_kernel` with DRAWS adds up the control's coordinates above the bracket, and lists the few inside of it.
With `CFG.ranked` 1 and 2 are one launch, which also counts the scores of an exact top-K; what is undecided there is
settled before 3.

3. `limit_kernel` (`limit.py`) ranks the list of a tensor, which gives the limit exactly, and the two multipliers.

The pass over everything then selects by number and limit (`by_number` in `selections.py`). The same definition in plain
torch is `kernels/reference/control.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .config import (
    ABOVE,
    BRACKET,
    FACTS,
    HIGHEST,
    KEYS,
    LARGE,
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
    THEIR_REST_SQ,
    THEIRS_SQ,
    WANTED,
)
from .elements import is_aligned, load_moved, pointers_of, row_of, store_moments
from .scores import count_scores
from .selections import random_number, select, stands_still
from .sums import store_sums, three_sums, two_sums

NUMBERS_END = tl.constexpr(1 << 24)  # random numbers are below this
SLACK = tl.constexpr(24.0)  # ranks by which a bracket is wider: few selected are not spread as a normal distribution


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
def _look(
    offs, mask, pointers, row, ranks, facts, keys, marks_ptr, histogram_ptr, out, apart, indices, squares_ptr, room,
    low, high, FUNCTION: tl.constexpr, FAST: tl.constexpr, COUNTS: tl.constexpr, DRAWS: tl.constexpr,
    MOVES: tl.constexpr, CFG: tl.constexpr,
):  # fmt: skip
    """Look at one block, for `control_kernel`. Columns of sums lie `apart` numbers apart."""
    _, g, u, m, previous, x, y, z = load_moved(pointers, offs, mask, row, False, FAST, CFG)
    if MOVES:
        store_moments(pointers, offs, x, y, z, mask, FAST, CFG)
    moving = mask
    if CFG.still:
        moving = mask & (stands_still(u, g) == 0)
    squares = tl.where(moving, u * u, 0.0)
    if CFG.ranked:
        chosen, undecided, key = select(offs, g, u, m, previous, row, ranks, facts, keys, FUNCTION, FAST, CFG)
        if not FAST:
            undecided = undecided & mask
        selected_ptr = marks_ptr + apart * (CFG.block // 32)
        count_scores(chosen & mask, undecided, key, ranks, marks_ptr, selected_ptr, histogram_ptr, CFG)
        decided = tl.where(undecided, 0.0, squares)  # the others are added when they are settled
        theirs, rest = two_sums(tl.where(chosen, decided, 0.0), tl.where(chosen, 0.0, decided))
        tl.store(out + apart * THEIRS_SQ, theirs)
        tl.store(out + apart * THEIR_REST_SQ, rest)
    elif COUNTS:
        chosen, _, _ = select(offs, g, u, m, previous, row, ranks, facts, keys, FUNCTION, False, CFG)
        if CFG.strength != "fixed" and CFG.estimate == "exact":
            store_sums(out, apart, chosen, g, u, m, mask, CFG)
        count = (chosen & mask).to(tl.float32)  # sums of up to 2^24 are exact
        if CFG.control_norm:
            picked, theirs, rest = three_sums(count, tl.where(chosen, squares, 0.0), tl.where(chosen, 0.0, squares))
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
            drawn, ours, rest = three_sums(count, tl.where(above, squares, 0.0), tl.where(above | inside, 0.0, squares))
            tl.store(out + apart * OURS_SQ, ours)
            tl.store(out + apart * OUR_REST_SQ, rest)
        else:
            drawn = tl.sum(count)
        tl.store(out + apart * ABOVE, drawn)
        _list(ranks, indices, squares_ptr, offs, squares, inside, room, CFG)


@triton.jit
def control_kernel(
    sums_ptr, indices_ptr, squares_ptr, marks_ptr, histograms_ptr,
    work_ptr, pointers_ptr, numbers_ptr, ranks_ptr, facts_ptr, keys_ptr, plan_ptr,
    apart, width, FUNCTION: tl.constexpr, COUNTS: tl.constexpr, DRAWS: tl.constexpr, MOVES: tl.constexpr,
    BINS: tl.constexpr, CFG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Look at BLOCK elements of one tensor a program: those of the policy are counted, or the control draws, or both.

    COUNTS reads what the selection, the strength's sums and the update are made of: AdamW in float32 12 bytes an
    element. MOVES also stores the moments, which are final: 8 bytes more. DRAWS reads what the update is made of (8 of
    moments that were stored), and nothing where the norm does not matter and nothing stands still; it writes 8 bytes
    for each element inside of the bracket, some 6 sqrt(n) of a tensor of n. Both in one launch read once: that needs
    the number that the policy selects in advance, and WANTED is it, for top-K. With `CFG.ranked` the threshold is not
    known yet: what is above the bracket and below it is added up, and scores are counted and marked, as the pass over
    everything does with `CFG.sums`; BLOCK has to be `CFG.block`. Besides, each program writes up to 36
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
        if part == 0:
            tl.store(ranks + LOWEST, low.to(tl.int64))
            tl.store(ranks + HIGHEST, high.to(tl.int64))
    start = part.to(tl.int64) * BLOCK
    offs = tl.multiple_of(start, BLOCK) + tl.arange(0, BLOCK)
    marks = marks_ptr + program.to(tl.int64) * (CFG.block // 32)
    histogram = histograms_ptr + tl.load(facts + LARGE) * BINS
    fast = (start + BLOCK <= numel) & is_aligned(pointers)
    if CFG.ranked:
        fast = fast & (tl.load(ranks + MODE) == BRACKET)
    if fast:
        _look(offs, offs >= 0, pointers, row, ranks, facts, keys, marks, histogram, out, apart, indices_ptr + first,
              squares_ptr + first, room, low, high, FUNCTION, True, COUNTS, DRAWS, MOVES, CFG)  # fmt: skip
    else:
        _look(offs, offs < numel, pointers, row, ranks, facts, keys, marks, histogram, out, apart, indices_ptr + first,
              squares_ptr + first, room, low, high, FUNCTION, False, COUNTS, DRAWS, MOVES, CFG)  # fmt: skip
