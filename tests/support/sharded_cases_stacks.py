"""Sharded matrices that are stepped in stacks: the step matrix by matrix, on every rank and in every layout.

Tolerance. Products of a stack may be rounded in another order than those of single matrices, by about 1e-7 of the
largest element, which a learning rate of 1e-2 turns into far less than CLOSE. A coordinate that is selected differently
makes 1e-3 and more.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from sharded_cases_selection import BASES
from sharded_runs import Run, adamw, columns, rows, sgd
from sharded_world import World
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from selective import MGUP, Cautious, CautiousMGUP, Dense, Eigenbasis, RandomMask
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


def layouts(world: World) -> Iterator[tuple[str, Any, Callable[[Tensor], list[Any]]]]:
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
    return max(float((a - b).abs().max()) for a, b in zip(one.values(), other.values(), strict=True))


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
    """Parameters, statistics and counts are those of a step matrix by matrix, with NaN in one step."""
    wrong = []
    for case, (_, _, more) in CASES.items():
        for layout, mesh, place in layouts(world):
            run = run_of(case, mesh, place).train(range(4)).train([4], nan=True).train(range(5, 8))
            assert planned(run), f"{case}, {layout}: not stepped in stacks"
            with matrix_by_matrix():
                other = run_of(case, mesh, place).train(range(4)).train([4], nan=True).train(range(5, 8))
                assert not planned(other)
            pairs = zip(run.values(), other.values(), strict=True)
            assert all(torch.equal(a.isnan(), b.isnan()) for a, b in pairs), f"{case}, {layout}"
            told = 0.0 if more.get("statistics") is False else statistics_apart(run, other)
            if told > CLOSE:
                wrong.append((case, layout, told))
    assert not wrong, wrong


def to_rounding(world: World) -> None:
    """Parameters are those of a step matrix by matrix after two refreshes, also in rounds of a few matrices."""
    wrong = []
    for number, case in enumerate(CASES):
        for layout, mesh, place in layouts(world):
            with pytest.MonkeyPatch.context() as patch:
                if number % 2:
                    patch.setattr(rotation, "ROTATED", 100)
                run = run_of(case, mesh, place).train(range(8))
            assert len(planned(run)[0].rounds) > 1 if number % 2 else planned(run), (case, layout)
            with matrix_by_matrix():
                other = run_of(case, mesh, place).train(range(8))
            if not apart(run, other) < CLOSE:
                wrong.append((case, layout, apart(run, other)))
    assert not wrong, wrong


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
    """Memory is given back after a step, and after one whose collectives fail; the next step is right."""
    mesh = world.mesh(world.size)
    run, other = (run_of("Cautious, AdamW", mesh, rows).train(range(2)) for _ in range(2))

    def held() -> int:
        return sum(len(b.flat.untyped_storage()) for step in planned(run) for one in step.rounds for b in one.buffers)

    assert held() == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Exchange, "run", fails)
        with pytest.raises(RuntimeError, match="as if a rank were gone"):
            run.step(2)
    run.optimizer.load_state_dict(copy.deepcopy(other.optimizer.state_dict()))
    with torch.no_grad():
        for p, q in zip(run.params, other.params, strict=True):
            p.copy_(q)
    for one in (run, other):
        one.train(range(3, 5))
    assert apart(run, other) == 0.0
    assert held() == 0


def fails(exchange: Exchange) -> None:
    raise RuntimeError("as if a rank were gone")
