"""Optimizers whose rotated parameters are stepped in stacks, and the same ones stepped bucket by bucket."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from selective import Cautious, Eigenbasis, SelectiveUpdate
from selective.capture.rotated_fused import RotatedFusedJob
from selective.state import kept_bases

SHAPES = ((6, 4), (6, 4), (5,), (4, 6), (5, 5), (6, 4), (4, 6))
BASIS = "selective/basis/"


def numbers(shape: Any, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(
    space: Any = None,
    policy: Any = None,
    make: Any = None,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> SelectiveUpdate:
    """An optimizer with two groups of these shapes. Averages get a few gradients, so that no basis is arbitrary."""
    params = [torch.nn.Parameter(numbers(shape, i).to(dtype)) for i, shape in enumerate(shapes)]
    groups = [{"params": params[:5]}, {"params": params[5:]}]
    base = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1) if make is None else make(groups)
    space = Eigenbasis(start_step=3, refresh_every=2, stagger=False) if space is None else space
    return SelectiveUpdate(base, policy=policy or Cautious(), preconditioner=space, **options)


def members(optimizer: SelectiveUpdate) -> list[torch.nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def step(optimizer: SelectiveUpdate, number: int, without: Sequence[int] = ()) -> None:
    for index, p in enumerate(members(optimizer)):
        p.grad = None if index in without else numbers(p.shape, 100 * number + index).to(p.dtype)
    optimizer.step()


def in_stacks(optimizer: SelectiveUpdate) -> list[bool]:
    """For each group, True if its last step was in stacks."""
    return [plan.kept_step._step is not None for plan in optimizer.groups.plans]


def bucket_by_bucket(patch: pytest.MonkeyPatch) -> None:
    """Let no parameter be stepped in stacks."""
    patch.setattr(RotatedFusedJob, "steps_in_stacks", lambda self: False)
    patch.setattr(kept_bases, "_can_be_stacked", lambda rotation, members: False)


def both(run: Callable[[], Any]) -> tuple[Any, Any]:
    """Return the results of `run` with parameters that are stepped in stacks, and with ones that are not."""
    with pytest.MonkeyPatch.context() as patch:
        bucket_by_bucket(patch)
        plain = run()
    return run(), plain
