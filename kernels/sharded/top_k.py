"""The K-th largest score of tensors that several processes have parts of, by a radix search.

A score is ranked by an integer image of its bits, eight of them a round from the highest: every process counts the
bytes of what is still undecided, the counts are added, and all go on in the byte that holds the K-th. After four rounds
(eight for float64) the K-th score is known; `ties.py` then finds which of those that are equal to it are taken.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..spec import Shard

BINS = 256
Asking = Generator[Tensor, Tensor, None]


def key_of(score: Tensor) -> Tensor:
    """int32 (int64 for float64) in the order of the scores; the smallest integer for NaN. 1-d."""
    bits = torch.int64 if score.dtype == torch.float64 else torch.int32
    info = torch.iinfo(bits)
    flat = score.reshape(-1)
    raw = (flat + 0.0).view(bits)  # -0 becomes +0
    return torch.where(torch.isnan(flat), info.min, torch.where(raw < 0, raw ^ info.max, raw))


def counts_of(digit: Tensor, bins: int) -> Tensor:
    """How many of each integer in [0, bins) there are; others don't count. int32; a GPU is not waited for."""
    if digit.is_cuda:  # integers out of range are left out, but for the end of the range itself: one bin more
        return torch.histc(digit.to(torch.int32), bins=bins + 1, min=0, max=bins + 1)[:bins].to(torch.int32)
    digit = torch.where((digit >= 0) & (digit < bins), digit, bins)
    return torch.bincount(digit.reshape(-1).to(torch.int64), minlength=bins + 1)[:bins].to(torch.int32)


def upload(values: Sequence[int], device: torch.device) -> Tensor:
    """int64, 1-d; a GPU is not waited for."""
    found = torch.tensor(values, dtype=torch.int64, device="cpu")
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found


@dataclass
class Ranked:
    """One tensor's search. `selected` at the end."""

    key: Tensor
    k: int  # of the whole tensor, at least 1
    shard: Shard
    ties: bool = True  # False: all that are equal to the K-th are selected, as a threshold of a sample does
    prefix: Tensor | None = None  # the K-th key, as far as it is known, shifted to the right
    need: Tensor | None = None  # how many of what is undecided are taken: int64, 0-d
    among: Tensor | None = None  # ... and how many are equal to the K-th, at the end
    taken: Tensor | None = None  # the selected among the equal, at the end


def largest_first(counts: Tensor, need: Tensor) -> tuple[Tensor, Tensor]:
    """The bin that holds number `need` from above, and how many are needed of it. counts [T, bins], need [T]."""
    above = counts.flip(1).cumsum(1).flip(1) - counts
    inside = (above < need[:, None]) & (need[:, None] <= above + counts)
    place = torch.arange(counts.shape[1], device=counts.device)
    chosen = (inside * place).sum(1)
    return chosen, need - (inside * above).sum(1)


def find(tensors: Sequence[Ranked]) -> Asking:
    """Find the K-th key of each: `prefix`, `need` and `among` are set. All of one key dtype and device.

    NaN has the smallest key of all. It is left out of the first count, which says how many scores there are; later it
    can only be below the K-th, wherever it is counted.
    """
    dtype, device = tensors[0].key.dtype, tensors[0].key.device
    nothing = torch.iinfo(dtype).min
    need = prefix = chosen = torch.zeros(0, dtype=torch.int64, device=device)
    counts = torch.zeros(0, BINS, dtype=torch.int64, device=device)
    for shift in range(torch.iinfo(dtype).bits - 8, -1, -8):
        first, rows = prefix.numel() == 0, []
        base = prefix << 8
        for index, one in enumerate(tensors):
            high = one.key >> shift
            # minus what is known of the K-th: 0 to 255 where that is the same, also where the difference overflows
            digit = torch.where(one.key == nothing, -1, high + 128) if first else high - base[index]
            counts = counts_of(digit, BINS)
            rows.append(counts if one.shard.counted else torch.zeros_like(counts))
        counts = (yield torch.stack(rows).reshape(-1)).reshape(-1, BINS).to(torch.int64)
        if first:
            need = torch.minimum(upload([one.k for one in tensors], device), counts.sum(1))
        chosen, need = largest_first(counts, need)
        prefix = (chosen - 128 if first else base + chosen).to(dtype)
    among = counts.gather(1, chosen[:, None])[:, 0]
    for index, one in enumerate(tensors):
        one.prefix, one.need, one.among = prefix[index], need[index], among[index]


def selected(one: Ranked) -> Tensor:
    """The selected, 1-d bool. After `find`, and `settle` where ties are told apart."""
    assert one.prefix is not None and one.need is not None
    equal = one.taken if one.ties else one.key == one.prefix
    assert equal is not None
    return ((one.key > one.prefix) | equal) & (one.need > 0)
