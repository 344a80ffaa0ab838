"""Muon of torch and around it: parameters, gradients and policies of the tests of Muon's rule."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Muon

from selective import Dense, Policy, SelectiveUpdate

SHAPES = ((12, 8), (8, 12), (12, 8), (33, 7), (6, 6), (1, 9), (9, 1), (8, 12))
RATE, DECAY = 0.02, 0.1
Params = list[torch.nn.Parameter]


class MuonOnes(Policy):
    """Everything, by the kernels."""

    def parts(self):
        return Dense().parts()


class MuonOnesInPython(Policy):
    """Everything, by code of its own."""

    def mask(self, view):
        return torch.ones_like(view.update)


def make_params(dtype: torch.dtype = torch.float32, shapes: Any = SHAPES) -> Params:
    make = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=make).to(dtype)) for shape in shapes]


def give_grads(params: Params, step: int) -> None:
    for index, p in enumerate(params):
        make = torch.Generator().manual_seed(100 * (step + 1) + index)
        p.grad = torch.randn(p.shape, generator=make).to(p.dtype)


def bare(params: Params, **options: Any) -> Muon:
    return Muon(params, **{"lr": RATE, "weight_decay": DECAY, **options})


def wrapped(params: Params, policy: Any = None, wrap: Any = None, **options: Any) -> SelectiveUpdate:
    return SelectiveUpdate(bare(params, **options), policy=MuonOnes() if policy is None else policy, **(wrap or {}))


def way_of(optimizer: SelectiveUpdate) -> str:
    return optimizer.groups.plans[0].capture.way


def reason_of(optimizer: SelectiveUpdate) -> str:
    return optimizer.groups.plans[0].capture.reason


def momenta(optimizer: Any) -> list[torch.Tensor]:
    states = optimizer.base.state if isinstance(optimizer, SelectiveUpdate) else optimizer.state
    return [states[p]["momentum_buffer"] for group in optimizer.param_groups for p in group["params"]]


def same(a: Any, b: Any) -> None:
    torch.testing.assert_close(list(a), list(b), rtol=0, atol=0)
