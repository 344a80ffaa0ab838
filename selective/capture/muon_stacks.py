"""Matrices of one shape, or of a shape and its transposed one, are put into one stack for a batched product."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from selective import foreach
from selective.preconditioner.linalg import batches

# The elements of a stack: enough to fill a GPU, and few enough that what is made beside it stays small.
STACK = 2**25


@dataclass(frozen=True)
class Stack:
    """The indices of matrices that are stacked together, in the order of the stack: tall ones come last."""

    wide: list[int]  # not taller than wide
    tall: list[int]

    @property
    def indices(self) -> list[int]:
        """Those of all matrices."""
        return self.wide + self.tall

    @property
    def orientations(self) -> list[list[int]]:
        """The indices by orientation, without an empty list."""
        return [indices for indices in (self.wide, self.tall) if indices]


def parts_in_stacks(tensors: Sequence[Tensor]) -> Iterator[list[Stack]]:
    """Divide matrices into stacks, and hand these out in parts of one device.

    A stack has matrices of one device and one dtype to compute in, of `STACK` elements at most or a single matrix. A
    part has `foreach.PART` elements at most, or a single stack.
    """
    alike: dict[tuple[object, ...], tuple[list[int], list[int]]] = {}
    for index, t in enumerate(tensors):
        rows, columns = t.shape
        shape = (rows, columns) if rows <= columns else (columns, rows)
        alike.setdefault((t.device, t.dtype == torch.float64, shape), ([], []))[rows > columns].append(index)
    part: list[Stack] = []
    elements, device = 0, None
    for (on, *_), (wide, tall) in sorted(alike.items(), key=lambda item: str(item[0][0])):
        numel = tensors[(wide or tall)[0]].numel()
        for where in batches(len(wide) + len(tall), numel, STACK):
            stack = Stack(wide[where], tall[max(where.start - len(wide), 0) : max(where.stop - len(wide), 0)])
            count = numel * (where.stop - where.start)
            if part and (on != device or elements + count > foreach.PART):
                yield part
                part, elements = [], 0
            device, elements = on, elements + count
            part.append(stack)
    if part:
        yield part
