"""A strength that depends on the share of the selected only: from their number to the multiplier, in float64."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mean_preserving(count, numel, rest, cap):
    """The multiplier of `count` elements of `numel` that keeps the mean of the mask at 1, at most `cap`; 1 of none."""
    share = count / numel
    value = (1.0 - rest * (1.0 - share)) / tl.maximum(share, 0.5 / numel)
    return tl.where(count > 0, tl.minimum(value, cap), 1.0)
