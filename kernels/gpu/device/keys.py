"""Scores as unsigned integers in the same order: what top-K ranks, bit for bit the same in every kernel."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def key_of(score):
    """uint32, larger where the score is: +0 and -0 are equal, every NaN is 0 and below everything else."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # -0 + 0 is +0
    key = (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)
    return tl.where(score == score, key, 0)
