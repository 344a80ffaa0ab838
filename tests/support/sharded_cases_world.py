"""Runs that end badly, each in a set of processes of its own."""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist
from sharded_cases_checkpoints import ADAMW, Training, _same
from sharded_world import World

from selective.kernels.sharded import exchange

NAME = ADAMW


def fails_on_one_rank(world: World) -> None:
    assert world.rank == 0, "as it should"
    dist.barrier()


def waits(world: World) -> None:
    time.sleep(100)


def does_nothing(world: World) -> None:
    """A case that no rank can fail."""


def dies_in_a_step(world: World) -> None:
    """After two steps and a checkpoint, the second rank ends in the middle of the third step's collectives."""
    run = Training(NAME, world.mesh(2)).train(range(2))
    run.save(world.folder / "saved", flatten=False)
    if world.rank == 1:
        real, calls = torch.distributed.all_reduce, []

        def all_reduce(*args: object, **kwargs: object) -> object:
            calls.append(1)
            if len(calls) == 3:
                os._exit(1)
            return real(*args, **kwargs)

        exchange.torch.distributed.all_reduce = all_reduce  # type: ignore[assignment]
    run.train(range(2, 3))


def goes_on_from_the_checkpoint(world: World) -> None:
    run = Training(NAME, world.mesh(2)).load(world.folder / "saved", flatten=False).train(range(2, 4))
    _same(run.values(), Training(NAME).train(range(4)).values(), "after a death")
