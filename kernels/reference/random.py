"""Random numbers by address: a hash of (seed, step, address, index), and the stratified sample drawn with it.

The same address gives the same number on every device, in every chunking and after a resume. torch's generators are
never touched. All operations are on integers of 32 bits, so that a GPU kernel computes the same bits.

The hash: x = index mod 2^32, then twice "xor a key, finalise". The finaliser is Chris Wellons' `lowbias32`
(https://nullprogram.com/blog/2018/07/31/, public domain); keys come from splitmix64 (Steele, Lea, Flood 2014) chained
over (seed, step, address, stream, index >> 32). Two keyed rounds, because with one the streams of two addresses are
the same sequence read in another order.

A matched control ranks numbers of another form (`ranking_bits`). Four neighbours share a hash for their upper 8 bits,
which decide almost all of them, so that a CPU forms a quarter of the hashes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import Draw

SAMPLE_SIZE = 65_536  # elements of a tensor that a sampled estimate looks at; smaller tensors are taken whole
SAMPLE_RUN = 8  # neighbours taken together: half a cache line of float32
# Separate numbers for separate uses of one address.
STREAM_MASK, STREAM_SAMPLE, STREAM_ROUNDING, STREAM_DECAY = 0, 1, 2, 3

_MASK64 = (1 << 64) - 1


def _splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def signed32(x: int) -> int:
    """The int32 with the same 32 bits: torch takes scalars of int32 tensors in that range only."""
    x &= 0xFFFFFFFF
    return x - (1 << 32) if x >= 1 << 31 else x


A, B = 0x7FEB352D, signed32(0x846CA68B)  # lowbias32's factors


def keys(draw: Draw, address: int, high: int = 0, stream: int = STREAM_MASK) -> tuple[int, int]:
    """The two 32-bit keys (as int32 values) for the indices whose upper half is `high`."""
    state = 0
    for word in (draw.seed, draw.step, address, stream, high):
        state = _splitmix64(state ^ (word & _MASK64))
    return signed32(state >> 32), signed32(state)


def _finalise_(x: Tensor, scratch: Tensor) -> None:
    """lowbias32 in place on int32. torch shifts arithmetically, so the sign bits that come in are masked off."""
    for shift, factor in ((16, A), (15, B), (16, None)):
        torch.bitwise_right_shift(x, shift, out=scratch)
        scratch.bitwise_and_((1 << (32 - shift)) - 1)
        x.bitwise_xor_(scratch)
        if factor is not None:
            x.mul_(factor)


def _keyed_(x: Tensor, key: tuple[int, int], scratch: Tensor) -> Tensor:
    """Turn int32 indices into their hashes of 32 bits, in place; `scratch` is overwritten."""
    for part in key:
        x.bitwise_xor_(part)
        _finalise_(x, scratch)
    return x


def hash_(x: Tensor, key: tuple[int, int], scratch: Tensor) -> Tensor:
    """Turn int32 indices into their 24-bit numbers, in place; `scratch` is overwritten."""
    return _keyed_(x, key, scratch).bitwise_right_shift_(8).bitwise_and_((1 << 24) - 1)


def uniform_bits(
    draw: Draw,
    address: int,
    count: int,
    *,
    offset: int = 0,
    device: torch.device | str = "cpu",
    stream: int = STREAM_MASK,
) -> Tensor:
    """The random integers of `count` elements, from element `offset` on: in [0, 2^24), int32, 1-d.

    An element that is selected where its integer is below `round(q * 2**24)` is selected with probability q.
    """
    pieces = []
    while count > 0:
        take = min(count, (1 << 32) - (offset & 0xFFFFFFFF))
        x = torch.arange(offset & 0xFFFFFFFF, (offset & 0xFFFFFFFF) + take, device=device).to(torch.int32)
        pieces.append(hash_(x, keys(draw, address, offset >> 32, stream), torch.empty_like(x)))
        offset, count = offset + take, count - take
    if not pieces:
        return torch.zeros(0, dtype=torch.int32, device=device)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


GROUP = 4  # neighbours whose upper bits are the bytes of one hash
GOLDEN = signed32(0x9E3779B9)  # 2^32 over the golden ratio: its multiples differ in all bits


def ranking_bits(draw: Draw, address: int, count: int, *, device: torch.device | str = "cpu") -> Tensor:
    """The random integers that a matched control ranks, of the elements of a tensor: in [0, 2^24), int32, 1-d.

    The hash h of a group, index // 4, has a byte for each of its four elements, the lowest for the first. That byte is
    the upper 8 bits of the element's number. The lower 16 are the upper half of `lowbias32` of h, after it was xor-ed
    with `GOLDEN` times 1, 2, 3 or 4.
    """
    groups = torch.arange(-(-count // GROUP), device=device)
    hashes = torch.empty_like(groups, dtype=torch.int32)
    for high in range(int(groups.numel() - 1 >> 32) + 1):
        part = slice(high << 32, (high + 1) << 32)
        x = (groups[part] & 0xFFFFFFFF).to(torch.int32)
        hashes[part] = _keyed_(x, keys(draw, address, high), torch.empty_like(x))
    place = torch.arange(GROUP, dtype=torch.int32, device=device).expand(hashes.numel(), GROUP).reshape(-1)[:count]
    return numbers_of_group(hashes.repeat_interleave(GROUP)[:count], place)


def numbers_of_group(hashes: Tensor, place: Tensor) -> Tensor:
    """The 24-bit numbers of elements at these places (0 to 3, int32) of groups with these hashes (int32)."""
    upper = torch.bitwise_right_shift(hashes, place * 8).bitwise_and_(0xFF)
    lower = hashes ^ (place + 1) * GOLDEN
    _finalise_(lower, torch.empty_like(lower))
    return upper.bitwise_left_shift_(16).bitwise_or_(lower.bitwise_right_shift_(16).bitwise_and_(0xFFFF))


def uniform(draw: Draw, address: int, count: int, *, offset: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """The random numbers of `count` elements, from element `offset` on: float32, 1-d, in [0, 1).

    They are `uniform_bits` divided by 2^24, exactly.
    """
    return uniform_bits(draw, address, count, offset=offset, device=device).to(torch.float32) * 2.0**-24


def sample_positions(draw: Draw, address: int, numel: int, device: torch.device | str) -> Tensor | None:
    """The flat indices (int64, ascending) of a tensor's sample; None if the sample is the whole tensor.

    It is one run of `SAMPLE_RUN` neighbours at a drawn place in each of `SAMPLE_SIZE / SAMPLE_RUN` equal strata.
    """
    if numel <= SAMPLE_SIZE:
        return None
    runs = SAMPLE_SIZE // SAMPLE_RUN
    edges = torch.arange(runs + 1, device=device) * numel // runs
    room = edges[1:] - edges[:-1] - (SAMPLE_RUN - 1)  # at least 1: a stratum has SAMPLE_RUN elements or more
    bits = uniform_bits(draw, address, runs, device=device, stream=STREAM_SAMPLE).to(torch.int64)
    starts = edges[:-1] + (bits * room >> 24)
    return (starts[:, None] + torch.arange(SAMPLE_RUN, device=device)).reshape(-1)
