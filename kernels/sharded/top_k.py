"""The K-th largest score of tensors that several processes have parts of, by a radix search.

A score is ranked by an integer, its key, whose bytes are looked at one a round, from the highest. Every process counts
that byte of its keys that are still undecided, the counts are added, and all go on with the byte that holds the K-th.
After four rounds (eight for float64) the K-th key is known; `ties.py` then finds which of the equal ones are selected.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..shard import Shard

BINS = 256
Asking = Generator[Tensor, Tensor, None]


def key_of(score: Tensor) -> Tensor:
    """The scores as integers of the same order: int32 (int64 for float64), 1-d. NaN is the smallest integer."""
    bits = torch.int64 if score.dtype == torch.float64 else torch.int32
    info = torch.iinfo(bits)
    flat = score.reshape(-1)
    raw = (flat + 0.0).view(bits)  # -0 becomes +0
    return torch.where(torch.isnan(flat), info.min, torch.where(raw < 0, raw ^ info.max, raw))


def counts_of(digit: Tensor, bins: int) -> Tensor:
    """The number of each integer in [0, bins): int32, 1-d. Other integers don't count. A GPU is not waited for."""
    if digit.is_cuda:  # integers out of range are left out, except for the end of the range: one bin more
        return torch.histc(digit.to(torch.int32), bins=bins + 1, min=0, max=bins + 1)[:bins].to(torch.int32)
    digit = torch.where((digit >= 0) & (digit < bins), digit, bins)
    return torch.bincount(digit.reshape(-1).to(torch.int64), minlength=bins + 1)[:bins].to(torch.int32)


def upload(values: Sequence[int], device: torch.device) -> Tensor:
    """These numbers on the device: int64, 1-d. A GPU is not waited for."""
    host = torch.tensor(values, dtype=torch.int64, device="cpu")
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


@dataclass
class Ranked:
    """One tensor's search for its K-th score. At the end, `selected` says which coordinates it selects."""

    key: Tensor
    k: int  # of the whole tensor, at least 1
    shard: Shard
    ties: bool = True  # False: all that equal the K-th are selected, as by a threshold from a sample
    prefix: Tensor | None = None  # the known upper bits of the K-th key, shifted to the right; at the end, the key
    need: Tensor | None = None  # the number of keys that begin with `prefix` and are selected: int64, 0-d
    among: Tensor | None = None  # at the end, the number of keys that equal the K-th: int64, 0-d
    taken: Tensor | None = None  # at the end, which of them are selected: bool, 1-d


def largest_first(counts: Tensor, need: Tensor) -> tuple[Tensor, Tensor]:
    """Find, for each row of counts [T, bins], the bin of the `need`-th largest key; `need` is int64 [T].

    Returns the bin, and the position of that key among the keys of the bin, from above.
    """
    above = counts.flip(1).cumsum(1).flip(1) - counts
    inside = (above < need[:, None]) & (need[:, None] <= above + counts)
    place = torch.arange(counts.shape[1], device=counts.device)
    chosen = (inside * place).sum(1)
    return chosen, need - (inside * above).sum(1)


def find(tensors: Sequence[Ranked]) -> Asking:
    """Find the K-th key of each tensor: set `prefix`, `need` and `among`. All have one key dtype and device.

    NaN has the smallest key. It is left out of the first count, which says how many scores there are; later it is below
    the K-th wherever it is counted.
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
            # minus the known bytes of the K-th: 0 to 255 where these are the same, even if the difference overflows
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
    """The selected coordinates, bool, 1-d: after `find`, and after `ties.settle` if ties are told apart."""
    assert one.prefix is not None and one.need is not None
    equal = one.taken if one.ties else one.key == one.prefix
    assert equal is not None
    return ((one.key > one.prefix) | equal) & (one.need > 0)
