"""Norm control of shards: the norms of whole matrices, the same bits on replicas, and each shard's own on request.

Tolerance. The sums over a matrix are added up in another order, in float64, whose rounding no float32 number shows but
where it ties: two roundings of 2^-24 of a parameter below 4.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sharded_cases_traffic import counted
from sharded_runs import Run, adamw, columns, layouts, lion, rows, sgd
from sharded_world import World
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard

from selective import MGUP, Cautious, Dense, NormControl, Soap

CASES: list[tuple[Any, dict[str, Any]]] = [
    (adamw, {"policy": Dense()}),
    (sgd, {"policy": Cautious()}),
    (lion, {"policy": MGUP()}),
    (adamw, {"policy": Cautious(), "preconditioner": Soap(sides="unsharded", refresh_every=100)}),
]
SHAPES = [(7, 5), (24, 6), (5,), (2, 9)]  # uneven, with fewer rows than ranks
CLOSE = 4 * 2.0**-23


def turns_as_on_one_device_everywhere(world: World) -> None:
    """In every layout; for the slow lane."""
    turns_as_on_one_device(world, everywhere=True)


def turns_as_on_one_device(world: World, everywhere: bool = False) -> None:
    for number, (base, options) in enumerate(CASES[:3]):
        options = {**options, "norm": NormControl(scale=3.0)}
        single = Run(base, options, shapes=SHAPES).train(range(3))
        for name, (mesh, place) in layouts(world, everywhere, None if everywhere else number).items():
            ours = Run(base, options, mesh, place, shapes=SHAPES).train(range(3))
            for index, (mine, theirs) in enumerate(zip(ours.values(), single.values(), strict=True)):
                far = float((mine - theirs).abs().max()) if mine.numel() else 0.0
                assert far <= CLOSE, f"{base.__name__}, {options}, {name}: parameter {index} is {far} apart"


def rotated_ones_keep_their_norm(world: World) -> None:
    """A rotation of the unsharded side, whose bases are solved on other ranks: the norms are those of the start."""
    base, options = CASES[3]
    mesh = world.mesh(world.size)
    ours = Run(base, {**options, "norm": NormControl(scale=3.0)}, mesh, rows, shapes=SHAPES)
    before = [value.double().norm() for value in ours.values()]
    ours.train(range(4))
    after = [value.double().norm() for value in ours.values()]
    for (p, was), now in zip(zip(ours.params, before, strict=True), after, strict=True):
        kept = bool(torch.isclose(was, now, rtol=1e-6))
        assert kept == (p.dim() == 2), (tuple(p.shape), was, now)


def replicas_have_the_same_bits(world: World) -> None:
    if world.size != 4:
        return
    mesh = world.mesh(2, 2, names=("dp", "tp"))
    ours = Run(adamw, {"policy": Cautious(), "norm": NormControl()}, mesh, _replicated, shapes=SHAPES).train(range(4))
    for p in ours.params:
        mine: Any = p.detach()
        here = mine.to_local() if hasattr(mine, "to_local") else mine
        first = here.clone()
        torch.distributed.broadcast(first, group=mesh.get_group("dp"), group_src=0)
        assert torch.equal(here, first)


def _replicated(tensor: Tensor) -> list[Any]:
    return [Replicate(), Shard(0)]


def a_shard_s_own_norm_sends_nothing(world: World) -> None:
    """With scope="local" each rank keeps the norm of its part; with "global" a step takes one more all-reduce."""
    mesh = world.mesh(world.size)
    options = {"policy": Dense(), "norm": NormControl()}
    local = Run(adamw, {**options, "scope": "local"}, mesh, columns, shapes=SHAPES)
    wide = Run(adamw, options, mesh, columns, shapes=SHAPES)
    bare = Run(adamw, {"policy": Dense()}, mesh, columns, shapes=SHAPES)
    before = [_norm_here(p) for p in local.params]
    sent = []
    for run in (bare, local, wide):
        run.step(0)  # the first one of `wide` also looks for zeros
        with counted() as found:
            run.step(1)
        sent.append(found)
    # three sums in float64 of each of the three matrices
    assert sent == [[], [], [3 * 3 * 8]], sent
    for p, was in zip(local.params, before, strict=True):
        if p.dim() == 2:
            torch.testing.assert_close(_norm_here(p), was, rtol=1e-6, atol=0)


def _norm_here(param: Any) -> Tensor:
    here = param.detach()
    return (here.to_local() if hasattr(here, "to_local") else here).double().norm()


def zeros_are_refused_on_all_ranks(world: World) -> None:
    """A matrix is 0 only if all of its parts are, and then every rank says so."""
    mesh = world.mesh(world.size)
    ours = Run(adamw, {"policy": Dense(), "norm": NormControl()}, mesh, rows, shapes=[(8, 3), (8, 3)])
    with torch.no_grad():
        first: Any = ours.params[0]
        if world.rank:
            first.to_local().zero_()  # a part of it alone
        other: Any = ours.params[1]
        other.to_local().zero_()
    with pytest.raises(ValueError, match=r"'param_groups\[0\]\[1\]', or a matrix in it, is 0"):
        ours.step(0)
