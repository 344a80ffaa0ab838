"""The random numbers of a chunk, by the definition's hash in fewer operations (`kernels/reference/random.py`).

The hash xors a key, then runs "x ^= x >> 16, x *= A, x ^= x >> 15, x *= B, x ^= x >> 16", and does both again with
another key. Written as operations on whole chunks that is 27; 12 of them are enough, for three reasons:

- Indices of one block of 65,536 have the same upper half, so that the first key and the first shift are one xor of the
  lower half with one constant.
- The last shift of the first round and the first one of the second cancel, but for the key between them:
  y = x ^ (x >> 16) ^ k, and y ^ (y >> 16) = x ^ k ^ (k >> 16), as a shift by 16 leaves the upper half alone.
- The last shift leaves the upper half alone as well. So what a comparison needs first, the number's upper bits, is
  there before it (`upper`); only those near a limit are finished (`finish_`).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..reference.random import A, B, keys, signed32
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
    """index ^ key, and that ^ (that >> 16), for the 32-bit indices from `start` on."""
    done, count = 0, x.numel()
    while done < count:
        upper, lower = (start + done) >> 16, (start + done) & (BLOCK - 1)
        take = min(count - done, BLOCK - lower)
        high = (upper ^ (key >> 16)) & 0xFFFF
        constant = signed32(high << 16 | (high ^ key & 0xFFFF))
        torch.bitwise_xor(_lower_halves()[lower : lower + take], constant, out=x[done : done + take])
        done += take


def finish_(x: Tensor) -> Tensor:
    """From hashes before the last shift to the 24-bit numbers, in place. Overwrites the buffer "shifted"."""
    scratch = torch.bitwise_right_shift(x, number(24), out=buffer("shifted", x.numel(), torch.int32))
    scratch.bitwise_and_(number(0xFF))
    return x.bitwise_right_shift_(number(8)).bitwise_and_(number(0xFFFFFF)).bitwise_xor_(scratch)


def upper(x: Tensor, out: Tensor) -> Tensor:
    """The upper 8 of the 24 bits, as uint8, from hashes before the last shift. Overwrites the buffer "shifted"."""
    return out.copy_(torch.bitwise_right_shift(x, number(24), out=buffer("shifted", x.numel(), torch.int32)))
