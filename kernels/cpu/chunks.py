"""Flat views of a parameter's tensors, and the small buffers that every chunk reuses."""

from __future__ import annotations

import struct
import sys
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..lasting import lasting
from ..spec import Item

# Elements of a chunk. Measured on 2 cores with 2 MiB of L2 each (torch 2.13, 29.4M float32 parameters in transformer
# shapes), milliseconds of a step with agreement and two constants:
#   8k 119.5, 16k 82.2, 32k 62.0, 64k 44.2, 128k 38.1, 256k 37.4, 512k 42.4
# Smaller chunks pay for calls (about 1 us an operation, and a fork and join of the threads each), larger ones leave
# the cache. On 2 cores with 1 MiB of L2 each and a faster L3, 256k takes 0.8 to 0.9 of the time of 128k.
CHUNK = 131_072  # for one thread
MOST = 4  # times as many at most, where there are more threads


def chunk() -> int:
    """Elements of a chunk with this number of threads: as many for each of them as for one alone, up to a bound.

    torch divides an operation among its threads, and each has its own cache. So has each its own running sums, which
    are as exact as those of one thread. The bound is one of memory: 16 threads work on that many elements.
    """
    return CHUNK * min(torch.get_num_threads(), MOST)


PLACES = 0x0001020304050607  # times 256^k, the highest of the eight bytes of the product is k


class _Buffers(threading.local):
    """Chunk-sized tensors by name, for each thread that steps its own, kept between steps.

    In float32 each has 0.5 MiB for every thread of torch, up to `MOST`.
    """

    def __init__(self) -> None:
        self.held: dict[tuple[str, torch.dtype], Tensor] = {}
        self.exact: dict[tuple[str, int, torch.dtype], Tensor] = {}  # parts of them, of whole chunks
        self.shaped: dict[tuple[str, tuple[torch.Size, ...]], tuple[Tensor, list[Tensor]]] = {}  # of several tensors

    def get(self, name: str, count: int, dtype: torch.dtype) -> Tensor:
        held = self.held.get((name, dtype))
        if held is None or held.numel() < count:
            self.exact.clear()
            self.shaped.clear()
            with lasting():
                held = self.held[(name, dtype)] = torch.empty(max(CHUNK, count), dtype=dtype, device="cpu")
        if count % CHUNK != 0:
            return held[:count]
        with lasting():
            part = self.exact[name, count, dtype] = held[:count]  # kept, because a slice takes 3 us
        return part


_buffers = _Buffers()


def buffer(name: str, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The first `count` elements of this thread's buffer of that name. It may hold anything: write before reading."""
    kept = _buffers.exact.get((name, count, dtype))
    return _buffers.get(name, count, dtype) if kept is None else kept


SHAPED = 64  # sets of views of buffers that are kept for each thread, at most


def buffers(name: str, shapes: Sequence[torch.Size]) -> tuple[Tensor, list[Tensor]]:
    """A float32 buffer for tensors of these shapes, one after the other: flat, and a view for each.

    The views are kept for the next step, because making them takes longer than a small tensor's step.
    """
    key = name, tuple(shapes)
    kept = _buffers.shaped.get(key)
    if kept is None:
        sizes = [shape.numel() for shape in shapes]
        flat = buffer(name, sum(sizes))
        with lasting():
            kept = flat, [x.view(shape) for x, shape in zip(flat.split(sizes), shapes, strict=True)]
        if len(_buffers.shaped) >= SHAPED:
            _buffers.shaped.clear()
        _buffers.shaped[key] = kept
    return kept


def spans(numel: int, length: int | None = None) -> Iterator[tuple[int, int]]:
    """Start and end of each chunk, or of each piece of another length; nothing for an empty tensor."""
    length = length or chunk()
    for start in range(0, numel, length):
        yield start, min(start + length, numel)


def backwards(numel: int) -> Iterator[tuple[int, int]]:
    """The chunks from the last to the first.

    A pass that goes backwards begins with what the pass before it has left in the cache.
    """
    return reversed(list(spans(numel)))


def rounded(x: float) -> float:
    """`x` rounded to float32, if it is in float32's range."""
    return struct.unpack("f", struct.pack("f", x))[0] if abs(x) < 3e38 else x


def keep_marks(selected: Tensor, marks: Tensor) -> None:
    """Write 1.0 and 0.0 of a chunk to `marks` as uint8, by way of int32: a third of the time of a direct conversion."""
    marks.copy_(buffer("wide marks", selected.numel(), torch.int32).copy_(selected))


def sum_of_squares(x: Tensor, out: Tensor | None = None) -> float:
    """Σx² of a chunk; `out` is memory for the squares, None for a buffer.

    torch adds up in pairs: a relative error of 1e-7. A dot product takes half the time, but has a few running sums. The
    squares of Adam's first step are equal, so that all their roundings go one way: 1e-5 to 5e-4 in a chunk.
    """
    if out is None:
        out = buffer("products", x.numel(), x.dtype)
    return float(torch.mul(x, x, out=out).sum())


class Squares:
    """Σx² of a tensor, chunk by chunk.

    Squares are added up element by element, and those sums as `sum_of_squares` does: an operation fewer for a chunk.
    That happens every `TOGETHER` chunks, so that the roundings of a running sum stay below 1e-6.
    """

    TOGETHER = 8

    def __init__(self) -> None:
        self.total = 0.0
        self.sums: Tensor | None = None  # of the chunks since the last time
        self.chunks = 0  # how many those are

    def add(self, x: Tensor) -> None:
        n = x.numel()
        if self.sums is not None and (self.chunks == self.TOGETHER or n > self.sums.numel()):
            self.take()
        if self.sums is None:
            self.sums = torch.mul(x, x, out=buffer("squares", n, x.dtype))
        else:
            sums = self.sums if n == self.sums.numel() else self.sums[:n]
            sums.addcmul_(x, x)
        self.chunks += 1

    def take(self) -> float:
        """The sum of all that was added."""
        if self.sums is not None:
            self.total += float(self.sums.sum())
            self.sums, self.chunks = None, 0
        return self.total


def count_ones(marks: Tensor) -> int:
    """The number of 1.0 among a chunk's marks of 1.0 and 0.0: exact, and half the time of a sum."""
    return int(torch.dot(marks, marks))


def count_marks(marks: Tensor) -> int:
    """The number of 1 among marks of one byte, each 0 or 1: exact, and a third of the time of a conversion and a dot.

    The bytes of words of 8 marks are added up side by side, 128 words at most, so that none overflows. The marks begin
    at a multiple of 8 bytes.
    """
    words = marks.numel() // 8
    rows = min(words, 128)
    summed = words // rows * rows * 8 if rows else 0
    count = 0
    if summed:
        count = int(marks[:summed].view(torch.int64).view(rows, -1).sum(0).view(torch.uint8).sum())
    if summed < marks.numel():
        count += int(marks[summed:].sum())
    return count


def ones_of(marks: Tensor) -> Tensor:
    """The indices at which marks of one byte (uint8 or bool) are not 0, ascending, int64.

    `torch.nonzero` takes 2.8 ns an element. Here it looks at eight marks together, and again at those where one is set:
    a fifth of that where few are, half of it where one in 30 is. The marks begin at a multiple of 8 bytes.
    """
    rest = marks.numel() % 8
    if rest:
        whole = marks.numel() - rest
        return torch.cat([ones_of(marks[:whole]), torch.nonzero(marks[whole:]).view(-1).add_(whole)])
    words = torch.nonzero(marks.view(torch.int64)).view(-1)
    inside = torch.nonzero(marks.view(-1, 8).index_select(0, words).view(-1)).view(-1)
    ones = words.mul_(8).index_select(0, inside >> 3)
    return ones.add_(inside.bitwise_and_(7))


def split_ones(marks: Tensor) -> tuple[Tensor, Tensor]:
    """The indices of `ones_of` in two parts, each ascending: the first of every word of eight, and the others.

    It takes half of the time where one mark in 50 is set: the lowest mark of a word is found by a multiplication, so
    that no byte is looked at alone. Only the few words that have more marks are looked at by bytes. Marks are 0 or 1,
    and as many as whole words have.
    """
    if sys.byteorder != "little":
        ones = ones_of(marks)
        return ones, ones[:0]
    words = torch.nonzero(marks.view(torch.int64)).view(-1)
    left = marks.view(torch.int64).index_select(0, words)
    lowest = torch.neg(left).bitwise_and_(left)  # 256^k
    more = torch.nonzero(left.bitwise_xor_(lowest)).view(-1)
    ones = lowest.mul_(PLACES).bitwise_right_shift_(56).add_(words, alpha=8)
    if more.numel() == 0:
        return ones, more
    others = torch.nonzero(left.index_select(0, more).view(torch.uint8)).view(-1)
    words = words.index_select(0, more).index_select(0, others >> 3)
    return ones, others.bitwise_and_(7).add_(words, alpha=8)


def joined(parts: list[Tensor]) -> Tensor:
    """The parts one after the other. What is in one part alone is not copied."""
    filled = [part for part in parts if part.numel() > 0] or parts[:1]
    return filled[0] if len(filled) == 1 else torch.cat(filled)


def scattered_ones(marks: Tensor) -> Tensor:
    """The indices that `ones_of` returns, in no order, in the time of `split_ones`."""
    rest = marks.numel() % 8
    parts = list(split_ones(marks[: marks.numel() - rest]))
    if rest:
        parts.append(torch.nonzero(marks[-rest:]).view(-1).add_(marks.numel() - rest))
    return joined(parts)


class Scratch:
    """Tensor-sized memory for one call of `selective_step`, reused from tensor to tensor and freed at its end."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, torch.dtype], Tensor] = {}
        self.largest = 0  # elements of the call's largest tensor: memory is allocated once, at that size

    def get(self, name: str, count: int, dtype: torch.dtype, first: int = 0) -> Tensor:
        """`count` elements from `first` on of the memory of that name."""
        held = self.held.get((name, dtype))
        if held is None or held.numel() < first + count:
            with lasting():  # parts of a control's step are in inference mode
                held = torch.empty(max(first + count, self.largest), dtype=dtype, device="cpu")
            self.held[(name, dtype)] = held
        return held[first : first + count]


class Flat:
    """One item's tensors as flat, row-major tensors: views of those that are contiguous, copies of the others.

    `write_back` puts a copy that was written back where it belongs. A copy costs the tensor's size while it is stepped.
    """

    def __init__(self, item: Item, writes_state: bool) -> None:
        self._copies: list[tuple[Tensor, Tensor]] = []
        self.param = self._flatten(item.param, written=True)
        self.grad = self._flatten(item.grad, written=False)
        self.state = {
            name: self._flatten(value, written=writes_state)
            for name, value in item.state.items()
            if isinstance(value, Tensor) and value.shape == item.param.shape and name != "step"
        }

    def _flatten(self, tensor: Tensor, written: bool) -> Tensor:
        tensor = tensor.detach()
        if tensor.is_contiguous():
            return tensor.view(-1)
        copy = tensor.contiguous()
        if written:
            self._copies.append((tensor, copy))
        return copy.view(-1)

    def write_back(self) -> None:
        """Write the copies of the parameter, and of state that the rule moves, back to the tensors."""
        for tensor, copy in self._copies:
            tensor.copy_(copy)
