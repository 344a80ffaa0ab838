"""Decoupled decay of a block of elements: the coordinates that its factor reaches."""

from __future__ import annotations

import triton
import triton.language as tl

from .config import RATE


@triton.jit
def decaying(p, g, u, mask, row, CFG: tl.constexpr):
    """True where the factor reaches an element, `p` being the parameter before the step. Reads nothing more."""
    if CFG.decay_of == "gradient":
        x = g
    else:
        x = u
        if CFG.decay_of == "masked":
            x = mask * u
        x = x * tl.where(tl.load(row + RATE) < 0, -1.0, 1.0)  # a negative rate: `turned` of the reference
    if CFG.decay == "cautious":
        agrees = ((x > 0) & (p > 0)) | ((x < 0) & (p < 0))
        if not CFG.decay_strict:
            agrees = agrees | (x == 0)
    else:
        tl.static_assert(False, "the GPU has no decay of this kind")
        agrees = x == 0
    return agrees
