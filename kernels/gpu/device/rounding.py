"""The one rounding of a step on the device: as `kernels/reference/rounding.py`, bit for bit.

Note [bfloat16 in the interpreter]: from float32 to bfloat16 Triton's interpreter cuts off the lower bits instead of
rounding (seen in 3.6 to 3.9), so there the conversions are done on the bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton import knobs

from .random import random_bits

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))
# True where kernels are compiled for NVIDIA's GPUs; False takes Triton's own operations there, too.
IN_PTX = tl.constexpr(not INTERPRETED and torch.version.hip is None and getattr(torch.version, "xpu", None) is None)


@triton.jit
def widen(x):
    """`x` as float32, exactly.

    On NVIDIA's GPUs a pair of bfloat16 takes two instructions: Triton's own conversion takes a third, to part them.
    """
    if INTERPRETED and x.dtype == tl.bfloat16:
        wide = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif IN_PTX and x.dtype == tl.bfloat16:
        wide = tl.inline_asm_elementwise("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x],
                                         dtype=tl.float32, is_pure=True, pack=2)  # fmt: skip
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """`x` (float32) rounded to DTYPE: to the nearest, ties to even."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x == x, rounded, 0x7FC0)
        low = rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        low = x.to(DTYPE)
    return low


@triton.jit
def store(exact, offs, keys, CFG: tl.constexpr):
    """`exact` (float32) rounded to the parameter's dtype, to nearest or stochastically (`CFG.stochastic`).

    `keys` has the two keys of the rounding stream in its columns 4 and 5.
    """
    nearest = narrow(exact, CFG.param)
    if CFG.stochastic and (CFG.param == tl.bfloat16 or CFG.param == tl.float16):
        first = tl.load(keys + 4).to(tl.uint32, bitcast=True)
        second = tl.load(keys + 5).to(tl.uint32, bitcast=True)
        numbers = random_bits(offs.to(tl.uint32), first, second).to(tl.float32)
        nearest = _stochastic(exact, nearest, numbers, CFG)
    return nearest


@triton.jit
def _stochastic(exact, nearest, numbers, CFG: tl.constexpr):
    near = widen(nearest)
    error = exact - near
    # Numbers of one sign are ordered as their bits are: the neighbour away from zero is one more, towards it one less.
    outwards = tl.where((error > 0) == (near > 0), 1, -1).to(tl.int16)
    further = (nearest.to(tl.int16, bitcast=True) + outwards).to(CFG.param, bitcast=True)
    # from zero, the smallest number there is: bits 1, with the sign of the error
    from_zero = tl.where(error < 0, -32767, 1).to(tl.int16).to(CFG.param, bitcast=True)
    further = tl.where(near == 0, from_zero, further)
    far = widen(further)
    gap = tl.abs(far - near)
    threshold = tl.div_rn(tl.abs(error), tl.where(gap > 0, gap, 1.0))
    take = (numbers + 0.5) * 5.9604644775390625e-08 < threshold  # 2^-24
    large = 3.4028234663852886e38
    movable = (tl.abs(far) <= large) & (tl.abs(exact) <= large) & (tl.abs(near) <= large) & (error != 0)
    return tl.where(take & movable, further, nearest)
