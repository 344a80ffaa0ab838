"""Shards of a tensor without processes: every rank's part, and a sum over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from selective.kernels import Shard

Cuts = Sequence[tuple[tuple[int, int], ...]]  # for each part of a dimension, its runs


def parts(size: int, many: int) -> list[tuple[tuple[int, int], ...]]:
    """The parts that torch.chunk makes, of which the last are short or empty."""
    step = -(-size // many)
    edges = [(min(i * step, size), min((i + 1) * step, size)) for i in range(many)]
    return [((low, high - low),) if high > low else () for low, high in edges]


def interleaved(size: int, many: int) -> list[tuple[tuple[int, int], ...]]:
    """Strided parts: each has some of the first half and some of the second."""
    half = size // 2
    first, second = parts(half, many), parts(size - half, many)
    found = []
    for a, b in zip(first, second, strict=True):
        moved = tuple((start + half, count) for start, count in b)
        joined = a + moved
        if a and moved and sum(a[-1]) == moved[0][0]:
            joined = ((a[0][0], a[0][1] + moved[0][1]),)
        found.append(joined)
    return found


def cut(whole: Tensor, dim: int, many: int, how: Callable[[int, int], Any] = parts) -> list[tuple[Tensor, Shard]]:
    """The parts along one dimension, each with its place."""
    runs = how(whole.shape[dim], many)
    pieces = sorted(run for some in runs for run in some)
    found = []
    for some in runs:
        taken = [whole.narrow(dim, start, count) for start, count in some] or [whole.narrow(dim, 0, 0)]
        everywhere = [((0, size),) if size else () for size in whole.shape]
        everywhere[dim] = some
        shard = Shard(
            tuple(whole.shape), tuple(everywhere), None, cut=dim, pieces=max(len(pieces), 1),
            places=tuple(pieces.index(run) for run in some),
            stretches=dim == 0 and how is parts, row_stretches=how is parts,
        )  # fmt: skip
        found.append((torch.cat(taken, dim), shard))
    return found


def together(generators: Sequence[Any]) -> list[Any]:
    """Run a generator for each rank to its end, in lockstep. Returns their results. All must ask equally often."""
    results: list[Any] = [None] * len(generators)
    asked = [next(one, None) for one in generators]
    while asked[0] is not None:
        total = torch.stack([one for one in asked if one is not None]).sum(0, dtype=asked[0].dtype)
        assert all(one is not None for one in asked), "some ranks are done, others ask"
        asked = []
        for rank, one in enumerate(generators):
            try:
                asked.append(one.send(total.clone()))
            except StopIteration as end:
                asked.append(None)
                results[rank] = end.value
    return results
