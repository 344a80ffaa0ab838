"""Exactly the K largest scores of tensors that several processes have parts of: a radix search, and then the ties.

A score is ranked by an integer image of its bits, eight of them a round from the highest: every process counts the
bytes of what is still undecided, the counts are added, and all go on in the byte that holds the K-th. After four rounds
(eight for float64) the K-th score is known. How many of those that are equal to it are taken, the lowest indices first,
is found in the same way over the `cells` of the whole tensor, each of which is on one process.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..reference.places import cells
from ..spec import Shard

BINS = 256
ONE_ROUND = 720  # cells of which the ties are found in one round ...
TWO_ROUNDS = 360**2  # ... and in two: counters of less than 3 KiB, so that with all others a tensor has less than 8
Asking = Generator[Tensor, Tensor, None]


def key_of(score: Tensor) -> Tensor:
    """int32 (int64 for float64) in the order of the scores; the smallest integer for NaN. 1-d."""
    bits = torch.int64 if score.dtype == torch.float64 else torch.int32
    info = torch.iinfo(bits)
    flat = score.reshape(-1)
    raw = (flat + 0.0).view(bits)  # -0 becomes +0
    return torch.where(torch.isnan(flat), info.min, torch.where(raw < 0, raw ^ info.max, raw))


def _counts(digit: Tensor, bins: int) -> Tensor:
    """How many of each digit in [0, bins); others are left out by being `bins`. int32; a GPU is not waited for."""
    if digit.is_cuda:
        return torch.histc(digit.to(torch.int32), bins=bins + 1, min=0, max=bins + 1)[:bins].to(torch.int32)
    return torch.bincount(digit.to(torch.int64), minlength=bins + 1)[:bins].to(torch.int32)


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
    first_cell: Tensor | None = None  # the undecided cells begin here ...
    taken: Tensor | None = None  # the selected among the equal, at the end


def _largest_first(counts: Tensor, need: Tensor) -> tuple[Tensor, Tensor]:
    """The bin that holds number `need` from above, and how many are needed of it. counts [T, bins], need [T]."""
    above = counts.flip(1).cumsum(1).flip(1) - counts
    inside = (above < need[:, None]) & (need[:, None] <= above + counts)
    place = torch.arange(counts.shape[1], device=counts.device)
    chosen = (inside * place).sum(1)
    return chosen, need - (inside * above).sum(1)


def find(tensors: Sequence[Ranked]) -> Asking:
    """Find the K-th key of each: `prefix`, `need` and `among` are set. All of one key dtype and device."""
    dtype = tensors[0].key.dtype
    width = torch.iinfo(dtype).bits
    nothing = torch.iinfo(dtype).min
    device = tensors[0].key.device
    need = prefix = torch.zeros(0)
    for number, shift in enumerate(range(width - 8, -1, -8)):
        rows = []
        for index, one in enumerate(tensors):
            digit = (one.key >> shift) & 0xFF if number else (one.key >> shift) + 128
            undecided = one.key != nothing
            if number:
                undecided &= (one.key >> (shift + 8)) == prefix[index]
            counts = _counts(torch.where(undecided, digit, BINS), BINS)
            rows.append(counts if one.shard.counted else torch.zeros_like(counts))
        counts = (yield torch.stack(rows).reshape(-1)).reshape(-1, BINS).to(torch.int64)
        if number == 0:
            wanted = torch.tensor([one.k for one in tensors], dtype=torch.int64)
            wanted = wanted.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else wanted
            need = torch.minimum(wanted, counts.sum(1))
        chosen, need = _largest_first(counts, need)
        prefix = (chosen - 128 if number == 0 else (prefix << 8) | chosen).to(dtype)
    among = counts.gather(1, chosen[:, None])[:, 0]
    for index, one in enumerate(tensors):
        one.prefix, one.need, one.among = prefix[index], need[index], among[index]


def tie_rounds(shards: Iterable[Shard]) -> int:
    """How many rounds the ties of these take."""
    most = max((shard.cells for shard in shards), default=0)
    return 0 if most == 0 else 1 if most <= ONE_ROUND else 2 if most <= TWO_ROUNDS else 3


def _steps(count: int, among: int) -> list[int]:
    """How many cells a counter stands for, round by round, down to one."""
    if count <= ONE_ROUND:
        return [1] * among
    many = 2 if count <= TWO_ROUNDS else 3
    base = math.ceil(count ** (1 / many))
    while base**many < count:
        base += 1
    return [base**power for power in reversed(range(many))] + [1] * (among - many)


def settle(tensors: Sequence[Ranked], extra: Tensor) -> Generator[Tensor, Tensor, Tensor]:
    """Say which of those that are equal to the K-th are taken. `extra` (int32, 1-d) is summed along in the last round.

    In as many rounds as the tensor with the most cells takes; those that are done before send nothing.
    """
    many = max(tie_rounds(one.shard for one in tensors if one.ties), 1 if extra.numel() else 0)
    mine = [one for one in tensors if one.ties]
    places = [cells(one.shard, one.key.device) for one in mine]
    widths = [_steps(one.shard.cells, many) for one in mine]
    start = [torch.zeros((), dtype=torch.int64, device=one.key.device) for one in mine]
    left = [one.need for one in mine]
    bins = [one.shard.cells if one.shard.cells <= ONE_ROUND else math.ceil(one.shard.cells / w[0]) for one, w in
            zip(mine, widths, strict=True)]  # fmt: skip
    done = [False] * len(mine)
    for number in range(many):
        rows, who = [], []
        for i, one in enumerate(mine):
            if done[i]:
                continue
            width = widths[i][number]
            at = torch.div(places[i] - start[i], width, rounding_mode="floor")
            inside = (one.key == one.prefix) & (at >= 0) & (at < bins[i])
            counts = _counts(torch.where(inside, at, bins[i]), bins[i])
            rows.append(counts if one.shard.counted else torch.zeros_like(counts))
            who.append(i)
        last = number == many - 1
        answer = yield torch.cat([*rows, *([extra] if last else [])])
        parts = answer.split([*(bins[i] for i in who), *([extra.numel()] if last else [])])
        if last:
            extra = parts[-1]
        for i, counts in zip(who, parts, strict=False):
            _take_cells(i, counts.to(torch.int64), widths[i][number], start, left)
            done[i] = widths[i][number] == 1
            bins[i] = widths[i][number] // widths[i][min(number + 1, many - 1)] if not done[i] else bins[i]
    for i, one in enumerate(mine):
        _mark(one, places[i], start[i], left[i])
    return extra


def _take_cells(i: int, counts: Tensor, width: int, start: list[Tensor], left: list[Tensor | None]) -> None:
    """Narrow tensor `i` down to the cell in which its last tie is."""
    need = left[i]
    assert need is not None
    upto = counts.cumsum(0)
    before = upto - counts
    inside = (before < need) & (need <= upto)
    place = torch.arange(counts.numel(), device=counts.device)
    start[i] = start[i] + (inside * place).sum() * width
    left[i] = need - (inside * before).sum()


def _mark(one: Ranked, places: Tensor, cell: Tensor, left: Tensor | None) -> None:
    """Which equal ones are selected: all of the cells before, the first `left` of this one."""
    assert left is not None
    equal = one.key == one.prefix
    here = equal & (places == cell)
    first = here & (here.to(torch.int64).cumsum(0) <= left)
    one.taken = (equal & (places < cell)) | first


def selected(one: Ranked) -> Tensor:
    """The selected, 1-d bool. After `find`, and `settle` where ties are told apart."""
    assert one.prefix is not None and one.need is not None
    equal = one.taken if one.ties else one.key == one.prefix
    assert equal is not None
    valid = one.key != torch.iinfo(one.key.dtype).min
    return ((one.key > one.prefix) | equal) & valid & (one.need > 0)
