"""Selections of a block of elements."""

from __future__ import annotations

import triton
import triton.language as tl

from .config import (
    BEGINS,
    BRACKET,
    CUTOFF,
    DENSE,
    HIGH,
    LIMIT,
    LIMIT_AT,
    LOW,
    MODE,
    RATE,
    ROW_LENGTH,
    SEEN,
    USER,
)
from .random import random_bits, ranking_bits
from .rules import score_of
from .scores import LAST, key_of


@triton.jit
def agrees(x, g, CFG: tl.constexpr):
    """x g > 0 (or >= 0 if not `CFG.strict`), judged by the signs: a product that underflows in float32 is not 0."""
    agree = ((x > 0) & (g > 0)) | ((x < 0) & (g < 0))
    if not CFG.strict:
        agree = agree | ((x == 0) & (g == g)) | ((g == 0) & (x == x))
    return agree


@triton.jit
def agreement(g, u, m, previous, row, ranks, CFG: tl.constexpr):
    """Select by the sign of a product.

    A kernel that writes nothing (the sums of a strength) takes the sign of Adam's update from its momentum. Both signs
    are the same wherever the second moment is a number and the rate is not 0, so the second moment is not read. With a
    negative rate too: then `m` is already negated.
    """
    if CFG.product == "previous_momentum":
        unseen = (previous * 0.0 + tl.load(ranks + SEEN)) == 0
        chosen = agrees(previous, g, CFG) | unseen
    elif CFG.product == "momentum":
        chosen = agrees(m, g, CFG)
    elif CFG.rule == "adam" and not CFG.writes:
        rate = tl.load(row + RATE)
        chosen = agrees(m * tl.where((rate > 0) | (rate < 0), 1.0, 0.0), g, CFG)
    else:
        chosen = agrees(u, g, CFG)
    return chosen


@triton.jit
def coin(offs, row, facts, keys, CFG: tl.constexpr):
    """Select where the 24-bit random number of the element, of its row, or of the tensor is below a limit."""
    index = offs.to(tl.uint32)
    if CFG.selection == "row":
        index = index // tl.load(facts + ROW_LENGTH).to(tl.uint32)
    if CFG.selection == "tensor":
        index = index * 0
    else:
        index = index + tl.load(facts + BEGINS).to(tl.uint32)
    first = tl.load(keys + 0).to(tl.uint32, bitcast=True)
    second = tl.load(keys + 1).to(tl.uint32, bitcast=True)
    return random_bits(index, first, second).to(tl.float32) < tl.load(row + USER)


@triton.jit
def _number(like, row, INDEX: tl.constexpr):
    """One of the function's numbers as a block, because the interpreter can't combine blocks and single bools."""
    return tl.zeros(like.shape, tl.float32) + tl.load(row + USER + INDEX)


@triton.jit
def by_function(g, u, m, row, FUNCTION: tl.constexpr, CFG: tl.constexpr):
    """Select by a user's function of (gradient, update, momentum) and up to four numbers.

    If there is no momentum, the function gets the update in its place.
    """
    if (CFG.rule == "given" and CFG.third is None) or (CFG.rule == "sgd" and not CFG.moves):
        m = u
    if CFG.arguments == 0:
        chosen = FUNCTION(g, u, m)
    elif CFG.arguments == 1:
        chosen = FUNCTION(g, u, m, _number(u, row, 0))
    elif CFG.arguments == 2:
        chosen = FUNCTION(g, u, m, _number(u, row, 0), _number(u, row, 1))
    elif CFG.arguments == 3:
        chosen = FUNCTION(g, u, m, _number(u, row, 0), _number(u, row, 1), _number(u, row, 2))
    else:
        chosen = FUNCTION(g, u, m, _number(u, row, 0), _number(u, row, 1), _number(u, row, 2), _number(u, row, 3))
    tl.static_assert(chosen.dtype == tl.int1, "a selection's kernel has to return bools, which comparisons give")
    return chosen


@triton.jit
def by_rank(offs, key, ranks):
    """(selected, undecided) by the tensor's threshold or bracket.

    EXACT: above HIGH, or equal to it up to flat index CUTOFF. BRACKET: above HIGH; undecided from LOW to HIGH.
    DENSE: everything. A key of 0 is a NaN, which is not selected. Both exceptions are made in the tensor's numbers, and
    not for each element, to save instructions.
    """
    mode = tl.load(ranks + MODE)
    low, high = tl.load(ranks + LOW).to(tl.uint32), tl.load(ranks + HIGH).to(tl.uint32)
    is_bracket = offs * 0 + mode == BRACKET  # a block, because the interpreter can't combine blocks and single bools
    undecided = (key >= low) & (key <= high) & is_bracket
    dense = mode == DENSE
    last = tl.where(dense, LAST, tl.where(high == 0, -1, tl.load(ranks + CUTOFF)))
    above = tl.where(dense, 0, high).to(tl.uint32)
    chosen = (key > above) | ((key == above) & (offs <= last))
    return chosen, undecided


@triton.jit
def by_bracket(key, ranks):
    """(selected, undecided) of a tensor that has a bracket."""
    low, high = tl.load(ranks + LOW).to(tl.uint32), tl.load(ranks + HIGH).to(tl.uint32)
    return key > high, key - low <= high - low


@triton.jit
def random_number(offs, keys):
    """The 24-bit random numbers that a matched control ranks, int32: `ranking_bits` of the reference."""
    first = tl.load(keys + 0).to(tl.uint32, bitcast=True)
    second = tl.load(keys + 1).to(tl.uint32, bitcast=True)
    return ranking_bits(offs.to(tl.uint32), first, second).to(tl.int32)


@triton.jit
def stands_still(u, g):
    """True where the update times the gradient is exactly 0. No product underflows here, and NaN is not 0."""
    product = u * g
    return ((u == 0) | (g == 0)) & (product == product)


@triton.jit
def by_number(offs, g, u, ranks, keys, CFG: tl.constexpr):
    """Select a matched control's coordinates: numbers above the limit, and those equal to it up to an index.

    Coordinates that stand still are multiplied by 0 anyway, so it does not matter that none of them is selected here.
    """
    number, limit = random_number(offs, keys), tl.load(ranks + LIMIT)
    chosen = (number > limit) | ((number == limit) & (offs <= tl.load(ranks + LIMIT_AT)))
    if CFG.still:
        chosen = chosen & (stands_still(u, g) == 0)
    return chosen


@triton.jit
def select(offs, g, u, m, previous, row, ranks, facts, keys, FUNCTION: tl.constexpr, HAS_BRACKET: tl.constexpr,
           CFG: tl.constexpr):  # fmt: skip
    """(selected, undecided, the key that top-K ranks), for a block of elements at flat indices `offs`.

    HAS_BRACKET promises that the tensor's MODE is BRACKET.
    """
    key = tl.zeros(offs.shape, tl.uint32)
    undecided = offs < 0
    if CFG.drawn:
        chosen = by_number(offs, g, u, ranks, keys, CFG)
    elif CFG.selection == "everything":
        chosen = offs >= 0
    elif CFG.selection == "agreement":
        chosen = agreement(g, u, m, previous, row, ranks, CFG)
    elif CFG.selection == "top_k":
        key = key_of(score_of(g, u, m, row, CFG))
        if HAS_BRACKET:
            chosen, undecided = by_bracket(key, ranks)
        else:
            chosen, undecided = by_rank(offs, key, ranks)
    elif CFG.selection == "function":
        chosen = by_function(g, u, m, row, FUNCTION, CFG)
    elif (CFG.selection == "element") or (CFG.selection == "row") or (CFG.selection == "tensor"):
        chosen = coin(offs, row, facts, keys, CFG)
    else:
        tl.static_assert(False, "the GPU has no selection of this kind")
        chosen = undecided
    return chosen, undecided, key
