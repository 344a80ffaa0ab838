"""Helpers for tests of training stacks: a small model, its data, the optimizers to try, the plain loop.

Every stack is compared with `train`, the usual loop, bit for bit: parameters and all optimizer state.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from selective import MGUP, ChainedOptimizer, Eigenbasis, RandomMask, SelectiveUpdate, Soap

CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "mgup": {"policy": MGUP()},
    "random": {"policy": RandomMask(), "seed": 7},
    "soap": {"preconditioner": Soap(refresh_every=2)},
    "mgup-eigenbasis": {"policy": MGUP(), "preconditioner": Eigenbasis(refresh_every=2)},
    "random-soap": {"policy": RandomMask(), "preconditioner": Soap(refresh_every=2)},
}
"""`SelectiveUpdate`'s options, with and without policy and preconditioner."""

BATCH, ROWS = 4, 64
LR = 0.01


def data() -> TensorDataset:
    """64 rows of the same numbers every time; batch k is rows 4k to 4k + 3."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(ROWS, 6, generator=generator)
    return TensorDataset(x, torch.tanh(x @ torch.randn(6, 2, generator=generator)))


def batch(step: int) -> tuple[Tensor, Tensor]:
    x, y = data().tensors
    at = step * BATCH % ROWS
    return x[at : at + BATCH], y[at : at + BATCH]


def net(seed: int = 0) -> nn.Sequential:
    """A net of two matrices and two vectors. Leaves the global generator as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


def loss_of(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step)
    return nn.functional.mse_loss(model(x), y)


def wrap(model: nn.Module, case: str, **base: Any) -> SelectiveUpdate:
    """The case's optimizer over AdamW."""
    return SelectiveUpdate(torch.optim.AdamW(model.parameters(), lr=LR, **base), **CASES[case])


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: Iterable[int],
    *,
    accumulate: int = 1,
    clip: float | None = None,
    schedule: Any = None,
) -> None:
    """The usual training loop. Step s takes the `accumulate` batches from s * accumulate on."""
    for step in steps:
        for part in range(accumulate):
            (loss_of(model, step * accumulate + part) / accumulate).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        optimizer.zero_grad()


def by_hand(case: str, steps: int, **how: Any) -> tuple[nn.Sequential, SelectiveUpdate]:
    """Model and optimizer after so many steps of the plain loop."""
    model = net()
    optimizer = wrap(model, case)
    train(model, optimizer, range(steps), **how)
    return model, optimizer


def plain(optimizer: Any) -> Any:
    """The optimizer inside of a stack's wrappers."""
    while not isinstance(optimizer, (SelectiveUpdate, ChainedOptimizer)):
        optimizer = optimizer.optimizer
    return optimizer


def differences(found: tuple[nn.Module, Any], expected: tuple[nn.Module, Any]) -> list[str]:
    """The names of the parameters, state entries and groups that differ between two pairs of model and optimizer."""
    (model, optimizer), (their_model, theirs) = found, expected
    names = [
        name
        for (name, p), q in zip(model.named_parameters(), their_model.parameters(), strict=True)
        if not torch.equal(p, q)
    ]
    ours, wanted = plain(optimizer).state_dict(), plain(theirs).state_dict()
    if ours["state"].keys() != wanted["state"].keys():
        return [*names, f"state of {sorted(ours['state'])}, expected {sorted(wanted['state'])}"]
    for index, entries in wanted["state"].items():
        mine = ours["state"][index]
        keys = mine.keys() ^ entries.keys()
        keys |= {k for k in mine.keys() & entries.keys() if not torch.equal(mine[k], entries[k])}
        names += [f"state[{index}][{key}]" for key in sorted(keys)]
    rates = [[group["lr"] for group in one["param_groups"]] for one in (ours, wanted)]
    return names if rates[0] == rates[1] else [*names, f"lr {rates[0]}, expected {rates[1]}"]


def assert_same(found: tuple[nn.Module, Any], expected: tuple[nn.Module, Any]) -> None:
    assert differences(found, expected) == []
