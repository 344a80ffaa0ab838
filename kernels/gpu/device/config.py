"""The constants that are compiled into a kernel, and the columns of the tables that kernels read."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import triton.language as tl

DTYPES: dict[torch.dtype, Any] = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# Columns of the pointer table, in elements of int64. The state columns hold, by rule:
#   adam   first exp_avg, second exp_avg_sq, third max_exp_avg_sq     lion   first exp_avg
#   sgd    first momentum_buffer                                      score  first the score
#   given  first update, second start, third momentum, fourth previous_momentum
COLUMNS = tl.constexpr(8)
PARAM, GRAD, FIRST, SECOND, THIRD, FOURTH, STEP, AVERAGE = (tl.constexpr(i) for i in range(8))

# Columns of a tensor's row of float32 numbers, which `numbers.py` fills in.
NUMBERS = tl.constexpr(20)
(RATE, UNBIAS, W1, B2, W2, EPS, FACTOR, DECAY, MOMENTUM, UNDAMPED, LOOKAHEAD, STRENGTH_SELECTED, STRENGTH_REST,
 USER) = (tl.constexpr(i) for i in range(14))  # fmt: skip
# (USER is the first of four)

# Columns of a tensor's row of int64 ranks: the bracket or the threshold of its scores, as keys (`key_of`).
# CROWD is the key of a score that much of the sample has, at an end of the bracket; 0 if there is none. TIE is the K-th
# key where more scores equal it than a list holds; -1 elsewhere.
# The last seven are a matched control's: how many its policy selects, how many coordinates move, its list's length,
# the bracket of its random numbers, and its limit: the last number that is selected, and the last index at which it is.
RANKS = tl.constexpr(20)
(LOW, HIGH, CUTOFF, MODE, WANTED, COUNTED, CRITICAL, LEFT, TIED, SEEN, CROWD, TIE, PICKED, MOVING, LISTED, LOWEST,
 HIGHEST, LIMIT, LIMIT_AT) = (tl.constexpr(i) for i in range(19))  # fmt: skip
EXACT, BRACKET, DENSE = (tl.constexpr(i) for i in range(3))  # values of MODE

# Columns of a tensor's row of int64 facts, which the host knows:
#   NUMEL, ROW_LENGTH, ADDRESS   its size, the length of one of its rows, its index in the optimizer
#   SAMPLES, SHIFT, SAMPLES_AT   the number of sampled scores, `2**SHIFT` runs of neighbours (SHIFT is -1: all scores),
#                                and their first place in the buffer
#   CHUNK_AT, CHUNKS             its first chunk, and the number of its chunks
#   SUM_AT, SUMS, SUM_SHIFT      the same of programs that sum; SUM_SHIFT is as SHIFT, of their own sample
#   SETTLE_AT, SETTLES           the same of programs that settle
#   LARGE                        its number among the tensors with a drawn sample
#   BEGINS                       of a shard, the number of its first element or row in the whole
#   GROUP                        the row of its group's numbers in the table of hyper-parameters
FACTS = tl.constexpr(16)
(NUMEL, ROW_LENGTH, ADDRESS, SAMPLES, SHIFT, SAMPLES_AT, CHUNK_AT, CHUNKS, SUM_AT, SUMS, SUM_SHIFT, SETTLE_AT,
 SETTLES, LARGE, BEGINS, GROUP) = (tl.constexpr(i) for i in range(16))  # fmt: skip

BRACKET_RUN = tl.constexpr(16)  # neighbours sampled together for a bracket: one burst of memory in float32
KEYS = tl.constexpr(6)  # columns of a tensor's row of random keys: two each for masks, samples, rounding
SUM_COLUMNS = tl.constexpr(4)  # columns of a program's row of sums that a strength needs
# Columns of a program's row of sums for a matched control: four for the strength, as above; the sums of u^2 over what
# the policy selects and over the rest; the same of the control's coordinates above its bracket, and their number.
CONTROL_COLUMNS = tl.constexpr(9)
THEIRS_SQ, THEIR_REST_SQ, OURS_SQ, OUR_REST_SQ, ABOVE = (tl.constexpr(i) for i in range(4, 9))
# Columns of a tensor's row of a control's plan: its first program and their number, its list's first place and length.
PLAN = tl.constexpr(4)
ROWS_AT, ROWS, LIST_AT, ROOM = (tl.constexpr(i) for i in range(4))
PARTIALS = 5  # columns of a program's statistics: selected, u^2, g^2, u g, (mask u)^2


@dataclass(frozen=True, repr=False)
class Config:
    """The constants of a kernel's code, which reads them as `CFG`.

    Triton hashes and prints a Config at every launch, so both are done once, when it is made.
    """

    rule: str  # "adam", "sgd", "lion", "given" or "score"
    param: Any  # dtypes of Triton; None where there is no such column
    grad: Any
    first: Any
    second: Any
    third: Any
    fourth: Any
    block: int  # elements of a program
    amsgrad: bool = False
    usual: bool = False  # the rate is not negative; averages move by less than half of the way to the gradient
    extreme_eps: bool = False  # adam: eps is not 0, and not from 2^-126 to 2^126
    coupled: bool = False  # weight decay is added to the gradient, so that the parameter has to be read first
    maximize: bool = False
    decays: bool = False  # the parameter is multiplied by a factor
    moves: bool = False  # sgd: there is a momentum
    begins: bool = False  # sgd: this step makes the momentum
    nesterov: bool = False
    negated: bool = False  # given: the column holds -u
    offset: float = 0.0  # given
    in_place: bool = False  # given: the start is the parameter's memory, and the update lies elsewhere
    selection: str = "everything"  # or "agreement", "top_k", "element", "row", "tensor", "function"
    product: str = "update"
    strict: bool = True
    score: str = "update"
    bracketed: bool = False  # top_k: scores inside of the bracket are left to a later kernel
    # top_k: the threshold is known except for the few scores of one bin of its histogram, which go to a list
    pending: bool = False
    arguments: int = 0  # function: how many numbers it takes
    strength: str = "fixed"
    of: str = "update"
    still: bool = False
    share_known: bool = False  # mean_preserving of exact top-K: the number of the selected is known beforehand
    quantile: str = "exact"
    estimate: str = "exact"
    statistics: bool = False
    stochastic: bool = False
    writes: bool = True  # False: look at the scores, change nothing
    recomputed: bool = False  # the moments have moved already: the update is made from the stored ones as they are
    sums: bool = False  # with brackets and without `writes`: moments and marks are stored, and the strength's sums
    marked: bool = False  # an earlier kernel has stored a bit for each element: 1 where it is selected
    control: bool = False  # a matched random control is selected in the place of what `selection` says
    control_norm: bool = False  # its multipliers are scaled so that the norm of the masked update stays
    ranked: bool = False  # with `sums`: the control draws in the pass that counts scores, as K is known before
    drawn: bool = False  # the control's limit is known: `select` takes the control's coordinates
    decay: str = "everywhere"  # or "cautious": the elements that the factor reaches
    decay_of: str = "update"
    decay_strict: bool = False

    def __post_init__(self) -> None:
        values = tuple(getattr(self, field.name) for field in fields(self))
        object.__setattr__(self, "_text", f"Config{values}")
        object.__setattr__(self, "_hash", hash(values))

    def __hash__(self) -> int:
        return vars(self)["_hash"]

    def __repr__(self) -> str:
        return vars(self)["_text"]


@functools.lru_cache(maxsize=256)
def derived(cfg: Config, **changes: Any) -> Config:
    """`dataclasses.replace`, cached."""
    return replace(cfg, **changes)
