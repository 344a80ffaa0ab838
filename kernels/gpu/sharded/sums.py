"""The sums that a step of shards asks other ranks for, in one launch for all tensors; deterministic.

As in `device/sums.py`, a program adds up in float32 and writes a row; one program a tensor adds the rows in float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...sharded import exact_sums as sums
from ..device.config import FACTS, HIGH, KEYS, NUMBERS, NUMEL, RANKS
from ..device.elements import is_aligned, load_moved, pointers_of, row_of
from ..device.selections import select
from ..device.strengths import column_sum
from ..device.sums import normed
from ..launch import run
from ..tables import cdiv, power_of_two

NAMES = (
    "selected", "selected_sq", "rest_sq", "update_sq", "grad_sq", "update_grad", "selected_update_sq", "tied_update_sq",
    "moving",
)  # fmt: skip
WIDTH = tl.constexpr(8)  # of a program's row: a column for each but the last, which is no sum of programs
TOTALS = tl.constexpr(9)  # of a tensor's row; columns that are not wanted are not written
DIGITS, LOWEST = tl.constexpr(sums.DIGITS), tl.constexpr(sums.LOWEST)
PLACES = tl.constexpr(sums.WIDTH)  # int32 numbers in place of one float64 number
BLOCK = 16  # sums that a program takes apart, or puts together


@triton.jit
def _terms(i, mask, pointers, row, ranks, facts, keys, FAST: tl.constexpr, STATISTICS: tl.constexpr,
           CFG: tl.constexpr):  # fmt: skip
    """The addends of each element of a block to the columns."""
    _, g, u, m, previous, _, _, _ = load_moved(pointers, i, mask, row, False, FAST, CFG)
    chosen, _, key = select(i, g, u, m, previous, row, ranks, facts, keys, None, False, CFG)
    zero = tl.zeros(i.shape, tl.float32)
    chosen = chosen & mask
    a, b, c, d, e, f, h, k = chosen.to(tl.float32), zero, zero, zero, zero, zero, zero, zero
    if CFG.strength == "norm_preserving":
        x = normed(g, u, m, CFG)
        b, c = tl.where(chosen, x * x, 0.0), tl.where(mask & (chosen == 0), x * x, 0.0)
    if STATISTICS:
        u, g = tl.where(mask, u, 0.0), tl.where(mask, g, 0.0)
        d, e, f = u * u, g * g, u * g
        h = tl.where(chosen, d, 0.0)
        if CFG.selection == "top_k":
            k = tl.where(key == tl.load(ranks + HIGH).to(tl.uint32), d, 0.0)
    return a, b, c, d, e, f, h, k


@triton.jit
def shard_sums_kernel(
    sums_ptr, work_ptr, pointers_ptr, numbers_ptr, ranks_ptr, facts_ptr, keys_ptr,
    STATISTICS: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, CFG: tl.constexpr,
):  # fmt: skip
    """SPAN elements of one tensor a program, before anything moves: a row of `NAMES`.

    Reads gradient and first moment, and with STATISTICS or top-K the second too (8 or 12 bytes an element of AdamW in
    float32); writes 32 bytes a program. An agreement of Adam's update follows the momentum's sign here, as in
    `sums_kernel`: where the second moment is out of float32's range, statistics count otherwise than the step selects.
    """
    program = tl.program_id(0)
    t, part = tl.load(work_ptr + 2 * program), tl.load(work_ptr + 2 * program + 1)
    facts, row, keys = row_of(facts_ptr, t, FACTS), row_of(numbers_ptr, t, NUMBERS), row_of(keys_ptr, t, KEYS)
    ranks, pointers = row_of(ranks_ptr, t, RANKS), pointers_of(pointers_ptr, t)
    numel, start = tl.load(facts + NUMEL), part.to(tl.int64) * SPAN
    whole = (start + SPAN <= numel) & is_aligned(pointers)
    zero = tl.zeros([BLOCK], tl.float32)
    a, b, c, d, e, f, h, k = zero, zero, zero, zero, zero, zero, zero, zero
    for at in range(0, SPAN, BLOCK):
        i = tl.multiple_of(start + at, BLOCK) + tl.arange(0, BLOCK)
        if whole:
            p, q, r, s, v, w, x, y = _terms(i, i >= 0, pointers, row, ranks, facts, keys, True, STATISTICS, CFG)
        else:
            p, q, r, s, v, w, x, y = _terms(i, i < numel, pointers, row, ranks, facts, keys, False, STATISTICS, CFG)
        a, b, c, d, e, f, h, k = a + p, b + q, c + r, d + s, e + v, f + w, h + x, k + y
    out = sums_ptr + program.to(tl.int64) * WIDTH
    tl.store(out, tl.sum(a))
    if CFG.strength == "norm_preserving":
        tl.store(out + 1, tl.sum(b))
        tl.store(out + 2, tl.sum(c))
    if STATISTICS:
        tl.store(out + 3, tl.sum(d))
        tl.store(out + 4, tl.sum(e))
        tl.store(out + 5, tl.sum(f))
        tl.store(out + 6, tl.sum(h))
        tl.store(out + 7, tl.sum(k))


@triton.jit
def totals_kernel(out_ptr, sums_ptr, spans_ptr, STATISTICS: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr):
    """One tensor a program: its rows of sums added up, float64 [tensors, 9]; zeros if the shard is not counted.

    `spans_ptr` as for `cells_kernel`.
    """
    t = tl.program_id(0)
    spans, out = spans_ptr + t * 4, out_ptr + t * TOTALS
    first, count, counts = tl.load(spans), tl.load(spans + 1).to(tl.int32), tl.load(spans + 3) > 0
    for column in tl.static_range(WIDTH):
        if (column == 0) or (NORM and column < 3) or (STATISTICS and column > 2):
            tl.store(out + column, tl.where(counts, column_sum(sums_ptr, first, count, column, WIDTH, BLOCK), 0.0))


@triton.jit
def digits_kernel(
    out_ptr, table_ptr, columns_ptr, wanted, width, count, BLOCK: tl.constexpr, SLOTS: tl.constexpr
):  # fmt: skip
    """`sharded.exact_sums.digits` of the `wanted` columns of a float64 table of `width`, bit for bit.

    Writes int32 [count, 40]. x = whole * 2^(place + LOWEST) with an integer of 53 bits, of which each digit takes the
    bits that are in its place.
    """
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.load(columns_ptr + n % wanted, mask=n < count, other=0)
    x = tl.load(table_ptr + (n // wanted) * width + column, mask=n < count, other=0.0)
    bits = x.to(tl.int64, bitcast=True)
    exponent = (bits >> 52) & 2047
    finite = exponent < 1023 + 303  # false for infinity and NaN
    whole = tl.where(finite & (exponent > 0), (bits & 0xFFFFFFFFFFFFF) | 0x10000000000000, 0)
    digit = tl.arange(0, SLOTS)[None, :]
    shift = 16 * digit - (exponent - 1075 - LOWEST)[:, None]
    right = tl.where(shift < 64, whole[:, None] >> tl.minimum(tl.maximum(shift, 0), 63), 0)
    left = tl.where(shift > -16, whole[:, None] << tl.minimum(tl.maximum(-shift, 0), 15), 0)
    found = tl.where(shift >= 0, right, left) & 0xFFFF
    found = tl.where(bits[:, None] < 0, -found, found)
    found = tl.where(digit == DIGITS, 1 - finite.to(tl.int64)[:, None], found)
    tl.store(out_ptr + n[:, None] * PLACES + digit, found.to(tl.int32), mask=(n[:, None] < count) & (digit < PLACES))


@triton.jit
def numbers_of_kernel(out_ptr, found_ptr, count, BLOCK: tl.constexpr, SLOTS: tl.constexpr):
    """`sharded.exact_sums.number`: int32 [count, 40], summed over processes, to float64 [count], to rounding."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    digit = tl.arange(0, SLOTS)[None, :]
    inside = (n[:, None] < count) & (digit < DIGITS)
    found = tl.load(found_ptr + n[:, None] * PLACES + digit, mask=inside, other=0).to(tl.float64)
    unit = ((16 * tl.where(inside, digit, 0) + (1023 + LOWEST)).to(tl.int64) << 52).to(tl.float64, bitcast=True)
    missing = tl.load(found_ptr + n * PLACES + DIGITS, mask=n < count, other=0)
    total = tl.where(missing > 0, float("nan"), tl.sum(found * unit, 1))
    tl.store(out_ptr + n, total, mask=n < count)


def as_digits(table: Tensor, columns: Tensor) -> Tensor:
    """`sharded.exact_sums.digits` of these columns of a contiguous float64 [rows, width]: int32, 1-d. One launch."""
    count = len(table) * len(columns)
    digits = torch.empty(count * PLACES.value, dtype=torch.int32, device=table.device)
    run(digits_kernel, cdiv(count, BLOCK), digits, table, columns, len(columns), table.shape[1], count, BLOCK=BLOCK,
        SLOTS=power_of_two(PLACES.value))  # fmt: skip
    return digits


def as_numbers(digits: Tensor, rows: int) -> Tensor:
    """`sharded.exact_sums.number` of the digits of `as_digits`, summed over the ranks: float64 [rows, columns]."""
    count = digits.numel() // PLACES.value
    numbers = torch.empty(count, dtype=torch.float64, device=digits.device)
    run(numbers_of_kernel, cdiv(count, BLOCK), numbers, digits, count, BLOCK=BLOCK, SLOTS=power_of_two(PLACES.value))
    return numbers.view(rows, -1)
