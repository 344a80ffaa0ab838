"""Decisions that all ranks have to make alike: skipped steps, errors, refusals before anything has moved."""

from __future__ import annotations

import pytest
import torch
from sharded_runs import Run, adamw, sgd
from sharded_world import World
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from selective import MGUP, Cautious, SelectiveUpdate, Soap


def _spoil(run: Run, rank: int, world: World) -> None:
    """Put NaN in one element of the second parameter's gradient, on one rank only."""
    grad = run.params[1].grad
    assert isinstance(grad, DTensor)
    if world.rank == rank:
        grad.to_local().view(-1)[0] = float("nan")


def _given(run: Run) -> None:
    for p in run.params:
        p.grad = run.cut(torch.ones(p.shape))


def skipped_by_all(world: World) -> None:
    """With a NaN on one rank, "skip" lets no rank step, and the next step is the first; "raise" names it on all."""
    mesh = world.mesh(world.size)
    for rank in range(world.size):
        run = Run(adamw, {"policy": MGUP(), "on_nonfinite": "skip"}, mesh)
        before = run.values()
        _given(run)
        _spoil(run, rank, world)
        run.optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(before, run.values(), strict=True))
        run.train(range(2))
        single = Run(adamw, {"policy": MGUP()}).train(range(2))
        assert all(torch.equal(a, b) for a, b in zip(run.values(), single.values(), strict=True))
    run = Run(adamw, {"policy": MGUP(), "on_nonfinite": "raise"}, mesh)
    _given(run)
    _spoil(run, 1, world)
    with pytest.raises(FloatingPointError, match=r"param_groups\[0\]\[1\].*nothing has moved"):
        run.optimizer.step()


def learning_rate_zero(world: World) -> None:
    """No rank takes a warm-up's rate of 0 for torch's initialisation step if one rank has a gradient."""
    run = Run(sgd, {"policy": Cautious()}, world.mesh(world.size))
    run.optimizer.param_groups[0]["lr"] = 0.0
    for p in run.params:
        whole = torch.zeros(p.shape)
        if p.dim() and p.shape[0] == 24:
            whole[0] = 1.0  # on the first rank only
        p.grad = run.cut(whole)
    run.optimizer.step()
    assert run.optimizer.count.steps == 1
    for p in run.params:
        p.grad = run.cut(torch.zeros(p.shape))
    run.optimizer.step()
    assert run.optimizer.count.steps == 1


def partial_gradients_are_summed(world: World) -> None:
    """A gradient that is not summed over ranks yet, as tensor parallelism may leave it, is summed."""
    mesh = world.mesh(world.size)
    whole = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    single, ours = nn.Parameter(whole.clone()), nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
    single.grad = torch.ones(8, 4) * sum(range(world.size))
    ours.grad = DTensor.from_local(torch.ones(8, 4) * world.rank, mesh, [Partial()])
    for p in (single, ours):
        SelectiveUpdate(torch.optim.SGD([p], lr=0.1, momentum=0.9), policy=MGUP()).step()
    assert torch.equal(ours.full_tensor(), single)  # type: ignore[attr-defined]


def preconditioners_leave_shards_alone(world: World) -> None:
    """Preconditioners leave shards alone and say why, and the selection goes on as without them."""
    mesh = world.mesh(world.size)
    run = Run(adamw, {"policy": MGUP(), "preconditioner": Soap(gather_up_to=0)}, mesh).train(range(2))
    single = Run(adamw, {"policy": MGUP()}).train(range(2))
    assert all(torch.equal(a, b) for a, b in zip(run.values(), single.values(), strict=True))
    assert "not       " in run.optimizer.explain() and "DTensor" in run.optimizer.explain()


def refused_where_it_is_wrapped(world: World) -> None:
    """A placement that cuts nothing is an error on every rank, and no rank waits."""
    mesh = world.mesh(world.size)
    p = nn.Parameter(DTensor.from_local(torch.ones(4, 3), mesh, [Partial()]))
    with pytest.raises(ValueError, match=r"param_groups\[0\]\[0\]' has the placement P"):
        SelectiveUpdate(torch.optim.SGD([p], lr=0.1, momentum=0.9), policy=MGUP())
