"""NormControl: matrices keep their norm, and their learning rate is relative to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from evidence.prototypes.stepper import Around, by_kind

EPS = 1e-12
many: Any = torch  # the home of the multi-tensor functions, for which torch declares no types


class NormControl(Around):
    """Moves each inner matrix by the rate times its norm, in the direction of the optimizer's update, norm unchanged.

        r = ‖W‖;  W' = W - lr · r · u / ‖u‖;  W = W' · r / ‖W'‖

    u is what the optimizer subtracts, whatever its scale. The matrices have no decay. One that is zero stays zero. The
    rule is "hyperball" (arXiv 2606.16899), read in other projects' code. Everything else is stepped as the optimizer
    does it. It reads and writes the matrices again, and keeps a copy of them during a step.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module, steps: int) -> None:
        super().__init__(optimizer)
        matrices = {id(p) for p in by_kind(model)["matrices"]}
        self.groups = [group for group in optimizer.param_groups if all(id(p) in matrices for p in group["params"])]
        for group in self.groups:
            group["weight_decay"] = 0.0

    @torch.no_grad()
    def step(self) -> None:
        before = [[p.clone() for p in group["params"]] for group in self.groups]
        self.optimizer.step()
        for group, old in zip(self.groups, before, strict=True):
            self._control(group["params"], old, group["lr"])

    def _control(self, weights: list[Tensor], old: list[Tensor], lr: float) -> None:
        moved = many._foreach_sub(old, weights)
        norms, lengths = many._foreach_norm(old), many._foreach_norm(moved)
        many._foreach_clamp_min_(lengths, EPS)
        many._foreach_mul_(moved, many._foreach_div(norms, lengths))
        many._foreach_copy_(weights, many._foreach_sub(old, moved, alpha=lr))
        after = many._foreach_norm(weights)
        many._foreach_clamp_min_(after, EPS)
        many._foreach_mul_(weights, many._foreach_div(norms, after))
