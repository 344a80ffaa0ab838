"""The place of a rank's part in a whole tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Shard:
    """The part of a whole tensor that is on this rank: plain numbers and a process group.

    In each dimension the local indices stand for `runs` of the whole tensor's indices, ascending: (start, length) each.
    So the local flat (row-major) order is the whole's order, but the part need not be one stretch of it: it may be
    columns, or a strided shard.

    Ties go to the lower index of the whole tensor, whose equal scores may lie on several ranks. For them the whole is
    cut into `cells`, numbered in its order, each on one rank (and its replicas). The cells are: every index of the
    dimensions before the last sharded one, times the pieces of that one. `places` says which piece each local run of
    that dimension is.
    """

    shape: tuple[int, ...]  # of the whole tensor
    runs: tuple[tuple[tuple[int, int], ...], ...]
    group: Any  # of processes: a sum over it is a sum over the whole tensor, if only `counted` shards are added
    counted: bool = True  # False on all replicas but one, which add zeros
    cut: int = 0  # the last sharded dimension
    pieces: int = 1  # the number of pieces that dimension is cut into
    places: tuple[int, ...] = (0,)
    # Both are the same on every rank, because ranks exchange together what they step in the same way.
    stretches: bool = False  # on every rank, the part is one stretch of the whole's flat order
    row_stretches: bool = False  # on every rank, the part's rows are one stretch of the whole's rows

    @property
    def numel(self) -> int:
        """The number of elements of the whole tensor."""
        return math.prod(self.shape)

    @property
    def cells(self) -> int:
        """The number of cells that the whole is cut into for ties."""
        return math.prod(self.shape[: self.cut]) * self.pieces

    @property
    def offset(self) -> int | None:
        """The whole's flat index of the first local element, if all others follow it; None if they don't.

        0 if there are no local elements.
        """
        if not all(self.runs):
            return 0
        stride, offset, whole = 1, 0, True  # whole: the dimensions after this one are complete here
        for size, runs in zip(reversed(self.shape), reversed(self.runs), strict=True):
            if len(runs) != 1 or not (whole or runs[0][1] == 1):
                return None
            whole = whole and runs[0] == (0, size)
            offset, stride = offset + runs[0][0] * stride, stride * size
        return offset

    def first(self, unit: Literal["element", "row", "tensor"]) -> int | None:
        """The whole's number of the first local element or row, if all others follow it on every rank; else None."""
        if unit == "tensor":
            return 0
        if self.numel > 1 << 32 or not (self.stretches if unit == "element" else self.row_stretches):
            return None
        if unit == "element":
            return self.offset
        return self.runs[0][0][0] if self.runs[0] else 0
