"""Many tensors as few long ones: cut up into slices, and sums of each tensor from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

PART = 2**25  # elements that are worked on at a time


def upload(values: Sequence[int], device: torch.device) -> Tensor:
    """int64, 1-d; a GPU is not waited for."""
    found = torch.tensor(values, dtype=torch.int64, device="cpu")
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found


@dataclass
class Slice:
    """Some tensors, one after the other. `seg`: which of all tensors each element is of (int32)."""

    first: int
    last: int
    start: int
    stop: int
    seg: Tensor
    sizes: Tensor  # of each of its tensors (int64) ...
    starts: Tensor  # ... and where it begins, counted from the slice's start
    key: Tensor | None = None
    chosen: Tensor | None = None


def slices(lengths: Sequence[int], device: torch.device) -> list[Slice]:
    """Cut up between tensors, `PART` elements at most, or one tensor."""
    ends = list(accumulate(lengths))
    found, first = [], 0
    for index, end in enumerate(ends):
        begin = ends[first] - lengths[first]
        if index + 1 == len(ends) or ends[index + 1] - begin > PART:
            some = range(first, index + 1)
            sizes = upload([lengths[i] for i in some], device)
            seg = (torch.repeat_interleave(sizes, output_size=end - begin) + first).to(torch.int32)
            found.append(Slice(first, index + 1, begin, end, seg, sizes, sizes.cumsum(0) - sizes))
            first = index + 1
    return found


def segment_sums(x: Tensor, some: Slice) -> Tensor:
    """The sum of each of a slice's tensors, float64, in one order."""
    return torch.segment_reduce(x.to(torch.float64), "sum", lengths=some.sizes, unsafe=True, initial=0.0)
