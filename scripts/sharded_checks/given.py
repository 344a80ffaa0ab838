"""Runs whose gradients are given, on whole tensors and on what a layout makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from selective import SelectiveUpdate
from selective.kernels import use_backend

from .layouts import Bag, Layout, cut_like
from .optimizers import Make

Shapes = Sequence[tuple[int, ...]]


class Given:
    """Parameters, whole without a `layout`, and an optimizer over them.

    With several policies there is a set of parameters for each, in groups of one optimizer: what they send goes
    together, so that many cost little more time than one. A base alone has the policy None.
    """

    def __init__(
        self, base: Make, shapes: Shapes, device: torch.device, policies: Sequence[Any] = (None,),
        layout: Layout | None = None, both_ways: bool = True, bare: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        self.device, self.shapes = device, shapes
        bag = Bag(x.clone() for _ in policies for x in self._drawn(0))
        self.module: nn.Module = bag if layout is None else layout.cut_bag(bag, both_ways)
        groups = [{"params": self.params[i * len(shapes) : (i + 1) * len(shapes)]} for i in range(len(policies))]
        self.optimizer: Optimizer
        if bare:
            self.optimizer = base(groups)
        else:
            grouped = [{**group, "policy": policy} for group, policy in zip(groups, policies, strict=True)]
            self.optimizer = SelectiveUpdate(base(grouped), **options)

    @property
    def params(self) -> list[nn.Parameter]:
        return list(self.module.parameters())

    def _drawn(self, seed: int) -> list[Tensor]:
        values = torch.Generator().manual_seed(seed)
        return [torch.randn(shape, generator=values).to(self.device) for shape in self.shapes]

    def step(self, number: int, noise: float = 0.0, draw: int = 0) -> None:
        """Take one step with the gradients of that number, on a CPU by the reference on both sides.

        The CPU's kernels of whole tensors leave arithmetic to torch's fused optimizers, which round differently.
        `noise` moves each coordinate of the gradients by at most this share of it.
        """
        grads = self._drawn(1000 + number)
        for grad in grads:
            if grad.dim() > 1 and grad.shape[0] >= 20:
                grad[3 : grad.shape[0] // 2] = 0  # ties: as in an embedding, rows of tokens that are not in the batch
        if noise:
            values = torch.Generator().manual_seed(7 + draw + 10 * number)
            grads = [g * (1 + noise * (2 * torch.rand(g.shape, generator=values) - 1).to(g.device)) for g in grads]
        for index, p in enumerate(self.params):
            p.grad = cut_like(grads[index % len(grads)], p)
        with use_backend("reference" if self.device.type == "cpu" else "auto"):
            self.optimizer.step()
