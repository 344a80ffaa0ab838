"""The random numbers of a chunk: the hashes of `kernels/reference/random.py` in fewer operations.

The hash xors a key, then runs "x ^= x >> 16, x *= A, x ^= x >> 15, x *= B, x ^= x >> 16", and does both again with
another key. Written as operations on whole chunks that is 27; 12 of them are enough, for three reasons:

- The indices of one block of 65,536 have the same upper half, so that the first key and the first shift are one xor of
  the lower half with one constant.
- The last shift of the first round and the first shift of the second cancel, except for the key between them:
  y = x ^ (x >> 16) ^ k, and y ^ (y >> 16) = x ^ k ^ (k >> 16), as a shift by 16 leaves the upper half alone.
- The last shift leaves the upper half alone as well, so that it costs nothing where only upper bits are wanted.

A matched control has numbers of another form (`Ranking`): a quarter of the hashes, and 3 operations more for each.
Those of several tensors are formed together.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..reference.random import GOLDEN, GROUP, A, B, keys, signed32
from ..spec import Draw
from .chunks import buffer

BLOCK = 1 << 16
BLOCKS = 16  # whose constants are kept


@functools.cache
def number(value: int) -> Tensor:
    """An int32 number as a 0-d tensor. As a Python number it would be made and converted in every operation: 5 us."""
    return torch.tensor(value, dtype=torch.int32, device="cpu")


@functools.cache
def byte(value: int) -> Tensor:
    """The same of a byte."""
    return torch.tensor(value, dtype=torch.uint8, device="cpu")


@functools.cache
def _lower_halves() -> Tensor:
    return torch.arange(BLOCK, dtype=torch.int32, device="cpu")


def _mix_(x: Tensor, scratch: Tensor) -> None:
    """x *= A, x ^= x >> 15, x *= B, in place on int32. torch shifts arithmetically: sign bits are masked off."""
    x.mul_(number(A))
    torch.bitwise_right_shift(x, number(15), out=scratch)
    x.bitwise_xor_(scratch.bitwise_and_(number((1 << 17) - 1)))
    x.mul_(number(B))


Part = tuple[int, int, int]  # the address of a tensor, the first of its elements that are meant, and how many those are


def unfinished(draw: Draw, parts: Sequence[Part]) -> Tensor:
    """The hashes of these elements before the last shift, part after part: int32, in a buffer of this thread."""
    count = sum(count for _, _, count in parts)
    x, scratch = buffer("bits", count, torch.int32), buffer("shifted", count, torch.int32)
    keyed = list(_keyed(draw, x, parts))
    for part, start, key, _ in keyed:
        _first_xor(part, start, key)
    _mix_(x, scratch)
    for part, _, _, second in keyed:
        part.bitwise_xor_(signed32(second ^ ((second & 0xFFFFFFFF) >> 16)))
    _mix_(x, scratch)
    return x


def _keyed(draw: Draw, x: Tensor, parts: Sequence[Part]) -> Iterator[tuple[Tensor, int, int, int]]:
    """Places in `x` of elements with the same keys, their first 32-bit index, and the two keys."""
    done = 0
    for address, start, count in parts:
        while count > 0:  # the keys change every 2^32 elements
            high, low = start >> 32, start & 0xFFFFFFFF
            take = min(count, (1 << 32) - low)
            yield x if take == x.numel() else x[done : done + take], low, *keys(draw, address, high)
            done, start, count = done + take, start + take, count - take


def _first_xor(x: Tensor, start: int, key: int) -> None:
    """Write y ^ (y >> 16) to `x`, where y = index ^ key, for the 32-bit indices from `start` on."""
    done, count = 0, x.numel()
    while done < count:
        upper, lower = (start + done) >> 16, (start + done) & (BLOCK - 1)
        blocks = min((count - done) // BLOCK, BLOCKS - upper % BLOCKS) if lower == 0 else 0
        if blocks > 1:  # one operation for all
            first = upper % BLOCKS
            constants = _constants_of_blocks()[first : first + blocks].bitwise_xor(_constant(upper - first, key))
            take = blocks * BLOCK
            torch.bitwise_xor(_lower_halves(), constants, out=x[done : done + take].view(blocks, BLOCK))
        else:
            take = min(count - done, BLOCK - lower)
            part = x[done : done + take]
            torch.bitwise_xor(_lower_halves()[lower : lower + take], _constant(upper, key), out=part)
        done += take


@functools.cache
def _constants_of_blocks() -> Tensor:
    """`_constant` of the first blocks under a key of 0: that of another key, or further blocks, is an xor away."""
    return torch.tensor([[_constant(upper, 0)] for upper in range(BLOCKS)], dtype=torch.int32, device="cpu")


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
    """The numbers that matched controls rank (`ranking_bits`), of parts of tensors: upper 8 bits, and hashes.

    A part begins with a group, and all but the last have whole ones. All is in buffers of this thread, until the next.
    """

    def __init__(self, draw: Draw, parts: Sequence[Part]) -> None:
        count = sum(count for _, _, count in parts)
        x = unfinished(draw, [(address, start // GROUP, -(-count // GROUP)) for address, start, count in parts])
        shifted = torch.bitwise_right_shift(x, number(16), out=buffer("shifted", x.numel(), torch.int32))
        self.hashes = x.bitwise_xor_(shifted.bitwise_and_(number(0xFFFF)))
        self.upper = _bytes(self.hashes)[:count]  # uint8, one for each element
        self.spare = shifted.view(torch.uint8)[:count]  # memory for as many marks: it is in the cache, and done with

    def hashes_at(self, places: Tensor) -> Tensor:
        """The groups' hashes (int32) of elements at these places among all parts, for `ranking_at`."""
        return self.hashes.index_select(0, places.bitwise_right_shift(2))


def ranking_at(hashes: Tensor, index: Tensor) -> Tensor:
    """The 24-bit numbers (int32) of elements, from their groups' hashes and their indices, up to a multiple of 4."""
    place = index.bitwise_and(GROUP - 1)
    lower = _multiples_of_golden().index_select(0, place).bitwise_xor_(hashes)
    scratch = torch.bitwise_right_shift(lower, number(16))
    lower.bitwise_xor_(scratch.bitwise_and_(number(0xFFFF)))
    _mix_(lower, scratch)
    lower.bitwise_right_shift_(number(16)).bitwise_and_(number(0xFFFF))  # the last shift leaves these bits alone
    upper = torch.bitwise_right_shift(hashes, _shifts().index_select(0, place), out=scratch)
    return lower.add_(upper.bitwise_and_(number(0xFF)), alpha=1 << 16)


PLACE_BITS = 38


def ordered(random: Tensor, places: Tensor) -> Tensor:
    """Keys (int64) of which no two are equal: larger for a larger number, and of equal ones for the lower place.

    Below the number, which has 24 bits, stands the place from the end. Overwrites `places`.
    """
    return torch.add(places.neg_(), random, alpha=1 << PLACE_BITS)


def places_of(keys: Tensor) -> Tensor:
    """The places that `ordered` has put into these keys."""
    return torch.neg(keys).bitwise_and_((1 << PLACE_BITS) - 1)


@functools.cache
def _multiples_of_golden() -> Tensor:
    return torch.arange(1, GROUP + 1, dtype=torch.int32, device="cpu") * GOLDEN


@functools.cache
def _shifts() -> Tensor:
    return torch.arange(0, 8 * GROUP, 8, dtype=torch.int32, device="cpu")


def _bytes(x: Tensor) -> Tensor:
    """The bytes of int32 numbers, from the lowest to the highest of each."""
    if sys.byteorder == "little":
        return x.view(torch.uint8)
    return x.view(torch.uint8).view(-1, 4).flip(1).reshape(-1)
