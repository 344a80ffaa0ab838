"""Sums over processes whose order can't matter: float64 numbers, added as integers.

A number is cut into digits of 16 bits at fixed places, 2^-320 to 2^304. The digits are added as int32 and put together
again. Adding integers is exact, so that every process gets the same bits, also replicas whose backend adds in another
order, and sums can travel with counts in one collective. The part of a number below 2^-320 is lost; infinity and NaN
make a sum NaN. 16,383 processes may add before a digit could overflow.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOWEST = -320  # exponent of the lowest digit's unit
DIGITS = 39  # of 16 bits
WIDTH = DIGITS + 1  # int32 numbers for each sum; the last counts the numbers that are not finite
_LARGEST = 2.0**303


def digits(x: Tensor) -> Tensor:
    """Cut float64 numbers [...] into digits: int32 [..., WIDTH]."""
    finite = x.abs() < _LARGEST  # false for NaN
    x = torch.where(finite, x, 0.0)
    mantissa, exponent = torch.frexp(x)
    whole = (mantissa * 2.0**53).to(torch.int64)  # x = whole * 2^(exponent - 53), exactly
    sign, whole = whole.sign(), whole.abs()
    place = exponent.to(torch.int64) - 53 - LOWEST
    table = torch.zeros(*x.shape, DIGITS + 8, dtype=torch.int64, device=x.device)
    for shift in (0, 27):  # in two halves: shifted by up to 15 bits each stays within 64
        half = (whole >> shift) & ((1 << 27) - 1)
        at = place + shift
        moved = half << (at % 16)
        for step in range(3):
            digit = ((moved >> (16 * step)) & 0xFFFF) * sign
            index = (at // 16 + step).clamp(min=-4, max=DIGITS + 3) + 4  # 4 on either side are cut off below
            table.scatter_add_(-1, index[..., None], digit[..., None])
    table = table[..., 4 : 4 + WIDTH]
    table[..., DIGITS] = (~finite).to(torch.int64)
    return table.to(torch.int32)


def number(summed: Tensor) -> Tensor:
    """Put summed digits, int32 [..., WIDTH], together to float64 [...].

    The same bits on every process, and as near to the exact sum as adding in float64 is.
    """
    units = torch.arange(DIGITS, dtype=torch.float64, device=summed.device) * 16 + LOWEST
    total = (summed[..., :DIGITS].to(torch.float64) * torch.exp2(units)).sum(-1)
    return torch.where(summed[..., DIGITS] > 0, torch.nan, total)
