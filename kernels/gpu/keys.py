"""Scores as unsigned integers in the same order: what top-K ranks, bit for bit the same in every kernel."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def key_of(score):
    """uint32, larger where the score is: +0 and -0 are equal, every NaN is 0 and below everything else."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.uint32, bitcast=True)
    negative = (bits >> 31) != 0
    key = tl.where(negative, bits ^ 0xFFFFFFFF, bits ^ 0x80000000)
    return tl.where(score == score, key, 0)
