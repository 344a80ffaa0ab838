"""The random numbers of a chunk: the hashes of `kernels/reference/random.py` in fewer operations.

The hash xors a key, then runs "x ^= x >> 16, x *= A, x ^= x >> 15, x *= B, x ^= x >> 16", and does both again with
another key. Written as operations on whole chunks that is 27; 12 of them are enough, for three reasons:

- The indices of one block of 65,536 have the same upper half, so that the first key and the first shift are one xor of
  the lower half with one constant.
- The last shift of the first round and the first shift of the second cancel, except for the key between them:
  y = x ^ (x >> 16) ^ k, and y ^ (y >> 16) = x ^ k ^ (k >> 16), as a shift by 16 leaves the upper half alone.
- The last shift leaves the upper half alone as well, so that it costs nothing where only upper bits are wanted.

A matched control has numbers of another form (`Ranking`): a quarter of the hashes, and 3 operations more for each.
Those of several tensors are formed together, in rows whose keys differ.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference.random import GOLDEN, GROUP, A, B, keys, signed32
from ..spec import Draw
from .chunks import buffer

BLOCK = 1 << 16
BLOCKS = 16  # whose constants are kept
ROW = 1_024  # elements of a control's row, all of one tensor: as long as a broadcast number costs nothing
GROUPS = ROW // GROUP  # of a row
SAME_KEYS = GROUP << 32  # elements of a tensor; so many have the same keys


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


def unfinished(draw: Draw, address: int, start: int, count: int) -> Tensor:
    """The hashes of `count` elements from `start` on, before the last shift: int32, in a buffer of this thread."""
    x, scratch = buffer("bits", count, torch.int32), buffer("shifted", count, torch.int32)
    keyed, done = [], 0
    while done < count:  # the keys change every 2^32 elements
        high, low = start + done >> 32, start + done & 0xFFFFFFFF
        part = x[done : min(count, done + (1 << 32) - low)]
        first, second = keys(draw, address, high)
        _first_xor(part, low, first)
        keyed.append((part, second))
        done += part.numel()
    _mix_(x, scratch)
    for part, second in keyed:
        part.bitwise_xor_(_between(second))
    _mix_(x, scratch)
    return x


def _between(second: int) -> int:
    """The xor between the two rounds."""
    return signed32(second ^ ((second & 0xFFFFFFFF) >> 16))


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


Part = tuple[int, int, int]  # the address of a tensor, the first of some of its elements, and how many rows those are


def owners_of(parts: Sequence[Part]) -> Tensor:
    """The number of the part that each row is of."""
    return torch.repeat_interleave(torch.tensor([rows for _, _, rows in parts], device="cpu"))


def of_rows(values: Sequence[int], owners: Tensor, dtype: torch.dtype) -> Tensor:
    """A column that has each row's number, given those of the parts. Of one part it is one number, for all rows."""
    numbers = torch.tensor(values, dtype=dtype, device="cpu")
    return (numbers if len(values) == 1 else numbers.index_select(0, owners)).view(-1, 1)


class Ranking:
    """The numbers that matched controls rank (`ranking_bits`), of parts of tensors: upper 8 bits, and hashes.

    A part has whole rows, and begins with one. It does not cross a multiple of `SAME_KEYS`. The operations are on all
    parts at once, because each takes 10 us or more before it begins. All is in buffers of this thread, until the next.
    """

    def __init__(self, draw: Draw, parts: Sequence[Part], owners: Tensor) -> None:
        rows = sum(rows for _, _, rows in parts)
        x, scratch = (buffer(name, rows * GROUPS, torch.int32) for name in ("bits", "shifted"))
        table = x.view(rows, GROUPS)
        first, between = _columns(draw, parts, owners)
        torch.bitwise_xor(first, _lower_halves()[:GROUPS], out=table)
        _mix_(x, scratch)
        table.bitwise_xor_(between)
        _mix_(x, scratch)
        torch.bitwise_right_shift(x, number(16), out=scratch)
        self.hashes = x.bitwise_xor_(scratch.bitwise_and_(number(0xFFFF)))
        self.upper = _bytes(self.hashes)  # uint8, one for each element
        self.spare = scratch.view(torch.uint8)  # memory for as many marks: it is in the cache, and done with

    def hashes_at(self, places: Tensor) -> Tensor:
        """The groups' hashes (int32) of elements at these places among all parts, for `ranking_at`."""
        return self.hashes.index_select(0, places.bitwise_right_shift(2))


def _columns(draw: Draw, parts: Sequence[Part], owners: Tensor) -> tuple[Tensor, Tensor]:
    """Two columns for xors: with the place of a group in its row, and between the rounds.

    The first has y ^ (y >> 16), where y is the index of the row's first group, xor-ed with the first key.
    """
    offsets, firsts, betweens, done = [], [], [], 0
    for address, start, rows in parts:
        first, second = keys(draw, address, start // SAME_KEYS)
        offsets.append(start % SAME_KEYS // ROW - done)
        firsts.append(first)
        betweens.append(_between(second))
        done += rows
    offset, key, between = (of_rows(values, owners, torch.int32) for values in (offsets, firsts, betweens))
    y = _lower_halves()[:done].view(-1, 1).add(offset)
    y.mul_(GROUPS).bitwise_xor_(key)
    return y.bitwise_xor_(torch.bitwise_right_shift(y, number(16)).bitwise_and_(number(0xFFFF))), between


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
