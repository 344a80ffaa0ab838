"""The traffic of a step, counted and compared with docs/guides/sharded.md."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sharded_cases_selection import POLICIES
from sharded_runs import Run, adamw, columns, rows
from sharded_world import World
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from selective import MGUP, Cautious, SelectiveUpdate
from selective.bench.traffic import all_reduces

KIB = 1024


class Collectives(TorchDispatchMode):
    """The names of all collectives. torch's own `CommDebugMode` notes every operation, which takes longer."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(one, DTensor) for one in types):
            return NotImplemented  # the DTensor's own operations follow, its collectives among them
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in str(func):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[list[int]]:
    """Record the bytes of every all-reduce in the block. Any other collective is an error."""
    with all_reduces() as found, Collectives() as all_of_them:
        yield found
    assert len(all_of_them.names) == len(found), f"{all_of_them.names}, {len(found)} of which are ours"


def another_collective_is_noticed(world: World) -> None:
    """The failing twins: a DTensor gathers itself, and a broadcast is sent."""
    mesh = world.mesh(world.size)
    cut = distribute_tensor(torch.ones(8, 4), mesh, [Shard(0)], src_data_rank=None)
    ones = torch.ones(3)
    for other in (cut.full_tensor, lambda: torch.distributed.broadcast(ones, 0)):
        noticed = False
        try:
            with counted():
                other()
        except AssertionError:
            noticed = True
        assert noticed


def traffic(run: Run) -> list[int]:
    run.step(0)
    with counted() as found:
        run.step(1)
    return found


# Collectives of a step with statistics and without, by rows and by columns, as docs/guides/sharded.md has them; and the
# bytes of a tensor cut by rows over 4 ranks, with statistics and without, of which the page has the most.
TABLE = {
    "CautiousMGUP": ((1, 0), (1, 0), (800, 0)),
    "Grams": ((1, 0), (1, 0), (800, 0)),
    "RandomMask": ((1, 0), (1, 0), (800, 0)),
    "RandomMask of rows": ((1, 0), (1, 0), (800, 0)),
    "SkipUpdate": ((1, 0), (1, 0), (800, 0)),
    "Dense": ((0, 0), (0, 0), (0, 0)),
    "Cautious": ((1, 1), (1, 1), (800, 160)),
    "AlphaConsistency": ((1, 1), (1, 1), (1280, 640)),
    "Magma": ((1, 1), (1, 1), (1120, 640)),
    "MGUP": ((5, 5), (6, 6), (4 * KIB + 16 + 960, 4 * KIB + 16)),
    "top 30 % Nesterov": ((5, 5), (6, 6), (4 * KIB + 16 + 960, 4 * KIB + 16 + 160)),
    "top 20 % by momentum": ((6, 6), (7, 7), (4 * KIB + 16 + 1120, 4 * KIB + 16 + 480)),
}
LARGE = [(900, 12), (40, 30), (17,)]  # 900 rows, cut by column: more cells than one round tells apart
LARGER = [(9000, 12), (400, 30), (17,)]


def numbers_are_the_table(world: World) -> None:
    """The counts are those of the table, whatever the tensors' sizes, and within 64 KiB + 8 KiB a tensor.

    `explain()` states the number that is counted.
    """
    mesh, wrong = world.mesh(world.size), []
    for name, (by_rows, by_columns, sizes) in TABLE.items():
        for place, expected in ((rows, by_rows), (columns, by_columns)):
            for statistics, count, size in zip((True, False), expected, sizes, strict=True):
                options = {"policy": POLICIES[name], "statistics": statistics}
                sizes_of_tensors = (LARGE, LARGER) if name in ("Cautious", "MGUP") and statistics else (LARGE,)
                runs = [Run(adamw, options, mesh, place, shapes=s) for s in sizes_of_tensors]
                found = [traffic(run) for run in runs]
                limit = 64 * KIB + 8 * KIB * len(LARGE)
                if any(len(one) != count for one in found) or max(map(sum, found)) > limit:
                    wrong.append((name, place.__name__, statistics, found))
                if place is rows and any(sum(one) != size * len(LARGE) for one in found):
                    wrong.append((name, statistics, "bytes", found))
                if place is rows and not statistics and not _explained(runs[0], name, count):
                    wrong.append((name, count, runs[0].optimizer.explain()))
    assert not wrong, wrong


def _explained(run: Run, name: str, count: int) -> bool:
    """True if `explain()` states this number of collectives."""
    said = next(line for line in run.optimizer.explain().splitlines() if line.startswith("  sharded"))
    if name == "Dense":
        return "the base's own step" in said
    plural = "s" if count > 1 else ""
    return (f"{count} small all-reduce{plural} a step" if count else "no collectives") in said


def bytes_of_a_tensor(world: World) -> None:
    """Exact top-K sends 4 KiB of counters for the K-th score, the ties', and 480 sums of digits: at most 8 KiB."""
    mesh, wrong = world.mesh(world.size), []
    for shape, place in (((900, 12), rows), ((900, 12), columns), ((36_800, 4), columns), ((1_000_000,), rows)):
        found = traffic(Run(adamw, {"policy": MGUP()}, mesh, place, shapes=[shape]))
        if sum(found) > 8 * KIB or found[:4] != [KIB] * 4:
            wrong.append((shape, place.__name__, found))
    assert not wrong, wrong


def groups_and_meshes_share(world: World) -> None:
    """Several parameter groups of one mesh share every collective; each further mesh has its own."""
    mesh, smaller = world.mesh(world.size), world.mesh(2)
    whole = [torch.randn(8, 4), torch.randn(6, 3), torch.randn(5)]

    def made(meshes: list[Any]) -> SelectiveUpdate:
        params = [
            nn.Parameter(distribute_tensor(x, m, [Shard(0)], src_data_rank=None))
            for x, m in zip(whole, meshes, strict=True)
        ]
        groups = [{"params": [params[0]]}, {"params": [params[1]], "policy": MGUP(tau=0.3)}, {"params": [params[2]]}]
        groups[2]["policy"] = Cautious()  # type: ignore[assignment]
        for p in params:
            p.grad = torch.ones_like(p)
        return SelectiveUpdate(torch.optim.AdamW(groups), policy=MGUP())

    with counted() as one:
        made([mesh] * 3).step()
    two: list[int] = []
    if smaller is not None:
        optimizer = made([smaller] * 3)
        with counted() as two:
            optimizer.step()
    assert len(one) == 5
    assert len(two) == (5 if smaller is not None else 0), (len(two), two)


def local_scope_sends_nothing(world: World) -> None:
    """All policies, a group of parameters for each."""
    run = Run(adamw, {"policy": tuple(POLICIES.values()), "scope": "local"}, world.mesh(world.size))
    assert traffic(run) == []
