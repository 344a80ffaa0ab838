"""The one rounding of a step: to nearest, or stochastically by address.

Stochastic rounding takes, of the two neighbours of x in the parameter's dtype, the further one with the probability
|x - nearest| / |further - nearest|. So the expected value is x, and an update far below the spacing is not lost but
taken now and then. The random number is that of the element's address, in a stream of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..shard import Shard
from ..spec import Draw
from .random import STREAM_ROUNDING, uniform_bits
from .shard_indices import element_bits

LOW = (torch.bfloat16, torch.float16)


def store(
    param: Tensor, exact: Tensor, draw: Draw | None, address: int, offset: int = 0, shard: Shard | None = None
) -> None:
    """Round `exact` (float32 or float64, shaped like `param`) and write it to `param`.

    The random numbers are those of the elements from `offset` on; those of a `shard` are of the places in the whole.
    """
    if draw is None or not draw.stochastic or param.dtype not in LOW:
        param.copy_(exact)
        return
    if shard is None:
        numbers = uniform_bits(draw, address, exact.numel(), offset=offset, device=exact.device, stream=STREAM_ROUNDING)
    else:
        numbers = element_bits(shard, draw, address, exact.device, STREAM_ROUNDING)
    param.copy_(_stochastic(exact, param.dtype, numbers))


def _stochastic(exact: Tensor, dtype: torch.dtype, numbers: Tensor) -> Tensor:
    nearest = exact.to(dtype)
    error = exact - nearest.to(exact.dtype)
    # Numbers of one sign are ordered as their bits are: the neighbour away from zero is one more, towards it one less.
    bits = nearest.view(torch.int16)
    outwards = torch.where((error > 0) == (nearest > 0), 1, -1).to(torch.int16)
    further = (bits + outwards).view(dtype)
    smallest = torch.full_like(nearest, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)
    further = torch.where(nearest == 0, torch.copysign(smallest, error.to(torch.float32).to(dtype)), further)
    gap = (further.to(exact.dtype) - nearest.to(exact.dtype)).abs()
    threshold = error.abs() / torch.where(gap > 0, gap, 1.0)
    take = (numbers.reshape(exact.shape).to(exact.dtype) + 0.5) * 2.0**-24 < threshold
    movable = torch.isfinite(further) & torch.isfinite(exact) & torch.isfinite(nearest) & (error != 0)
    return torch.where(take & movable, further, nearest)
