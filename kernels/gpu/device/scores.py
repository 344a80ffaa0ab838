"""Scores as keys: unsigned integers of the same order, which are the same bits in every kernel, and their counts.

The docstring of `top_k/` says how the K-th score is found with them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .config import COUNTED, CROWD, HIGH, LOW
from .elements import load_moved
from .rounding import IN_PTX
from .rules import score_of

DIGIT = tl.constexpr(2048)  # `repair.py` ranks a key's 32 bits as digits of 11, 11 and 10 bits
LAST = tl.constexpr(0x7FFFFFFFFFFFFFFF)  # a cutoff behind every index


@triton.jit
def key_of(score):
    """The key of a score, uint32: larger where the score is larger. +0 and -0 are equal; every NaN is 0, the least."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # -0 + 0 is +0
    key = (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)
    return tl.where(score == score, key, 0)


@triton.jit
def shift_of(low, high):
    """The binary logarithm of the number of keys in a bin of this bracket, int32."""
    size = (high - low).to(tl.float32).to(tl.uint32, bitcast=True) >> 23  # 127 + its binary logarithm
    return tl.maximum(size.to(tl.int32) - 127 + 1 - 11, 0)


@triton.jit
def bin_of(key, low, high):
    """The bin of the bracket that a key lies in, of 2,048 bins at most: monotone, and the same in every kernel."""
    return ((key - low) >> shift_of(low, high).to(tl.uint32)).to(tl.int32)


@triton.jit
def store_marks(marks_ptr, chosen, CFG: tl.constexpr):
    """Store a bit for each element of a block: 32 neighbours to a word, the first one in its lowest bit."""
    WORDS: tl.constexpr = CFG.block // 32
    bits = tl.reshape(chosen.to(tl.uint32), [WORDS, 32]) << tl.arange(0, 32).to(tl.uint32)[None, :]
    tl.store(marks_ptr + tl.arange(0, WORDS), tl.sum(bits, 1).to(tl.int32, bitcast=True))


@triton.jit
def load_marks(marks_ptr, CFG: tl.constexpr):
    """True where the bit of an element is set: the reverse of `store_marks`."""
    WORDS: tl.constexpr = CFG.block // 32
    words = tl.load(marks_ptr + tl.arange(0, WORDS)).to(tl.uint32, bitcast=True)
    bits = (words[:, None] >> tl.arange(0, 32).to(tl.uint32)[None, :]) & 1
    return tl.reshape(bits.to(tl.int8), [CFG.block]) != 0


@triton.jit
def add_marks(marks_ptr, offs, chosen):
    """Set the bits of single elements of a tensor, whose first word `marks_ptr` is."""
    bit = (tl.full(offs.shape, 1, tl.uint32) << (offs & 31).to(tl.uint32)).to(tl.int32, bitcast=True)
    tl.atomic_or(marks_ptr + (offs >> 5), bit, mask=chosen, sem="relaxed")


@triton.jit
def population(bits):
    """The number of bits that are set in each uint32."""
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    return ((bits * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def count_bins(histogram_ptr, bins, inside):
    """Add 1 to the bins of the elements that are `inside`, in int32.

    For NVIDIA's compiler as an instruction of its own. Triton gives its atomics another layout than vector loads, so
    that 2 to 9 bytes an element and up to four meetings of the block's warps go to exchange them in shared memory.
    """
    if not IN_PTX:
        where = tl.where(inside, bins, -1).to(tl.int16).to(tl.int32)
        tl.atomic_add(histogram_ptr + where, 1, mask=where >= 0, sem="relaxed")
    else:
        tl.inline_asm_elementwise(
            """
            {
                .reg .pred inside;
                .reg .b64 address;
                setp.ne.s32 inside, $3, 0;
                mad.wide.s32 address, $2, 4, $1;
                @inside red.relaxed.gpu.global.add.s32 [address], 1;
                mov.b32 $0, 0;
            }
            """,
            "=r,l,r,r", [histogram_ptr.to(tl.int64), bins, inside.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def count_scores(chosen, undecided, key, ranks, marks_ptr, selected_ptr, histogram_ptr, CFG: tl.constexpr):
    """Count the elements of a block above the bracket, and mark the undecided ones (a bit each, and a histogram).

    `CFG.sums` marks those above the bracket as well, in words of their own at `selected_ptr`.

    Made so that the block's warps meet as rarely as possible. One sum yields bits and count: 32 elements lie within a
    warp, their bits in the lower half of a word and their count, or the bits that are counted, in the upper half.

    Equal scores of a crowd are added up first: millions of additions to one number take milliseconds.
    """
    WORDS: tl.constexpr = CFG.block // 32
    tl.static_assert(CFG.block < 32768, "a block's two counts fit into 31 bits")
    low, high = tl.load(ranks + LOW).to(tl.uint32), tl.load(ranks + HIGH).to(tl.uint32)
    bins, crowd = bin_of(key, low, high), tl.load(ranks + CROWD)
    at = tl.where(crowd > 0, bin_of(crowd.to(tl.uint32), low, high), -1)
    alike = undecided & (bins == at)
    place = tl.arange(0, 32).to(tl.uint32)[None, :]
    bits = tl.reshape(undecided.to(tl.uint32), [WORDS, 32]) << place
    if CFG.sums:
        above = tl.reshape(chosen.to(tl.uint64), [WORDS, 32]) << place.to(tl.uint64)
    else:
        above = tl.reshape(tl.where(alike, 65536, chosen.to(tl.int32)).to(tl.uint64), [WORDS, 32])
    words = tl.sum(bits.to(tl.uint64) | (above << 32), 1)
    tl.store(marks_ptr + tl.arange(0, WORDS), words.to(tl.uint32).to(tl.int32, bitcast=True))
    count = (words >> 32).to(tl.int64)
    if CFG.sums:
        tl.store(selected_ptr + tl.arange(0, WORDS), (words >> 32).to(tl.uint32).to(tl.int32, bitcast=True))
        count = tl.sum(population((words >> 32).to(tl.uint32)).to(tl.int64))
        if crowd > 0:
            count += tl.sum(alike.to(tl.int64)) << 16
    else:
        count = tl.sum(count)
    tl.atomic_add(ranks + COUNTED, count & 65535, sem="relaxed")
    tl.atomic_add(histogram_ptr + at, (count >> 16).to(tl.int32), mask=count > 65535, sem="relaxed")
    count_bins(histogram_ptr, bins, undecided & (alike == 0))


@triton.jit
def keys_at(pointers, row, offs, mask, FAST: tl.constexpr, CFG: tl.constexpr):
    """(key, update, gradient, parameter) of elements at any indices; for a given update, its start as the parameter."""
    p, g, u, m, _, _, start, _ = load_moved(pointers, offs, mask, row, CFG.writes and CFG.rule != "given", FAST, CFG)
    if CFG.rule == "given":
        p = start
    return key_of(score_of(g, u, m, row, CFG)), u, g, p


@triton.jit
def descend(histogram, rank):
    """(the digit that has the rank-th largest, its rank among the keys with that digit, the number of those)."""
    BINS: tl.constexpr = histogram.shape[0]
    from_here = tl.sum(histogram) - tl.cumsum(histogram, 0) + histogram
    places = tl.arange(0, BINS)
    digit = tl.max(tl.where(from_here >= rank, places, 0))
    left = rank - tl.sum(tl.where(places > digit, histogram, 0))
    return digit.to(tl.uint32), left, tl.sum(tl.where(places == digit, histogram, 0))
