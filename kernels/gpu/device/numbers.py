"""The numbers that a tensor has one of: step counts, bias corrections, random keys. In float64, once a step."""

from __future__ import annotations

import triton
import triton.language as tl

from .config import (
    ADDRESS,
    B2,
    COLUMNS,
    DECAY,
    EPS,
    FACTOR,
    FACTS,
    GROUP,
    LOOKAHEAD,
    MODE,
    MOMENTUM,
    NUMBERS,
    NUMEL,
    PICKED,
    RANKS,
    RATE,
    SEEN,
    STEP,
    STRENGTH_REST,
    STRENGTH_SELECTED,
    UNBIAS,
    UNDAMPED,
    USER,
    W1,
    W2,
    WANTED,
)
from .random import splitmix64
from .share import mean_preserving

# The columns of the table of hyper-parameters, float64. A group has a row.
(LR, BETA1, BETA2, EPSILON, WEIGHT_DECAY, SGD_MOMENTUM, DAMPENING, DECAY_FACTOR, AHEAD, SELECTED, REST, CAP,
 TEMPERATURE, SMOOTHING, ARGUMENT) = (tl.constexpr(i) for i in range(15))  # fmt: skip
CONTROL_CAP = tl.constexpr(18)
HYPER = tl.constexpr(20)  # ARGUMENT is the first of four


@triton.jit
def _keys(state, high):
    """The two keys of a stream, as int32 with the bits of uint32."""
    state = splitmix64(splitmix64(state) ^ high)
    return (state >> 32).to(tl.uint32).to(tl.int32, bitcast=True), state.to(tl.uint32).to(tl.int32, bitcast=True)


@triton.jit
def _random(keys_ptr, address, clock, t, mask):
    """The keys of the mask, sample and rounding streams, from (seed, step, address). `clock` has the first two."""
    zero = tl.zeros(t.shape, tl.uint64)
    state = splitmix64(zero ^ tl.load(clock).to(tl.uint64))
    state = splitmix64(state ^ tl.load(clock + 1).to(tl.uint64))
    state = splitmix64(state ^ address.to(tl.uint64))
    for stream in tl.static_range(3):
        first, second = _keys(state ^ (zero + stream), zero)
        tl.store(keys_ptr + t * 6 + 2 * stream, first, mask=mask)
        tl.store(keys_ptr + t * 6 + 2 * stream + 1, second, mask=mask)


@triton.jit
def group_row(hyper_ptr, facts):
    """The row of hyper-parameters of one tensor's group; `facts` is the tensor's row of facts."""
    return hyper_ptr + tl.load(facts + GROUP) * HYPER


@triton.jit
def _of_group(hyper, COLUMN: tl.constexpr):
    """One hyper-parameter of each tensor's group; `hyper` are the rows of the groups."""
    return tl.load(hyper + COLUMN)


@triton.jit
def _adam(out, pointers, hyper, mask):
    """Count each tensor's step; store its rate lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t), and the decay factor."""
    counter = tl.load(pointers + STEP, mask=mask, other=0).to(tl.pointer_type(tl.float32))
    count = tl.load(counter, mask=mask, other=0.0) + 1.0
    tl.store(counter, count, mask=mask)
    lr, beta1, beta2 = _of_group(hyper, LR), _of_group(hyper, BETA1), _of_group(hyper, BETA2)
    t = count.to(tl.float64)
    rate = lr / (1.0 - tl.exp(t * tl.log(t * 0.0 + beta1)))
    unbias = 1.0 / tl.sqrt(1.0 - tl.exp(t * tl.log(t * 0.0 + beta2)))
    tl.store(out + RATE, rate.to(tl.float32), mask=mask)
    tl.store(out + UNBIAS, unbias.to(tl.float32), mask=mask)
    factor = t * 0.0 + 1.0 - lr * _of_group(hyper, WEIGHT_DECAY)
    tl.store(out + FACTOR, factor.to(tl.float32), mask=mask)


@triton.jit
def _put(out, value, like, mask):
    """Store one number of each tensor, rounded to float32."""
    tl.store(out, (like * 0.0 + value).to(tl.float32), mask=mask)


@triton.jit
def numbers_kernel(
    numbers_ptr, keys_ptr, hyper_ptr, clocks_ptr, pointers_ptr, facts_ptr, ranks_ptr, tensors,
    FIXED: tl.constexpr, CFG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Fill in each tensor's row of numbers and of random keys, and count Adam's steps. A few hundred bytes a tensor.

    `hyper_ptr` has a row of hyper-parameters for each group, float64; `clocks_ptr` each group's address of seed and
    step, int64. FIXED: the strengths are the two constants (1 and 1 for a tensor that is dense). With
    `CFG.share_known` they follow from the number of the selected. Otherwise another kernel fills them in later.
    """
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = t < tensors
    out, facts = numbers_ptr + t * NUMBERS, facts_ptr + t * FACTS
    group, address = tl.load(facts + GROUP, mask=mask, other=0), tl.load(facts + ADDRESS, mask=mask, other=0)
    hyper = hyper_ptr + group * HYPER  # that of the first group where there is no tensor
    clock = tl.load(clocks_ptr + group).to(tl.pointer_type(tl.int64))
    like = t.to(tl.float64)
    _random(keys_ptr, address, clock, t, mask)
    beta1, beta2 = _of_group(hyper, BETA1), _of_group(hyper, BETA2)
    if CFG.rule == "adam":
        _adam(out, pointers_ptr + t * COLUMNS, hyper, mask)
    else:
        _put(out + RATE, _of_group(hyper, LR), like, mask)
        _put(out + FACTOR, _of_group(hyper, DECAY_FACTOR), like, mask)
    _put(out + W1, 1.0 - beta1, like, mask)
    _put(out + B2, beta2, like, mask)
    _put(out + W2, 1.0 - beta2, like, mask)
    _put(out + EPS, _of_group(hyper, EPSILON), like, mask)
    _put(out + DECAY, _of_group(hyper, WEIGHT_DECAY), like, mask)
    _put(out + MOMENTUM, _of_group(hyper, SGD_MOMENTUM), like, mask)
    _put(out + UNDAMPED, 1.0 - _of_group(hyper, DAMPENING), like, mask)
    _put(out + LOOKAHEAD, _of_group(hyper, AHEAD), like, mask)
    for i in tl.static_range(4):
        _put(out + USER + i, tl.load(hyper + ARGUMENT + i), like, mask)
    dense = tl.load(ranks_ptr + t * RANKS + MODE, mask=mask, other=0) == 2
    if CFG.selection == "top_k":
        tl.store(out + USER, tl.where(dense, 1.0, 0.0), mask=mask)
    if CFG.product == "previous_momentum":
        tl.store(ranks_ptr + t * RANKS + SEEN, tl.zeros(t.shape, tl.int64), mask=mask)
    if CFG.control:  # its counts
        for i in tl.static_range(3):
            tl.store(ranks_ptr + t * RANKS + PICKED + i, tl.zeros(t.shape, tl.int64), mask=mask)
    if FIXED or CFG.share_known:
        selected, rest = _of_group(hyper, SELECTED), _of_group(hyper, REST)
        if CFG.share_known:
            wanted = tl.load(ranks_ptr + t * RANKS + WANTED, mask=mask, other=1).to(tl.float64)
            numel = tl.maximum(tl.load(facts + NUMEL, mask=mask, other=1), 1).to(tl.float64)
            selected = mean_preserving(wanted, numel, rest, _of_group(hyper, CAP))
        tl.store(out + STRENGTH_SELECTED, tl.where(dense, 1.0, selected).to(tl.float32), mask=mask)
        tl.store(out + STRENGTH_REST, tl.where(dense, 1.0, rest).to(tl.float32), mask=mask)
