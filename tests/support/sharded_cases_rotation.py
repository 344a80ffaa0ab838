"""Rotated matrices whose rows or columns are cut over ranks: the same basis on every rank, the step of one device.

Tolerances. From one stored basis, products have other numbers of rows, in float32: they differ by about 1e-7 of the
largest element in each step, which a learning rate of 1e-2 turns into far less than CLOSE. One coordinate that is
selected differently makes 1e-3 and more. If the run computes its bases, Gram matrices are summed in another order, and
eigenvectors differ by that over the distance of their eigenvalues. For full-rank gradients (at least as many rows as
columns) that is less than NEAR. If gradients have a null space, any basis of it is right, and the last bit decides
which one comes out: then only the loss is compared.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from sharded_cases_checkpoints import Training
from sharded_cases_own import Whole
from sharded_cases_selection import BASES
from sharded_cases_traffic import counted
from sharded_cases_training import by_columns, by_rows
from sharded_runs import Make, Place, Run, adamw, columns, nadam, rows, whole
from sharded_world import World
from small_llama import batch, loss_of, small_llama
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from selective import (
    MGUP,
    AdaDiag,
    Cautious,
    CautiousMGUP,
    Dense,
    Eigenbasis,
    Magma,
    Policy,
    PreconditionerError,
    SelectiveUpdate,
    Soap,
    StepView,
)
from selective.preconditioner import Carry, Preconditioner, State
from selective.rotation import refresh_sharded as rotation_shards
from selective.state.rotation_state import summed_entries

CLOSE, NEAR = 1e-5, 1e-4
TALL = [(24, 6), (17, 8), (12, 12), (5,)]
WIDE = [(6, 24), (8, 17), (12, 12), (5,)]
BOTH = [*TALL, *WIDE[:2]]
SQUARE = [(12, 12), (17, 17), (8, 8), (5,)]
EVERY = {"sides": "unsharded", "solver": "eigh", "stagger": False, "refresh_every": 4}


def options(policy: Any, preconditioner: Preconditioner, **more: Any) -> dict[str, Any]:
    return {"policy": policy, "preconditioner": preconditioner, **more}


def layouts(world: World, everywhere: bool = True) -> Iterator[tuple[str, Any, Place, Any]]:
    """Yield name, mesh, placement and whole side of each layout."""
    for size in range(1, world.size + 1):
        mesh = world.mesh(size)
        if mesh is not None and (everywhere or size == 3):
            yield f"{size} rows", mesh, rows, "columns"
        if mesh is not None and (everywhere or size == 4):
            yield f"{size} columns", mesh, columns, "rows"
    mesh = world.mesh(2, 2, names=("replicate", "shard"))
    if mesh is not None:
        yield "hsdp", mesh, lambda t: [Replicate(), Shard(0)], "columns"


def in_turn(cuts: Sequence[Any], number: int, world: World) -> Sequence[Any]:
    """All layouts for the case of number 0; for each other case one of those that all ranks are part of."""
    shared = [cut for cut in cuts if cut[1].size() == world.size]
    return cuts if number == 0 else [shared[number % len(shared)]]


def load(into: Run, saved: dict[str, Any]) -> Run:
    """Load a whole checkpoint. Tensors shaped like the parameter are cut as it is."""
    state = {}
    for (index, entries), p in zip(sorted(saved["state"].items()), into.params, strict=True):
        state[index] = {k: into.cut(whole(v)) if v.shape == p.shape else v for k, v in entries.items()}
    into.optimizer.load_state_dict({**saved, "state": state})
    with torch.no_grad():
        for p, value in zip(into.params, saved["values"], strict=True):
            p.copy_(into.cut(value))
    return into


def saved(run: Run) -> dict[str, Any]:
    """A copy of the run's checkpoint, because torch's checkpoints share the tensors of the run."""
    return copy.deepcopy({**run.optimizer.state_dict(), "values": run.values()})


def apart(one: Run, other: Run) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one.values(), other.values(), strict=True))


def bases(run: Run) -> list[State]:
    found = [run.optimizer.store.table.get(p, {}) for p in run.params]
    return [{k: v for k, v in one.items() if "_basis" in k} for one in found]


CASES: dict[str, tuple[Make, Any, dict[str, Any]]] = {
    "MGUP, dense and own code, AdamW": (adamw, (MGUP(), Dense(), Whole()), {}),
    "Cautious, SGD": (BASES["SGD"], Cautious(), {}),
    "Magma, Lion": (BASES["Lion"], Magma(probability=0.8), {}),
    "original, AdamW": (adamw, MGUP(), {"mask_space": "original"}),
    "local, SGD": (BASES["SGD"], Dense(), {"scope": "local"}),
}


def from_a_stored_basis(world: World, everywhere: bool = False) -> None:
    """Checkpoints of one device go on in every layout, up to rounding, without new bases.

    Unless `everywhere`, only the first case runs in every layout, the others in one each, and all go on for two steps
    instead of four.
    """
    wrong, cuts, end = [], list(layouts(world, everywhere)), 7 if everywhere else 5
    for number, (name, (base, policy, more)) in enumerate(CASES.items()):
        for layout, mesh, place, side in cuts if everywhere else in_turn(cuts, number, world):
            fixed = {**EVERY, "refresh_every": 1000, "statistic": "ema"}
            one = Run(base, options(policy, Eigenbasis(**{**fixed, "sides": side}), **more)).train(range(3))
            ours = Run(base, options(policy, Eigenbasis(**fixed), **more), mesh, place)
            load(ours, saved(one)).train(range(3, end))
            one.train(range(3, end))
            rotated = sum("_basis" in key for state in bases(ours) for key in state)
            if apart(ours, one) > CLOSE or not rotated:
                wrong.append((name, layout, apart(ours, one), rotated))
    assert not wrong, wrong


def from_a_stored_basis_everywhere(world: World) -> None:
    from_a_stored_basis(world, everywhere=True)


def low_precision(world: World) -> None:
    """In bfloat16, rounded stochastically by the element's place in the whole, all but a few round the same way."""
    more = {"stochastic_rounding": True}
    for _, mesh, place, side in layouts(world, everywhere=False):
        fixed: dict[str, Any] = {**EVERY, "refresh_every": 1000}
        how = options(MGUP(), Eigenbasis(**{**fixed, "sides": side}), **more)
        one = Run(adamw, how, dtype=torch.bfloat16).train(range(3))
        ours = Run(adamw, options(MGUP(), Eigenbasis(**fixed), **more), mesh, place, dtype=torch.bfloat16)
        load(ours, saved(one)).train(range(3, 4))
        one.train(range(3, 4))
        same = [(a == b).float().mean() for a, b in zip(ours.values(), one.values(), strict=True)]
        assert min(map(float, same)) > 0.95, same


def from_its_own_bases(world: World) -> None:
    """A run that makes its bases, from averages or the gradient, with every solver, ends as on one device.

    Only the first solver runs in every layout, the others in one each.
    """
    _from_its_own_bases(world, everywhere=False)


def from_its_own_bases_everywhere(world: World) -> None:
    """The same with every solver in every layout; for the slow lane."""
    _from_its_own_bases(world, everywhere=True)


def _from_its_own_bases(world: World, everywhere: bool) -> None:
    wrong, cuts = [], list(layouts(world))
    solvers = ("eigh", "ema"), ("cholesky", "ema"), ("qr", "ema"), ("svd", "gradient")
    for number, (solver, statistic) in enumerate(solvers):
        for layout, mesh, place, side in cuts if everywhere else in_turn(cuts, number, world):
            how = {**EVERY, "solver": solver, "statistic": statistic}
            shapes = TALL if side == "columns" else WIDE
            ours = Run(adamw, options(Dense(), Eigenbasis(**how)), mesh, place, shapes=shapes).train(range(6))
            one = Run(adamw, options(Dense(), Eigenbasis(**{**how, "sides": side})), shapes=shapes).train(range(6))
            if apart(ours, one) > NEAR:
                wrong.append((solver, statistic, layout, apart(ours, one)))
    assert not wrong, wrong


def parts_that_are_not_summed_differ(world: World) -> None:
    """The failing twin: ranks that don't sum get different bases."""
    real = rotation_shards.all_reduced
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            rotation_shards,
            "all_reduced",
            lambda v, c, g: real(v, c, g) if v[0].dtype == torch.int32 else [torch.clone(x) for x in v],
        )
        how = options(Dense(), Eigenbasis(**EVERY))
        ours = Run(adamw, how, world.mesh(world.size), shapes=TALL).train(range(7))
    one = Run(adamw, options(Dense(), Eigenbasis(**EVERY)), shapes=TALL).train(range(7))
    assert apart(ours, one) > 100 * NEAR


def the_same_bits_on_all_ranks(world: World) -> None:
    """Bases and counts are the same bits on all ranks, with replicas, too, and with warm bases."""
    for layout, mesh, place, _ in layouts(world):
        if mesh.size() < world.size:
            continue
        run = Run(adamw, options(MGUP(), Eigenbasis(**{**EVERY, "solver": "cholesky"})), mesh, place).train(range(10))
        entries = [v for own in run.optimizer.store.table.values() for k, v in sorted(own.items()) if "_gram" not in k]
        mine = torch.cat([v.flatten().view(torch.uint8) for v in entries if not isinstance(v, DTensor)])
        others = [torch.empty_like(mine) for _ in range(world.size)]
        torch.distributed.all_gather(others, mine)
        assert all(torch.equal(mine, other) for other in others), layout
        assert any("_basis" in key for state in bases(run) for key in state), layout


def what_is_sent(world: World) -> None:
    """A step without a refresh sends nothing; one with a refresh sends two all-reduces of the documented bytes."""
    mesh = world.mesh(world.size)
    for statistic in ("ema", "gradient"):
        for place, shapes in ((rows, TALL), (columns, WIDE)):
            how = Eigenbasis(**{**EVERY, "statistic": statistic})
            run = Run(adamw, options(Dense(), how), mesh, place, shapes=shapes)
            sent = []
            for step in range(9):
                with counted() as found:
                    run.step(step)
                sent.append(found)
            first = 1 if statistic == "ema" else 0
            due = [step for step in range(9) if step >= first and (step - first) % 4 == 0]
            lengths = [min(shape) for shape in shapes if len(shape) > 1]
            noise = 4 if statistic == "gradient" else 0
            grams = sum(4 * (n * n + 1) for n in lengths)
            made = sum(4 * (n * n + n + 1) + 5 * 8 + noise for n in lengths)
            for step, found in enumerate(sent):
                assert found == ([grams, made] if step in due else []), (statistic, step, found)


def taking_turns(world: World) -> None:
    """With staggered refreshes, statistics and top-K, refreshes add two all-reduces to those of the policy."""
    how = options(MGUP(), Eigenbasis(sides="unsharded", refresh_every=5))
    run = Run(adamw, how, world.mesh(world.size)).train(range(12))
    with counted() as found:
        run.step(12)
    assert len(found) in (5, 7)
    one = Run(adamw, options(MGUP(), Eigenbasis(sides="columns", refresh_every=5))).train(range(13))
    taken = [
        [int(own.get("selective/basis/refreshes", -1)) for own in r.optimizer.store.table.values()] for r in (run, one)
    ]
    assert taken[0][:2] == taken[1][:2] and taken[0][0] > 1


def not_finite_on_one_rank(world: World) -> None:
    """After NaN in a refresh's step no rank gets a new basis; in other steps, that part of the gradient is left out."""
    mesh = world.mesh(world.size)
    for statistic in ("ema", "gradient"):
        how = Eigenbasis(**{**EVERY, "statistic": statistic})
        run = Run(adamw, options(Dense(), how), mesh, shapes=TALL)  # whose decay is not in the gradients
        due = 5 if statistic == "ema" else 4
        run.train(range(due))
        before = [{k: v.clone() for k, v in state.items()} for state in bases(run)]
        for number in (due, due + 1):
            values = torch.Generator().manual_seed(number)
            for p in run.params:
                p.grad = run.cut(torch.randn(p.shape, generator=values))
            if world.rank == 1:
                run.params[0].grad.to_local().view(-1)[0] = float("nan")  # type: ignore[union-attr]
            run.optimizer.step()
            if number == due:
                after = bases(run)
                assert all(torch.equal(before[0][k], after[0][k]) for k in before[0])
                assert any(not torch.equal(before[1][k], after[1][k]) for k in before[1])
        run.train(range(due + 2, due + 5))
        (key,) = before[0]
        assert not torch.equal(bases(run)[0][key], before[0][key]) and bool(bases(run)[0][key].isfinite().all())
        left_out = run.optimizer.state_dict()["state"][0]["selective/basis_skipped"]
        assert int(left_out) == (2 if statistic == "ema" else 1)


def saved_between_refreshes(world: World) -> None:
    """A run on 2, 4, 1 and 4 ranks in turn, each from the one before, ends where the undisturbed run does."""
    wrong = []
    for policy, base in ((Dense(), adamw), (Cautious(), BASES["Lion"])):
        for place, shapes, side in ((rows, TALL, "columns"), (columns, WIDE, "rows")):
            how, one = options(policy, Eigenbasis(**EVERY)), options(policy, Eigenbasis(**{**EVERY, "sides": side}))
            undisturbed = Run(base, one, shapes=shapes).train(range(12))
            state: list[Any] = [None]
            for part, size in enumerate((2, 4, 1, 4)):
                mesh = world.mesh(size)
                if mesh is not None:
                    run = Run(base, one, shapes=shapes) if size == 1 else Run(base, how, mesh, place, shapes=shapes)
                    run = load(run, state[0]) if part else run
                    found = saved(run.train(range(3 * part, 3 * part + 3)))
                    for entries in found["state"].values():
                        entries.update({k: whole(v) for k, v in entries.items()})
                    if part == 3 and apart(run, undisturbed) > NEAR:
                        wrong.append((policy, place.__name__, apart(run, undisturbed)))
                    state = [found]
                torch.distributed.broadcast_object_list(state, 0)
    assert not wrong, wrong


class Rotated(Training):
    """A small Llama with given gradients, for torch.distributed.checkpoint."""

    def __init__(self, mesh: Any = None) -> None:
        self.model, self.mesh = small_llama().float(), mesh
        if mesh is not None:
            by_rows(self.model, mesh)
        how = Eigenbasis(sides="unsharded", refresh_every=1000)  # first bases in the first ten steps
        base = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.optimizer = SelectiveUpdate(base, policy=Cautious(), preconditioner=how)


def saved_by_torch(world: World) -> None:
    """Files of 4 ranks, read on 2 and on one, have whole averages, and the run goes on, flattened or not."""
    mesh, pair = world.mesh(world.size), world.mesh(2)
    for flatten in (False, True):
        run, folder = Rotated(mesh).train(range(12)), world.folder / f"rotated {flatten}"
        run.save(folder, flatten)
        averages = summed_entries(run.optimizer.groups.plans, run.optimizer.store.table)
        run.train(range(12, 15))
        ends = []
        if pair is not None:
            ends.append(Rotated(pair).load(folder, flatten).train(range(12, 15)).values())
        if world.rank == 0:
            one = Rotated().load(folder, flatten)
            for p, q in zip(run.model.parameters(), one.model.parameters(), strict=True):
                for key, value in averages.get(p, {}).items():
                    assert torch.equal(one.optimizer.store.table[q][key], value), key
            ends.append(one.train(range(12, 15)).values())
        wanted = run.values()
        for end in ends:
            furthest = max(float((a - b).abs().max()) for a, b in zip(end, wanted, strict=True))
            assert furthest < CLOSE, furthest


def what_is_left_alone(world: World) -> None:
    """Some parameters are left alone, with a reason: other sides, two dimensions, unusual bases, foreign code."""
    mesh, square = world.mesh(world.size), world.mesh(2, 2, names=("a", "b"))

    def said(base: Make, how: Preconditioner, mesh: Any = mesh, place: Place = rows) -> str:
        run = Run(base, options(MGUP(), how), mesh, place, shapes=TALL).train(range(2))
        assert not any(bases(run))
        return run.optimizer.explain()

    assert "rotating its rows would gather it" in said(adamw, Soap(gather_up_to=50))
    assert "sides='unsharded'" in said(adamw, Eigenbasis(sides="rows", gather_up_to=0))
    assert "rotating its columns would gather it" in said(adamw, AdaDiag(gather_up_to=0), place=columns)
    assert "DTensor, and the base steps it by itself" in said(nadam, Eigenbasis(sides="unsharded"))
    both = said(adamw, Eigenbasis(sides="unsharded"), square, lambda t: [Shard(0), Shard(t.dim() - 1)])
    assert "no side of it is whole" in both
    run = Run(adamw, options(MGUP(), Eigenbasis(sides="unsharded")), mesh, shapes=TALL)
    line = next(line for line in run.optimizer.explain().splitlines() if line.startswith("  rotated"))
    assert "24 x 6" in line
    assert "3 of them sharded: nothing is sent" in run.optimizer.explain()
    as_two = options(MGUP(), Eigenbasis(sides="unsharded"), matrix_view="rows:2")
    with pytest.warns(UserWarning, match="makes several matrices of a DTensor"):
        joined = Run(adamw, as_two, mesh, shapes=TALL[:1])
    assert "makes 2 matrices of it" in joined.optimizer.explain()
    one = Run(adamw, options(MGUP(), Soap(gather_up_to=0)), world.mesh(1) or mesh, shapes=TALL)
    assert ("none of them" in one.optimizer.explain()) == (world.rank > 0)  # a single rank cuts nothing


def thin_matrices_lose_the_same_side_everywhere(world: World) -> None:
    """A side is out of proportion by the whole matrix: a rank's 16 of 64 rows would not be."""
    shapes, how = [(64, 2), (2, 64)], Soap(refresh_every=2, solver="eigh")
    one = Run(adamw, options(MGUP(), how), shapes=shapes).train(range(4))
    ours = Run(adamw, options(MGUP(), how), world.mesh(world.size), rows, shapes=shapes).train(range(4))
    for run in (one, ours):
        found = [[key for key in state if key.endswith("_basis")] for state in bases(run)]
        assert found == [["selective/basis/columns_basis"], ["selective/basis/rows_basis"], []]
    assert apart(ours, one) < NEAR
    assert "1 of them sharded: gathered" in ours.optimizer.explain()  # the second, whose short side is cut


class Smooth(Policy):
    """A mask that depends on every coordinate, but not on signs and little on rounding errors."""

    def mask(self, view: StepView) -> Tensor:
        return 1 / (1 + view.grad * view.grad)


GATHERED: dict[str, tuple[Make, Policy, Preconditioner, dict[str, Any]]] = {
    "SOAP, AdamW": (adamw, MGUP(), Soap(refresh_every=2, solver="cholesky"), {}),
    "in turns, AdamW": (adamw, MGUP(), Eigenbasis(refresh_every=3, solver="qr"), {}),
    "AdaDiag++, SGD": (BASES["SGD"], Smooth(), AdaDiag(sides="two", refresh_every=2), {}),
    "AdaDiag, SGD": (BASES["SGD"], MGUP(), AdaDiag(sides="rows", refresh_every=2, carry="keep"), {}),
    "columns, AdamW": (adamw, MGUP(), AdaDiag(sides="columns", refresh_every=3), {"mask_space": "original"}),
}


def other_sides_are_gathered(world: World) -> None:
    """Other sides are gathered in every layout, and are as on one device, from the same checkpoint.

    It is of step 6. Before, the Gram matrices have a lower rank than their order, and what they leave has a basis of
    rounding errors.

    The cases have tall matrices and wide ones, cut by rows, by columns, and both. A checkpoint goes on on one device.
    Most rows of a tall matrix have no gradient, so that some coordinates are nothing but rounding errors: Lion would
    take their signs, and Cautious count them. One gradient is the statistic only around SGD: Adam would divide a
    momentum of rounding errors by the root of 0. The matrices are those of which it determines the whole basis, because
    the longer side has a null space. In AdaDiag++'s basis that gradient is diagonal, so that top-K would rank rounding
    errors: hence its mask. Only the first case runs in every layout here, the others in one each, and they go on for
    three steps and one more instead of four and two.
    """
    _gathered(world, everywhere=False)


def other_sides_are_gathered_everywhere(world: World) -> None:
    """The same with every case in every layout; for the slow lane."""
    _gathered(world, everywhere=True)


def _gathered(world: World, everywhere: bool) -> None:
    square = world.mesh(2, 2, names=("a", "b"))
    cuts = [(name, mesh, place) for name, mesh, place, _ in layouts(world, everywhere=False)]
    if square is not None:
        cuts.append(("both", square, lambda t: [Shard(0), Shard(t.dim() - 1)]))
    wrong, then, end = [], *((10, 12) if everywhere else (9, 10))
    for number, (name, (base, policy, how, more)) in enumerate(GATHERED.items()):
        determined = {"rows": WIDE, "columns": TALL, "two": SQUARE}
        shapes = determined[how.sides] if isinstance(how, AdaDiag) else BOTH
        one = Run(base, options(policy, how, **more), shapes=shapes).train(range(6))
        start = saved(one)
        one.train(range(6, end))
        whole_side = {"rows": "columns", "columns": "rows"}.get(how.sides, "none")  # type: ignore[attr-defined]
        gathering = [cut for cut in cuts if whole_side not in cut[0].replace("hsdp", "rows")]
        for layout, mesh, place in gathering if everywhere else in_turn(gathering, number, world):
            fresh = Run(base, options(policy, how, **more), mesh, place, shapes=shapes)
            ours = load(fresh, copy.deepcopy(start)).train(range(6, then))
            back = load(Run(base, options(policy, how, **more), shapes=shapes), saved(ours))
            ours.train(range(then, end))
            back.train(range(then, end))
            rotated = sum("_basis" in key for state in bases(ours) for key in state)
            furthest = max(apart(ours, one), apart(ours, back))
            if furthest > NEAR or rotated != sum("_basis" in key for state in bases(one) for key in state):
                wrong.append((name, layout, furthest, rotated))
    assert not wrong, wrong


def gathering_is_said_and_counted(world: World) -> None:
    """`explain()` counts three times a matrix's numbers with averages, two without, none for a whole side."""
    mesh = world.mesh(world.size)
    shapes = [(24, 6), (24, 6), (8, 17)]
    seldom: dict[str, Any] = {"refresh_every": 50, "stagger": False}
    for how, times in (
        (Soap(**seldom), 3), (AdaDiag(sides="two", **seldom), 2), (Eigenbasis(sides="columns", **seldom), 0)
    ):  # fmt: skip
        run = Run(adamw, options(CautiousMGUP(), how, statistics=False), mesh, rows, shapes=shapes).train(range(3))
        with counted() as sent:
            run.train(range(3, 4))
        assert sum(sent) == times * 4 * sum(m * n for m, n in shapes), (sent, times)
        said = run.optimizer.explain()
        assert ("gathered in every step" in said) == (times > 0)
        assert times == 0 or {2: "twice", 3: "three times"}[times] in said


def nan_in_one_rank_s_part(world: World) -> None:
    """In any step, no part of a gathered gradient with NaN enters averages or bases, as on one device."""
    mesh = world.mesh(world.size)
    spaces = (Soap(refresh_every=2), AdaDiag(sides="two", refresh_every=3))  # due before steps 1, 3, 5 and 0, 3, 6
    for space, when in ((space, when) for space in spaces for when in (2, 3)):
        runs = []
        for cut in (None, mesh):
            run = Run(BASES["SGD"], options(CautiousMGUP(), space), cut, rows, shapes=TALL[:1]).train(range(when))
            before = {k: v.clone() for k, v in bases(run)[0].items()}
            run.train(range(when, when + 1), nan=True)
            own = run.optimizer.store.table[run.params[0]]
            runs.append({k: v for k, v in own.items() if k.startswith("selective/basis/")})
            assert all(torch.equal(before[key], runs[-1][key]) for key in before), (space, when)
        assert runs[0].keys() == runs[1].keys()
        for key, value in runs[0].items():
            assert value.isfinite().all()
            torch.testing.assert_close(runs[1][key], value, rtol=NEAR, atol=NEAR, msg=f"{key} {space} {when}")


class Failing(Eigenbasis):
    """A preconditioner whose second refresh fails, on the rank that makes it."""

    def refresh(self, states: Sequence[State], grads: Sequence[Tensor]) -> list[Carry | None]:
        if int(states[0]["refreshes"]):
            raise RuntimeError("no basis today")
        return super().refresh(states, grads)


def a_failing_refresh_ends_the_step_everywhere(world: World) -> None:
    """A failing refresh ends the step on every rank at once, and bases and parameters are as before."""
    space = Failing(refresh_every=2, stagger=False)
    run = Run(adamw, options(MGUP(), space), world.mesh(world.size), rows, shapes=[(12, 12)]).train(range(3))
    before, values = {k: v.clone() for k, v in bases(run)[0].items()}, run.values()
    with pytest.raises(PreconditionerError, match="no basis today" if world.rank == 0 else "on another rank"):
        run.train(range(3, 4))
    assert all(torch.equal(before[key], value) for key, value in bases(run)[0].items())
    assert all(torch.equal(a, b) for a, b in zip(values, run.values(), strict=True))


def a_refresh_sends_what_is_rotated(world: World) -> None:
    """A refresh of a wide matrix that is rotated on its short side sends nothing of the long side's length."""
    space = AdaDiag(sides="rows", refresh_every=50)
    run = Run(adamw, options(CautiousMGUP(), space, statistics=False), world.mesh(world.size), rows, shapes=[(8, 4000)])
    with counted() as sent:
        run.train(range(1))
    gathered = 4 * 8 * 4000 * 3  # for the refresh, on the way in, on the way out
    assert gathered < sum(sent) < gathered + 2000


def the_loss_of_a_small_llama(world: World) -> None:
    """In 30 steps with bases of its own, the loss falls to a sixth, and ends within 5% of one device's.

    The first gradients of `down` have a null space, so that bases differ; 0.5% and 3% were measured.
    """
    mesh = world.mesh(world.size)
    losses: list[list[float]] = []
    for cut in (None, by_rows, None, by_columns):
        side: Any = "unsharded" if cut is not None else ("columns" if not losses else "rows")
        model = small_llama(layers=2).float()
        if cut is not None:
            cut(model, mesh)
        base = torch.optim.AdamW(model.parameters(), lr=1e-2)
        optimizer = SelectiveUpdate(base, policy=MGUP(), preconditioner=Eigenbasis(sides=side, refresh_every=5))
        found = []
        for step in range(30):
            loss = loss_of(model, batch(step % 3))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(float(whole(loss.detach())))
        losses.append(found)
    ends = [sum(found[-3:]) / 3 for found in losses]
    assert max(ends) < losses[0][0] / 5, losses[0]
    assert abs(ends[1] / ends[0] - 1) < 0.05 and abs(ends[3] / ends[2] - 1) < 0.05, ends
