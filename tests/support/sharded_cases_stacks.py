"""Sharded matrices that are stepped in stacks: the step matrix by matrix, on every rank and in every layout.

Tolerance. Products of a stack may be rounded in another order than those of single matrices, by about 1e-7 of the
largest element, which a learning rate of 1e-2 turns into far less than CLOSE. A coordinate that is selected differently
makes 1e-3 and more.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
from sharded_cases_selection import BASES
from sharded_runs import Run, adamw, columns, rows, sgd, whole
from sharded_world import World
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from selective import (
    MGUP,
    Cautious,
    CautiousMGUP,
    Dense,
    Eigenbasis,
    MeanPreserving,
    Policy,
    RandomMask,
    SelectiveUpdate,
    TopK,
)
from selective.capture import rotated_planned
from selective.capture.rotated_planned import PlannedStep
from selective.kernels import Exchange
from selective.rotation import rotation
from selective.state import kept_bases

CLOSE = 1e-5
# Two of one shape; rows that don't divide by the ranks; fewer rows or columns than ranks, so that parts are empty.
SHAPES = [(24, 6), (24, 6), (17, 8), (3, 12), (12, 3), (2, 6), (5,)]
EVERY: dict[str, Any] = {"sides": "unsharded", "solver": "eigh", "stagger": False, "refresh_every": 3}
CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "Dense, AdamW": (adamw, Dense(), {}),
    "Cautious, AdamW": (adamw, Cautious(), {}),
    "CautiousMGUP, Lion, no statistics": (BASES["Lion"], CautiousMGUP(), {"statistics": False}),
    "MGUP, SGD": (sgd, MGUP(), {}),
    "random, AdamW, no statistics": (adamw, RandomMask(), {"statistics": False}),
    "local, AdamW": (adamw, MGUP(), {"scope": "local"}),
}


def layouts(world: World, number: int) -> list[tuple[str, Any, Callable[[Tensor], list[Any]]]]:
    """Return all layouts for the case of number 0, and for each other one of them."""
    found = list(_layouts(world))
    return found[number % len(found) :][:1] if number else found


def _layouts(world: World) -> Iterator[tuple[str, Any, Callable[[Tensor], list[Any]]]]:
    mesh, square = world.mesh(world.size), world.mesh(2, 2, names=("replicate", "shard"))
    yield "rows", mesh, rows
    yield "columns", mesh, columns
    yield "replicas", square, lambda t: [Replicate(), Shard(0)]


@contextmanager
def matrix_by_matrix() -> Iterator[None]:
    """Inside of the block, nothing is stepped in stacks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept_bases, "_can_be_stacked", lambda rotation, members: False)
        yield


def planned(run: Run) -> list[PlannedStep]:
    """Return the steps in stacks of all groups."""
    steps = [plan.kept_step._step for plan in run.optimizer.groups.plans]
    return [step for step in steps if step is not None]


def apart(one: Run, other: Run) -> float:
    """Return how far the parameters are apart; infinity if one has NaN where the other has none."""
    pairs = list(zip(one.values(), other.values(), strict=True))
    if not all(torch.equal(a.isnan(), b.isnan()) for a, b in pairs):
        return float("inf")
    return max(float((a - b).nan_to_num(0.0).abs().max()) for a, b in pairs)


def counts(run: Run) -> list[int]:
    """Return what was counted of each basis, and of gradients that were not finite, on this rank."""
    entries = [run.optimizer.store.table.get(p, {}) for p in run.params]
    return [int(x) for own in entries for _, x in sorted(own.items()) if x.dim() == 0 and x.dtype == torch.int64]


def statistics_apart(one: Run, other: Run) -> float:
    """Return the largest relative difference of statistics."""
    mine, theirs = one.statistics(), other.statistics()
    assert mine.keys() == theirs.keys() and all(mine[name].keys() == theirs[name].keys() for name in mine)
    pairs = [(mine[name][key], theirs[name][key]) for name in mine for key in mine[name]]
    return max([abs(a - b) / max(abs(b), 1.0) for a, b in pairs if b == b], default=0.0)


def run_of(case: str, mesh: Any, place: Any, **more: Any) -> Run:
    base, policy, given = CASES[case]
    how = {"policy": policy, "preconditioner": Eigenbasis(**{**EVERY, **more}), **given}
    return Run(base, how, mesh, place, shapes=SHAPES)


def as_matrix_by_matrix(world: World) -> None:
    """Parameters, statistics and counts are those of a step matrix by matrix, with NaN in a gradient of one step.

    Only the first case runs in every layout, the others in one each.
    """
    _as_matrix_by_matrix(world, everywhere=False)


def as_matrix_by_matrix_everywhere(world: World) -> None:
    """The same with every case in every layout; for the slow lane."""
    _as_matrix_by_matrix(world, everywhere=True)


def _as_matrix_by_matrix(world: World, everywhere: bool) -> None:
    wrong = []

    def end(case: str, mesh: Any, place: Any) -> Run:
        return run_of(case, mesh, place).train(range(3)).train([3], nan={2}).train(range(4, 6))

    for number, (case, (_, _, more)) in enumerate(CASES.items()):
        for layout, mesh, place in layouts(world, 0 if everywhere else number):
            run = end(case, mesh, place)
            with matrix_by_matrix():
                other = end(case, mesh, place)
            told = 0.0 if more.get("statistics") is False else statistics_apart(run, other)
            furthest = max(apart(run, other), told)
            if not (planned(run) and not planned(other) and furthest < CLOSE and counts(run) == counts(other)):
                wrong.append((case, layout, furthest, counts(run), counts(other)))
    assert not wrong, wrong


def in_many_rounds(world: World) -> None:
    """The same in rounds of a few matrices, and with bases of single gradients, whose noise is cleared for one step."""
    wrong = []
    for number, case in enumerate(CASES):
        more = {"statistic": "gradient"} if number % 2 else {}
        for layout, mesh, place in layouts(world, number):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(rotation, "ROTATED", 20)
                run = run_of(case, mesh, place, **more).train(range(5))
            with matrix_by_matrix():
                other = run_of(case, mesh, place, **more).train(range(5))
            furthest, rounds = apart(run, other), [len(step.rounds) for step in planned(run)]
            if not (furthest < CLOSE and max(rounds, default=0) > 1):
                wrong.append((case, layout, furthest, rounds))
    assert not wrong, wrong


def a_sum_over_the_ranks_can_not_overflow(world: World) -> None:
    """A gradient that is too large for the sum of all ranks' averages changes none, and is counted on each."""
    run = run_of("Dense, AdamW", world.mesh(world.size), rows).train(range(2))
    before = [float(x.abs().sum()) for x in averages(run)]
    p = run.params[0]
    p.grad = run.cut(torch.full(p.shape, 2.5e18))  # its squares fit, added up over a part's rows, or over all
    for q in run.params[1:]:
        q.grad = torch.zeros_like(q)
    run.optimizer.step()
    after = [float(x.abs().sum()) for x in averages(run)]
    assert planned(run)
    assert after[0] == before[0]
    assert all(now < then for now, then in zip(after[1:], before[1:], strict=True) if then)


def averages(run: Run) -> list[Tensor]:
    entries = [run.optimizer.store.table.get(p, {}) for p in run.params]
    return [x for own in entries for name, x in own.items() if name.endswith("_gram")]


def experts_of_some_ranks(world: World) -> None:
    """Ranks add up the same parameters, though some have no gradient of an expert, and take no step in stacks."""
    mesh = world.mesh(world.size)
    pair = world.mesh(2, 2, names=("replicate", "shard"))["shard"]
    policy = Policy(selection=TopK(fraction=0.3), strength=MeanPreserving())

    def end() -> tuple[list[Tensor], set[bool]]:
        values = torch.Generator().manual_seed(0)
        starts = [(torch.randn(s, generator=values), mesh) for s in ((24, 6), (17, 8), (33, 4))]
        starts = [(torch.randn(10, 6, generator=values), pair), *starts]
        params = [nn.Parameter(distribute_tensor(x, m, [Shard(0)], src_data_rank=None)) for x, m in starts]
        optimizer = SelectiveUpdate(adamw(params), policy=policy, preconditioner=Eigenbasis(**EVERY))
        in_stacks = set()
        for number in range(6):
            values = torch.Generator().manual_seed(100 + number)
            for p in params:
                grad = torch.randn(p.shape, generator=values)
                grad[2:5] = 0
                p.grad = distribute_tensor(grad, p.device_mesh, p.placements, src_data_rank=None)
            if number in (1, 3, 4) and world.rank < 2:
                params[0].grad = None
            optimizer.step()
            in_stacks.add(optimizer.groups.plans[0].kept_step._step is not None)
        return [whole(p.detach()) for p in params[1:]], in_stacks

    mine, in_stacks = end()
    with matrix_by_matrix():
        theirs, _ = end()
    furthest = max(float((a - b).abs().max()) for a, b in zip(mine, theirs, strict=True))
    assert furthest < CLOSE, furthest
    assert in_stacks == ({True, False} if world.rank < 2 else {True})


class CutInTwoWays(Run):
    """Every other parameter is cut over the first dimension of a mesh, and the others over the second one."""

    calls = 0

    def cut(self, whole: Tensor) -> Tensor:
        number = self.calls % (len(self.shapes) + 1)  # all parameters, or all gradients, are cut in order
        self.calls += 1
        self.place = lambda t: [Shard(0), Replicate()] if number % 2 else [Replicate(), Shard(0)]
        return super().cut(whole)


def one_shape_cut_in_two_ways(world: World) -> None:
    """All ranks add up the same parameters, though on some of them all parts have one shape, and on others not."""
    mesh = world.mesh(2, 2, names=("replicate", "shard"))
    how = {"policy": Cautious(), "preconditioner": Eigenbasis(**EVERY)}
    shapes = [(17, 8)] * 4
    run = CutInTwoWays(adamw, how, mesh, shapes=shapes).train(range(5))
    assert planned(run)
    with matrix_by_matrix():
        other = CutInTwoWays(adamw, how, mesh, shapes=shapes).train(range(5))
    assert apart(run, other) < CLOSE
    assert statistics_apart(run, other) < CLOSE


def replace_local_tensors(run: Run) -> None:
    """Give the parameters and their state other local tensors, as a wrapper of modules may do."""
    for p in run.params:
        entries = run.optimizer.state[p]
        for tensor in (p, *(x for x in entries.values() if isinstance(x, torch.Tensor))):
            if isinstance(tensor, DTensor):
                tensor._local_tensor = tensor._local_tensor.clone()


def replace_state(run: Run) -> None:
    """Put copies in the place of the entries of the base's state."""
    for p in run.params:
        entries = run.optimizer.state[p]
        for name, x in entries.items():
            if isinstance(x, DTensor):
                entries[name] = x.clone()


def changed(world: World, change: Callable[[Run], None]) -> float:
    """Return how far apart runs end, one of which steps matrix by matrix, with a change between two steps."""

    def end() -> Run:
        run = run_of("Cautious, AdamW", world.mesh(world.size), rows).train(range(2))
        change(run)
        return run.train(range(2, 5))

    run = end()
    assert planned(run)
    with matrix_by_matrix():
        return apart(run, end())


def other_local_tensors_are_noticed(world: World) -> None:
    for change in (replace_local_tensors, replace_state):
        assert changed(world, change) < CLOSE, change.__name__


def without_looking_they_are_not_noticed(world: World) -> None:
    """The failing twin: a step that does not look moves tensors that nobody has any more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rotated_planned, "_locals", lambda stacks, parameters, states: [])
        assert changed(world, replace_local_tensors) > 100 * CLOSE


def buffers_have_memory_in_a_step_alone(world: World) -> None:
    """Memory is given back after a step, and at once if its collectives fail. Then training goes on."""
    run = run_of("Cautious, AdamW", world.mesh(world.size), rows).train(range(2))
    held = [_held(run)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Exchange, "run", fails)
        with suppress(RuntimeError):
            run.step(2)
        held.append(_held(run))
    with pytest.MonkeyPatch.context() as patch:
        real = rotated_planned.selective_step
        patch.setattr(rotated_planned, "selective_step", lambda *args, **how: (gc.collect(), real(*args, **how))[1])
        run.train(range(2, 5))
    held.append(_held(run))
    assert held == [0, 0, 0]
    assert all(bool(x.isfinite().all()) for x in run.values())


def _held(run: Run) -> int:
    """Return the bytes of all buffers."""
    rounds = [one for step in planned(run) for one in step.rounds]
    return sum(len(buffer.flat.untyped_storage()) for one in rounds for buffer in one.buffers)


def fails(exchange: Exchange) -> None:
    raise RuntimeError("as if a rank were gone")
