"""The coordinates of one whole tensor that decoupled decay reaches."""

from __future__ import annotations

import torch
from torch import Tensor

from ..shard import Shard
from ..spec import Decay, Draw, GivenRule, Item, Rule, refuse_kind
from .random import STREAM_DECAY, uniform_bits
from .rules import compute_dtype, rate_of, turned
from .shard_indices import element_bits


def decaying(decay: Decay, item: Item, rule: Rule, update: Tensor, mask: Tensor, grad: Tensor) -> Tensor:
    """True at the coordinates that the factor of decay reaches: bool, shaped like the parameter.

    Args:
        update: u as `advance` returns it.
        mask: the multiplier of each coordinate, broadcasting to the update; read by `of="masked"`.
        grad: the gradient as selections read it (`as_seen`); read by `of="gradient"`.

    Raises a ValueError for a kind that the reference has no code for. Call it before the parameter is written.
    """
    if decay.kind != "cautious":
        refuse_kind("the reference", "decay", decay.kind)
    direction: Tensor | None = grad
    if decay.of != "gradient":
        direction = turned(mask.to(update.dtype) * update if decay.of == "masked" else update, rate_of(rule))
    assert direction is not None
    start = (item.state["start"] if isinstance(rule, GivenRule) else item.param).to(compute_dtype(item.param))
    agrees = direction == torch.copysign(direction, start)
    return agrees & (direction != 0) if decay.strict else agrees


def drawn_like(decays: Tensor, count: Tensor, numel: int, draw: Draw, address: int, shard: Shard | None) -> Tensor:
    """True at random coordinates, each with the probability `count / numel`: bool, shaped like `decays`.

    The numbers are those of the elements' address, in a stream of their own, and on a `shard` those of the places in
    the whole. `count` is 0-d, the number that are true in the whole tensor of `numel` elements; it is not read.
    """
    if shard is None:
        numbers = uniform_bits(draw, address, decays.numel(), device=decays.device, stream=STREAM_DECAY)
    else:
        numbers = element_bits(shard, draw, address, decays.device, STREAM_DECAY)
    return (numbers.reshape(decays.shape).to(torch.float64) * numel) < count.to(torch.float64) * 2**24
