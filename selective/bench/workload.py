"""The parameters and gradients that every contender steps, and an optimizer over them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from selective.bench.shapes import Shape

SHIFTS = 1_000_003  # a tensor's numbers are a window of one long row of numbers, at one of so many places
AWAY_FROM_ZERO = 0.05  # in float16, whose smallest number is 6e-8, a thousandth of a small gradient's square vanishes


class Workload:
    """Random parameters and gradients, made on their device. The same seed gives the same ones.

    Args:
        shapes: the parameters' shapes.
        untouched: the share of the first rows that has no gradient, by the parameter's place. So it is with the rows
            of an embedding whose tokens are not in the batch.
        unaligned: the shapes of further parameters whose storage (and their gradients') begins one element into an
            allocation.
        dtype: the dtype of both.
    """

    def __init__(
        self,
        shapes: Sequence[Shape],
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        unaligned: Sequence[Shape] = (),
        untouched: Mapping[int, float] | None = None,
        seed: int = 0,
    ) -> None:
        self.seed, self.untouched = seed, dict(untouched or {})
        places = [(shape, 0) for shape in shapes] + [(shape, 1) for shape in unaligned]
        self.params = [Parameter(_empty(shape, offset, device, dtype)) for shape, offset in places]
        self.grads = [_empty(shape, offset, device, dtype) for shape, offset in places]
        generator = torch.Generator(device).manual_seed(seed)
        length = max((p.numel() for p in self.params), default=0) + min(SHIFTS, self.elements + 1)
        self._noise = torch.randn(length, generator=generator, device=device, dtype=dtype)
        if dtype == torch.float16:
            self._noise += AWAY_FROM_ZERO * self._noise.sign()
        self.refill()

    @property
    def elements(self) -> int:
        return sum(p.numel() for p in self.params)

    def refill(self) -> None:
        """Restore the first parameters and gradients, and set every `.grad`."""
        self._shift = random.Random(self.seed)
        with torch.no_grad():
            for p in self.params:
                self._draw(p)
                p.mul_(0.02)
        self.fresh_gradients()
        self.hand_out()

    def fresh_gradients(self) -> None:
        """Draw new gradients in place, because under constant ones momentum and gradient would come to agree."""
        for place, g in enumerate(self.grads):
            self._draw(g)
            if place in self.untouched:
                g[: int(self.untouched[place] * len(g))] = 0

    def hand_out(self) -> None:
        """Set every `.grad` (some optimizers clear it)."""
        for p, g in zip(self.params, self.grads, strict=True):
            p.grad = g

    def _draw(self, target: Tensor) -> None:
        begin = self._shift.randrange(self._noise.numel() - target.numel() + 1)
        target.view(-1).copy_(self._noise[begin : begin + target.numel()])


def _empty(shape: Shape, offset: int, device: str, dtype: torch.dtype) -> Tensor:
    return torch.empty(prod(shape) + offset, device=device, dtype=dtype)[offset:].view(shape)


class Stepping:
    """An optimizer over a workload. Where its step clears the gradients, `prepare()` sets them again.

    Without that the second step would find none, and an empty step would be timed.
    """

    def __init__(self, optimizer: Optimizer, workload: Workload) -> None:
        self.optimizer, self.workload = optimizer, workload
        self.clears_grad = False

    def prepare(self) -> None:
        """Prepare a step. The time of this is not part of the step."""
        if self.clears_grad:
            self.workload.hand_out()

    def step(self) -> None:
        self.optimizer.step()

    def warm_up(self, steps: int) -> None:
        """Take steps on new gradients, so that state and buffers are made and kernels compiled."""
        for _ in range(steps):
            self.workload.fresh_gradients()
            self.prepare()
            self.step()
            self.clears_grad = self.clears_grad or any(p.grad is None for p in self.workload.params)
