"""Buffer: memory that lasts for a part of a step, while the views of it last from step to step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from selective.kernels.lasting import lasting

ALIGNED = 128  # elements: views begin at multiples of 512 bytes


class Buffer:
    """A float32 tensor whose storage has no bytes between two uses, so that views of it can be kept.

    Making a thousand views in every step takes longer than the step. The memory itself comes from torch's allocator
    and goes back to it, as that of a tensor which is made in the step.
    """

    def __init__(self, numel: int, device: torch.device) -> None:
        with lasting():
            self.flat = torch.empty(numel, dtype=torch.float32, device=device)
        self._storage, self._bytes = self.flat.untyped_storage(), 4 * numel
        self._storage.resize_(0)

    def take(self) -> None:
        """Get memory, whose contents are undefined at first."""
        self._storage.resize_(self._bytes)

    def give_back(self) -> None:
        """Give the memory back; nothing happens if there is none."""
        self._storage.resize_(0)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Have memory inside of the block."""
        self.take()
        try:
            yield
        finally:
            self.give_back()

    def views(self, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Return views of these shapes, one after the other, each at a multiple of `ALIGNED` elements.

        They are made while the buffer is in use: torch looks if the memory is there.
        """
        views, start = [], 0
        with lasting():
            for shape in shapes:
                views.append(self.flat[start : start + math.prod(shape)].view(shape))
                start += aligned(math.prod(shape))
        return views


def aligned(numel: int) -> int:
    """Return the elements that a view of `numel` elements takes in a buffer."""
    return -(-numel // ALIGNED) * ALIGNED


@contextmanager
def all_in_use(buffers: Sequence[Buffer]) -> Iterator[None]:
    """Have memory in all of these buffers inside of the block."""
    with ExitStack() as stack:
        for buffer in buffers:
            stack.enter_context(buffer.in_use())
        yield
