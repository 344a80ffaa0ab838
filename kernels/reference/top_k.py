"""Exactly the K largest scores."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k(score: Tensor, k: int) -> Tensor:
    """A bool tensor shaped like `score` that is true at its `k` largest elements.

    +0 and -0 are equal. Equal scores go to the lower flat (row-major) index. NaN is never selected, so that fewer than
    `k` are selected only if fewer than `k` scores are not NaN. `k <= 0` selects nothing, `k >= numel` all but NaN.
    A stable sort: the host never waits for the device, but it is the slowest way there is.
    """
    flat = score.detach().reshape(-1)
    unordered = torch.isnan(flat)
    # Negated, so that an ascending sort has the largest first and NaN last; + 0.0 makes -0 into +0, and one bit
    # pattern for all NaNs, because a radix sort (CUDA) orders by bits.
    key = torch.where(unordered, torch.nan, -flat + 0.0)
    order = torch.sort(key, stable=True).indices
    chosen = torch.zeros_like(unordered)
    chosen.index_fill_(0, order[: max(k, 0)], True)
    return (chosen & ~unordered).reshape(score.shape)
