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
    if CFG.decay == "cautious":
        # Signs are compared as bits: five comparisons of numbers cost 2 % of a step that ranks. NaN stays NaN anyhow.
        signs = x.to(tl.int32, bitcast=True) ^ p.to(tl.int32, bitcast=True)
        if CFG.decay_of != "gradient":  # a negative rate: `turned` of the reference
            signs = signs ^ tl.load(row + RATE).to(tl.int32, bitcast=True)
        agrees = signs >= 0
        if CFG.decay_strict:
            agrees = agrees & (x != 0)
        else:
            agrees = agrees | (x == 0)
    else:
        tl.static_assert(False, "the GPU has no decay of this kind")
        agrees = x == 0
    return agrees
