"""The plan of scripts/evidence: no best rate is left at an edge, and the order of runs."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from evidence import plan, sweeps
from evidence.ranking import best_setups
from evidence.runs import MOST_RATES, Results, Run, at_edge, best_point, best_rate, next_rates
from evidence.setups import CONTROL, POLICIES, control_of, setup_of
from hypothesis import given
from hypothesis import strategies as st

from selective import RandomMask

GRID = (1e-3, 2e-3, 4e-3, 8e-3)


def record(run: Run, loss: float) -> dict:
    """The record of a run, as far as a plan reads it."""
    ends = {"diverged": not math.isfinite(loss), "validation": {"step": [0], "loss": [loss]}}
    return {"task": run.task, "setup": run.setup, "lr": run.lr, "rest_lr": run.rest_lr, "seed": run.seed,
            "part": run.part, **ends}  # fmt: skip


def carried_out(wanted: Callable[[Results], list[Run]], loss: Callable[[Run], float], most: int = 400) -> list[Run]:
    """The runs in the order in which one process makes them, if they end with these losses."""
    order: list[Run] = []
    results = Results([])
    while left := [run for run in wanted(results) if run not in order]:
        order.append(left[0])
        results = Results([*results.records, record(left[0], loss(left[0]))])
        assert len(order) <= most
    return order


def bowl(best: float, diverges: float = math.inf) -> Callable[[float], float]:
    """A loss that is lowest at a rate, and infinite from another one on."""
    return lambda lr: math.inf if lr >= diverges else math.log(lr / best) ** 2


@given(best=st.floats(1e-4, 8e-2), above=st.floats(1.0, 30.0))
def test_a_sweep_ends_with_its_best_rate_inside(best: float, above: float) -> None:
    loss = bowl(best, best * above)
    losses: dict[float, float] = {}
    while rates := next_rates(losses, GRID):
        losses[rates[0]] = loss(rates[0])
    assert len(losses) <= MOST_RATES
    assert set(losses) >= set(GRID)
    assert not at_edge(losses)
    lr = best_rate(losses)
    assert lr is not None
    assert loss(lr) <= min(loss(lr / 2), loss(2 * lr))


def test_a_sweep_that_only_diverges_goes_down_and_ends() -> None:
    losses: dict[float, float] = {}
    while rates := next_rates(losses, GRID):
        losses[rates[0]] = math.inf
    assert len(losses) == MOST_RATES
    assert min(losses) < min(GRID)
    assert max(losses) == max(GRID)
    assert best_rate(losses) is None
    assert at_edge(losses)


def test_the_order_of_the_first_stage() -> None:
    """Rates, seeds and controls of AdamW, then the same of Lion; every setup has three seeds at its best rate."""

    def loss(run: Run) -> float:
        best = (3e-3 if "AdamW" in run.setup else 3e-4) * (0.2 if "MGUP" in run.setup else 1)
        return bowl(best)(run.lr) + len(run.setup) + 0.1 * run.seed

    order = carried_out(lambda results: plan.wanted(results, [1]), loss)
    assert len({run.file for run in order}) == len(order)
    assert [run.setup for run in order[:4]] == ["AdamW"] * 4
    lion = next(index for index, run in enumerate(order) if "Lion" in run.setup)
    assert not any("AdamW" in run.setup for run in order[lion:])
    masked = [f"{name} on {base}" for base in ("AdamW", "Lion") for name in POLICIES]
    assert {run.setup for run in order} == {"AdamW", "Lion", *masked, *map(control_of, masked)}
    for setup in {run.setup for run in order}:
        mine = [run for run in order if run.setup == setup and run.part == 1]
        best = min((run for run in mine if run.seed == 0), key=loss).lr
        assert {run.seed for run in mine if run.lr == best} == {0, 1, 2}
        rates = {run.lr for run in mine if run.seed == 0}
        assert {best / 2, 2 * best} <= rates
        if setup.startswith(CONTROL):
            of = setup.removeprefix(CONTROL)
            theirs = [index for index, run in enumerate(order) if run.setup == of]
            assert min(order.index(run) for run in mine) > max(theirs)
    longer = [run for run in order if run.part != 1]
    assert {(run.setup, run.part) for run in longer} == {("AdamW", 1.5), ("Lion", 1.5)}
    assert len(longer) == 6
    mild = [run.lr for run in order if run.setup == "MGUP mild on AdamW" and run.seed == 0]
    assert min(mild) < min(sweeps.GRIDS["AdamW"]), "its best rate lies below the grid"


def test_seeds_wait_for_the_whole_sweep_but_other_sweeps_do_not() -> None:
    """So a second process finds it while the first one is at the last rate of a sweep."""
    runs = [Run("python-34m", "AdamW", lr) for lr in sweeps.GRIDS["AdamW"]]
    results = Results(record(run, bowl(3e-3)(run.lr)) for run in runs[:-1])
    left = [run for run in plan.wanted(results, [1]) if run not in runs[:-1]]
    assert left[0] == runs[-1]
    assert not [run for run in left if run.seed or CONTROL in run.setup]
    assert {run.setup for run in left} >= {f"{name} on AdamW" for name in POLICIES}


def test_a_setup_that_always_diverges_holds_nobody_up() -> None:
    def loss(run: Run) -> float:
        diverges = run.setup == "Cautious on AdamW"
        return math.inf if diverges else bowl(3e-3 if "AdamW" in run.setup else 3e-4)(run.lr)

    order = carried_out(lambda results: plan.wanted(results, [1]), loss)
    setups = [run.setup for run in order]
    assert setups.count("Cautious on AdamW") == MOST_RATES
    assert "random like Cautious on AdamW" not in setups
    assert setups.count("random like Cautious on Lion") >= 5


def test_names_of_setups() -> None:
    assert isinstance(setup_of("random like Cautious on Lion").policy, type(RandomMask.matching(POLICIES["Cautious"])))
    with pytest.raises(KeyError, match="'AdamW' has none"):
        setup_of("random like AdamW")
    with pytest.raises(KeyError):
        setup_of("Cautious")


def test_both_rates_are_swept_and_the_best_setups_go_on() -> None:
    """Stages 2 to 4, and 6: no best rate is left at an edge, and 110M is for the baselines and the two best at 34M."""
    offsets = {"Cautious on AdamW in Soap": -3.0, "Muon, whitened": -2.0}

    def loss(run: Run) -> float:
        best = sweeps.GRIDS[setup_of(run.setup).rates][1]
        own = run.lr if run.rest_lr is None else run.rest_lr
        wanted = 1.5 * (sweeps.first_rest(run.setup) or best)
        return 20 + offsets.get(run.setup, 0) + bowl(best)(run.lr) + bowl(wanted)(own) + 0.01 * run.seed

    order = carried_out(lambda results: plan.wanted(results, [2, 3, 4, 6]), loss, most=600)
    results = Results(record(run, loss(run)) for run in order)
    for setup in (
        *plan.APART,
        "Muon",
        *plan.MUON_MASKS,
        *plan.MUON_MORE,
        *plan.NORMS,
        *plan.MORE_NORMS,
        *plan.MUON_NORMS,
    ):
        point = best_point(results.points("python-34m", setup))
        assert point is not None
        assert results.by_seed("python-34m", setup, point).keys() == {0, 1, 2}, setup
        assert not at_edge(results.rest_losses("python-34m", setup, point[0])), setup
        mine = [run for run in order if run.setup == setup and run.task == "python-34m"]
        seeded = next(i for i, run in enumerate(mine) if run.seed and (run.lr, run.rest_lr) == point)
        assert not [run for run in mine[seeded:] if run.rest_lr not in (point[1], None)], "seeds come after the sweep"
    for setup in (plan.APART[-1], plan.NORMS[-1], plan.MUON_MASKS[0]):
        tried = [run for run in order if run.setup == control_of(setup)]
        best = min((run for run in tried if run.seed == 0), key=loss)
        assert {run.seed for run in tried if (run.lr, run.rest_lr) == (best.lr, best.rest_lr)} == {0, 1, 2}
        assert not at_edge({run.lr: loss(run) for run in tried if run.seed == 0 and run.rest_lr == best.rest_lr})
    closely = [*(("python-34m", name) for name in ("AdamW", "Muon", plan.NORMS[-1]))]
    closely += [("python-110m", name) for name in offsets]
    for task, setup in closely:
        points = {(lr, lr if rest is None else rest): x for (lr, rest), x in results.points(task, setup).items()}
        lr, rest = min(points, key=points.__getitem__)
        assert {(lr / 2, rest), (2 * lr, rest), (lr, rest / 2), (lr, 2 * rest)} <= points.keys(), setup
    large = [run for run in order if run.task == "python-110m"]
    assert {run.setup for run in large} == {"AdamW", "Muon", *offsets}
    for setup in ("Muon", *offsets):
        first = best_point(results.points("python-34m", setup))
        assert first is not None
        mine = [run for run in large if run.setup == setup]
        assert [(run.lr, run.rest_lr) for run in mine[:3]] == [(lr * first[0], first[1]) for lr in (0.5, 1, 2)]
        assert len(mine) < len([run for run in order if run.setup == setup and run.task == "python-34m"])
    longer = {(run.task, run.setup, run.part) for run in order if run.part not in (1, plan.THEIR_STEPS)}
    assert longer == {
        ("python-34m", "AdamW", plan.LONGER),
        ("python-110m", "AdamW", plan.LONGER),
        ("python-34m", plan.NORMS[-1], plan.SHORTER),
    }


@pytest.mark.parametrize("end, count", [(1.9, 3), (2.1, 1)])
def test_a_variant_gets_all_seeds_only_if_it_is_better_at_the_first(end: float, count: int) -> None:
    rival, variant = Run("toy", "Muon", 2e-2, rest_lr=4e-2), Run("toy", "Muon, whitened", 2e-2, rest_lr=4e-2)
    point = (2e-2, 4e-2)
    first = Results([record(rival, 2.0)])
    assert list(sweeps.screened(first, "toy", variant.setup, rival.setup, point)) == [variant]
    results = Results([record(rival, 2.0), record(variant, end)])
    found = {run.seed for run in sweeps.screened(results, "toy", variant.setup, rival.setup, point)}
    assert found == set(range(count))


def test_two_setups_of_one_family_are_not_both_in_the_short_list() -> None:
    families = (("Muon", "AdamW"), ("Lion",), ("AdamW in Soap",))
    ends = {"Muon": 1.0, "AdamW": 1.1, "AdamW in Soap": 1.2, "Lion": 1.3}
    runs = [Run("toy", setup, 1e-3, seed) for setup in ends for seed in (0, 1, 2)]
    results = Results(record(run, ends[run.setup]) for run in runs)
    assert best_setups(results, "toy", families, 2) == ["Muon", "AdamW in Soap"]
    some = Results(record(run, ends[run.setup]) for run in runs if (run.setup, run.seed) != ("Muon", 2))
    assert best_setups(some, "toy", families, 4) == ["AdamW", "AdamW in Soap", "Lion"], "Muon lacks a seed"
