"""The coordinates of a chunk that decoupled decay reaches, and the chunk's new parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import Decay, refuse_kind
from .chunks import buffer


def decaying(decay: Decay, minus_update: Tensor, masked: Tensor, grad: Tensor, origin: Tensor, climbs: bool) -> Tensor:
    """True where the factor of decay reaches a chunk, in a buffer of this thread.

    `masked` is -mask u, `grad` the gradient as selections read it, `origin` the parameter before the step, all of the
    compute dtype. `climbs`: the learning rate is negative. Raises a ValueError for a kind that the CPU has no code for.
    """
    if decay.kind != "cautious":
        refuse_kind("the CPU", "decay", decay.kind)
    count, dtype = origin.numel(), origin.dtype
    if decay.of == "gradient":
        direction = grad
    else:
        direction = masked if decay.of == "masked" else minus_update
        if not climbs:
            direction = torch.neg(direction, out=buffer("direction", count, dtype))
    agrees = buffer("agrees", count, torch.bool)
    torch.eq(torch.copysign(direction, origin, out=buffer("products", count, dtype)), direction, out=agrees)
    if decay.strict:
        agrees.logical_and_(torch.ne(direction, 0, out=buffer("moves", count, torch.bool)))
    return agrees


def decayed_where(decays: Tensor, masked: Tensor, origin: Tensor, factor: float, out: Tensor) -> Tensor:
    """Write `factor origin + masked` where `decays`, else `origin + masked`, with the bits that either has alone.

    It overwrites the buffers that `decaying` has used for numbers.
    """
    count, dtype = origin.numel(), origin.dtype
    decayed = torch.add(masked, origin, alpha=factor, out=buffer("products", count, dtype))
    undecayed = torch.add(masked, origin, out=buffer("direction", count, dtype))
    return torch.where(decays, decayed, undecayed, out=out)
