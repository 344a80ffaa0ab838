"""The random numbers of a chunk: the hashes of `kernels/reference/random.py` in fewer operations.

The hash xors a key, then runs "x ^= x >> 16, x *= A, x ^= x >> 15, x *= B, x ^= x >> 16", and does both again with
another key. Written as operations on whole chunks that is 27; 12 of them are enough, for three reasons:

- The indices of one block of 65,536 have the same upper half, so that the first key and the first shift are one xor of
  the lower half with one constant.
- The last shift of the first round and the first shift of the second cancel, except for the key between them:
  y = x ^ (x >> 16) ^ k, and y ^ (y >> 16) = x ^ k ^ (k >> 16), as a shift by 16 leaves the upper half alone.
- The last shift leaves the upper half alone as well, so that it costs nothing where only upper bits are wanted.

A matched control has numbers of another form (`Ranking`): a quarter of the hashes, and 3 operations more for each.
"""

from __future__ import annotations

import functools
import sys

import torch
from torch import Tensor

from ..reference.random import GOLDEN, GROUP, A, B, keys, signed32
from ..spec import Draw
from .chunks import buffer

BLOCK = 1 << 16


@functools.cache
def number(value: int) -> Tensor:
    """An int32 number as a 0-d tensor. As a Python number it would be made and converted in every operation: 5 us."""
    return torch.tensor(value, dtype=torch.int32, device="cpu")


@functools.cache
def _lower_halves() -> Tensor:
    return torch.arange(BLOCK, dtype=torch.int32, device="cpu")


def _mix_(x: Tensor, scratch: Tensor) -> None:
    """x *= A, x ^= x >> 15, x *= B, in place on int32. torch shifts arithmetically: sign bits are masked off."""
    x.mul_(number(A))
    torch.bitwise_right_shift(x, number(15), out=scratch)
    x.bitwise_xor_(scratch.bitwise_and_(number((1 << 17) - 1)))
    x.mul_(number(B))


def unfinished(draw: Draw, address: int, start: int, count: int) -> Tensor:
    """The hashes of elements `start`, `start + 1`, ... before the last shift: int32, in a buffer of this thread."""
    x, scratch = buffer("bits", count, torch.int32), buffer("shifted", count, torch.int32)
    done = 0
    while done < count:  # the keys change every 2^32 elements
        high = (start + done) >> 32
        take = min(count - done, ((high + 1) << 32) - start - done)
        key, second = keys(draw, address, high)
        part, rest = x[done : done + take], scratch[done : done + take]
        _first_xor(part, (start + done) & 0xFFFFFFFF, key)
        _mix_(part, rest)
        part.bitwise_xor_(signed32(second ^ ((second & 0xFFFFFFFF) >> 16)))
        _mix_(part, rest)
        done += take
    return x


def _first_xor(x: Tensor, start: int, key: int) -> None:
    """Write y ^ (y >> 16) to `x`, where y = index ^ key, for the 32-bit indices from `start` on."""
    done, count = 0, x.numel()
    while done < count:
        upper, lower = (start + done) >> 16, (start + done) & (BLOCK - 1)
        blocks = (count - done) // BLOCK if lower == 0 else 0
        if blocks > 1:  # one operation for all
            constants = torch.tensor(
                [[_constant(upper + i, key)] for i in range(blocks)], dtype=torch.int32, device="cpu"
            )
            take = blocks * BLOCK
            torch.bitwise_xor(_lower_halves(), constants, out=x[done : done + take].view(blocks, BLOCK))
        else:
            take = min(count - done, BLOCK - lower)
            part = x[done : done + take]
            torch.bitwise_xor(_lower_halves()[lower : lower + take], _constant(upper, key), out=part)
        done += take


def _constant(upper: int, key: int) -> int:
    """`_first_xor` of the indices with this upper half, given their lower half."""
    high = (upper ^ (key >> 16)) & 0xFFFF
    return signed32(high << 16 | (high ^ key & 0xFFFF))


def finish_(x: Tensor) -> Tensor:
    """Turn hashes before the last shift into the 24-bit numbers, in place. Overwrites the buffer "shifted"."""
    scratch = torch.bitwise_right_shift(x, number(24), out=buffer("shifted", x.numel(), torch.int32))
    scratch.bitwise_and_(number(0xFF))
    return x.bitwise_right_shift_(number(8)).bitwise_and_(number(0xFFFFFF)).bitwise_xor_(scratch)


class Ranking:
    """The numbers of a chunk that a matched control ranks (`ranking_bits`): their upper 8 bits, and the hashes.

    The chunk is elements `start` to `start + count` of the tensor. It lives in buffers of this thread, until the next.
    """

    def __init__(self, draw: Draw, address: int, start: int, count: int) -> None:
        first = start // GROUP
        x = unfinished(draw, address, first, -(-(start + count) // GROUP) - first)
        shifted = torch.bitwise_right_shift(x, number(16), out=buffer("shifted", x.numel(), torch.int32))
        self.hashes = x.bitwise_xor_(shifted.bitwise_and_(number(0xFFFF)))
        self.skipped = start - first * GROUP  # elements of the first group that are before the chunk
        size = self.skipped + count
        self.upper = _bytes(self.hashes)[self.skipped : size]  # uint8, one for each element
        self.spare = shifted.view(torch.uint8)[:count]  # memory for as many marks: it is in the cache, and done with

    def hashes_at(self, places: Tensor) -> Tensor:
        """The groups' hashes (int32) of elements at these places of the chunk, for `ranking_at`."""
        return self.hashes.index_select(0, (places + self.skipped).bitwise_right_shift_(2))


def ranking_at(hashes: Tensor, index: Tensor) -> Tensor:
    """The 24-bit numbers (int32) of elements of a tensor, from their groups' hashes."""
    place = index.to(torch.int32).bitwise_and_(number(GROUP - 1))
    upper = torch.bitwise_right_shift(hashes, place << 3).bitwise_and_(number(0xFF))
    lower = place.add_(number(1)).mul_(number(GOLDEN)).bitwise_xor_(hashes)
    return _joined(upper, lower)


def ranking_of_all(draw: Draw, address: int, count: int) -> Tensor:
    """The 24-bit numbers (int32) of all elements of a small tensor."""
    return _of_groups(Ranking(draw, address, 0, count).hashes)[:count]


def ordered(random: Tensor, places: Tensor) -> Tensor:
    """Keys (int64) of which no two are equal: larger for a larger number, and of equal ones for the lower place.

    Below the number, which has 24 bits, stands the place from the end.
    """
    return random.to(torch.int64).bitwise_left_shift_(38).sub_(places)


def _of_groups(hashes: Tensor) -> Tensor:
    """The 24-bit numbers of all elements of these groups."""
    lower = hashes.view(-1, 1).bitwise_xor(_multiples_of_golden()).view(-1)
    return _joined(_bytes(hashes).to(torch.int32), lower)


@functools.cache
def _multiples_of_golden() -> Tensor:
    return torch.arange(1, GROUP + 1, dtype=torch.int32, device="cpu") * GOLDEN


def _joined(upper: Tensor, lower: Tensor) -> Tensor:
    """The numbers of these upper 8 bits, and of the lower 16 that follow from `lower`. Overwrites both.

    The lower bits are the upper half of a hash, which the last of its shifts leaves alone.
    """
    scratch = torch.bitwise_right_shift(lower, number(16))
    lower.bitwise_xor_(scratch.bitwise_and_(number(0xFFFF)))
    _mix_(lower, scratch)
    lower.bitwise_right_shift_(number(16)).bitwise_and_(number(0xFFFF))
    return upper.bitwise_left_shift_(number(16)).bitwise_or_(lower)


def _bytes(x: Tensor) -> Tensor:
    """The bytes of int32 numbers, from the lowest to the highest of each."""
    if sys.byteorder == "little":
        return x.view(torch.uint8)
    return x.view(torch.uint8).view(-1, 4).flip(1).reshape(-1)
