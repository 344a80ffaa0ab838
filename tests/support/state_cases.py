"""Optimizers in every capture and space, whose state and parameters somebody changes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective import CautiousMGUP, Magma, RandomMask, SelectiveUpdate, Soap

ONES = CautiousMGUP(alpha=1.0, gamma=1.0)  # a mask of 1 everywhere
STILL = Soap(start_step=10_000, skip_first_step=False)  # a basis that stays the identity


class Case(NamedTuple):
    """A capture, whether it is rotated, and whether the wrapper keeps a momentum of its own."""

    capture: Any
    rotated: bool
    own: bool

    def __str__(self) -> str:
        return f"{self.capture}{'-rotated' * self.rotated}{'-own' * self.own}"


def _cases() -> Iterator[Case]:
    for capture in ("fused", "scratch", "delta"):
        for rotated in (False, True):
            yield Case(capture, rotated, False)
    yield Case("scratch", False, True)  # fused steps keep no momentum of ours
    yield Case("delta", True, True)


CASES = list(_cases())


def numbers(shape: Any, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters(rows: int = 6) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(numbers((rows, 4), 1)), torch.nn.Parameter(numbers((rows,), 2))]


def base_of(params: Any) -> Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)


def wrapped(case: Case, params: Any, policy: Any = None, rotation: Any = None) -> SelectiveUpdate:
    """A case's wrapper, with a random mask or a policy that keeps state. Rotated ones refresh every second step."""
    rotation = (rotation or Soap(refresh_every=2)) if case.rotated else None
    policy = policy or (Magma() if case.own else RandomMask())
    beta = 0.9 if case.own else None
    return SelectiveUpdate(
        base_of(params), policy=policy, preconditioner=rotation, capture=case.capture, momentum_beta=beta, seed=3
    )


def pair(case: Case, params: Any = parameters) -> list[Optimizer]:
    """The base alone, and the base wrapped under a mask of 1, in a space that is the parameter's own."""
    return [base_of(params()), wrapped(case, params(), ONES, STILL)]


def members(opt: Optimizer) -> list[torch.nn.Parameter]:
    return [p for group in opt.param_groups for p in group["params"]]


def train(opt: Optimizer, begin: int, end: int) -> None:
    for step in range(begin, end):
        for index, p in enumerate(members(opt)):
            p.grad = numbers(p.shape, 100 * step + index)
        opt.step()
        opt.zero_grad()


def values(opt: Optimizer) -> list[Tensor]:
    return [p.detach().clone() for p in members(opt)]


def assert_same(a: Any, b: Any) -> None:
    """Require the same bits."""
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def assert_close(a: Any, b: Any) -> None:
    """Require equality up to rounding: some twenty steps each round a float32 sum below 4, by at most 2^-22."""
    torch.testing.assert_close(a, b, rtol=0, atol=20 * 2**-22)
