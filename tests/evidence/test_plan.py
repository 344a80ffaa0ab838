"""The plan of scripts/evidence: no best rate is left at an edge, and the order of runs."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from evidence import plan, sweeps
from evidence.ranking import best_setups
from evidence.runs import MOST_RATES, Results, Run, at_edge, best_rate, next_rates
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


TWO_RATES = (
    *plan.APART, plan.RIVALS[0], "Muon", *plan.MUON_MASKS, *plan.MUON_MORE, *plan.NORMS, *plan.MORE_NORMS,
    *plan.MUON_NORMS, *(control_of(setup) for setup in (plan.NORMS[-1], plan.MUON_MASKS[0])),
)  # fmt: skip


@pytest.fixture(scope="module")
def carried() -> tuple[list[Run], Callable[[Run], float]]:
    """Stages 2 to 4, and 6, with losses whose best second rate depends on the first one, as AdamW's does."""
    offsets = {"Cautious on AdamW in Soap, norm controlled": -3.0, "Muon, whitened": -2.0}

    def loss(run: Run) -> float:
        best = sweeps.GRIDS[setup_of(run.setup).rates][1]
        own = run.lr if run.rest_lr is None else run.rest_lr
        wanted = 6 * (sweeps.first_rest(run.setup) or best)
        away, off = math.log2(run.lr / best), math.log2(own / wanted)
        return 20 + offsets.get(run.setup, 0) + 0.03 * (away**2 + off**2 + away * off) + 0.01 * run.seed

    return carried_out(lambda results: plan.wanted(results, [2, 3, 4, 6]), loss, most=900), loss


def test_both_rates_are_swept_until_the_best_pair_has_worse_ones_on_all_sides(
    carried: tuple[list[Run], Callable[[Run], float]],
) -> None:
    order, loss = carried
    results = Results(record(run, loss(run)) for run in order)
    for task, setup in [
        *((plan.HOME, setup) for setup in TWO_RATES),
        ("python-110m", "AdamW"),
        ("python-110m", "Muon"),
    ]:
        mine = [run for run in order if (run.task, run.setup, run.part) == (task, setup, 1)]
        best = min((run for run in mine if run.seed == 0), key=loss)
        own = best.lr if best.rest_lr is None else best.rest_lr
        sides = [(best.lr / 2, own), (2 * best.lr, own), (best.lr, own / 2), (best.lr, 2 * own)]
        assert all(loss(Run(task, setup, lr, 0, rest)) > loss(best) for lr, rest in sides), (task, setup)
        of = setup.removeprefix(CONTROL)
        start = sweeps.start_of(setup) if of == setup else sweeps.control_start(results, task, of)
        start = start if task == plan.HOME else sweeps.start_around(results, plan.HOME, setup)
        assert sweeps.chosen(results, task, setup, start) in {(best.lr, best.rest_lr), (best.lr, own)}, (task, setup)
        apart = [run for run in mine if run.rest_lr is not None or sweeps.first_rest(setup) is not None]
        seeded = [(run.lr, run.rest_lr) for run in apart if run.seed]
        assert set(seeded) <= set(sweeps.tied(results, task, setup, start)), "no seed but at the best pairs"
        last = max(order.index(run) for run in apart if not run.seed)
        assert all(order.index(run) > last for run in apart if run.seed), "seeds come after the sweep"


def test_the_best_at_34m_go_on_to_110m(carried: tuple[list[Run], Callable[[Run], float]]) -> None:
    order, _ = carried
    large = [run for run in order if run.task == "python-110m"]
    masked = "Cautious on AdamW in Soap, norm controlled"
    assert list(dict.fromkeys(run.setup for run in large)) == [
        "AdamW", masked, "AdamW in Soap, norm controlled", control_of(masked), "Muon", "Muon, whitened",
    ]  # fmt: skip
    results = Results(record(run, 0.0) for run in order)
    for setup in ("AdamW", "Muon", masked, "Muon, whitened"):
        home = [run for run in order if run.setup == setup and run.task == plan.HOME and run.seed == 2]
        lr, rest = home[-1].lr, home[-1].rest_lr
        mine = [run for run in large if run.setup == setup]
        assert [(run.lr, run.rest_lr) for run in mine[:3]] == [(lr / 2, rest), (lr, rest), (2 * lr, rest)]
        assert len(mine) < len(results.of(plan.HOME, setup))
    at = {(run.lr, run.rest_lr) for run in large if run.setup == masked and run.seed}
    for setup in ("AdamW in Soap, norm controlled", control_of(masked)):
        beside = [run for run in large if run.setup == setup]
        assert {(run.lr, run.rest_lr) for run in beside} == at and {run.seed for run in beside} == {0, 1, 2}
    longer = {(run.task, run.setup, run.part) for run in order if run.part not in (1, plan.THEIR_STEPS)}
    assert longer == {
        (plan.HOME, "AdamW", plan.LONGER), ("python-110m", "AdamW", plan.LONGER),
        (plan.HOME, plan.NORMS[-1], plan.SHORTER),
    }  # fmt: skip


def test_a_side_is_not_tried_where_its_rate_is_far_worse_at_another_one() -> None:
    best = (2.0, 4.0)
    around = {best: 1.0, (2.0, 2.0): 1.01, (2.0, 8.0): 1.02, (1.0, 4.0): 1.01}
    assert sweeps.open_sides(around, best) == [(4.0, 4.0)]
    far = 1.01 + 2 * sweeps.FAR
    assert sweeps.open_sides({**around, (4.0, 2.0): far}, best) == []
    assert sweeps.open_sides({**around, (4.0, 2.0): 1.02}, best) == [(4.0, 4.0)]
    bad = {(4.0, 1.0): far, (2.0, 1.0): far}
    assert sweeps.open_sides({**around, **bad}, best) == [(4.0, 4.0)], "both are bad at that one"
    for scale in (1e-3, 3e-3, 6e-3, 2.4e-2, 4.8e-2):  # of two that are equally near, both have to be far worse
        known = {(lr, scale * rest): loss for (lr, rest), loss in {**around, (4.0, 2.0): far, (4.0, 8.0): 1.03}.items()}
        assert sweeps.open_sides(known, (2.0, 4 * scale)) == [(4.0, 4 * scale)]
    assert sweeps.open_sides({(2.0, None): 1.0}, (2.0, None)) == [(1.0, 2.0), (4.0, 2.0), (2.0, 1.0), (2.0, 4.0)]
    assert sweeps.contenders({(2.0, None): math.inf}) == []


def test_tied_pairs_have_all_seeds_and_the_mean_decides() -> None:
    grid = [(lr, rest) for lr in (1e-2, 2e-2, 4e-2, 8e-2) for rest in (1.5e-3, 3e-3, 6e-3)]
    first = {(2e-2, 3e-3): 2.0, (2e-2, 6e-3): 2.0 + 0.9 * sweeps.TIE, (4e-2, 3e-3): 2.0 + 1.1 * sweeps.TIE}
    runs = [Run("toy", "Muon", lr, rest_lr=rest) for lr, rest in grid]
    records = [record(run, first.get((run.lr, run.rest_lr), 2.1)) for run in runs]
    results = Results(records)
    more = [run for run in sweeps.joint_sweep(results, "toy", "Muon") if run not in runs]
    assert [(run.lr, run.rest_lr) for run in more] == [(2e-2, 1.2e-2)], "the side of the tied pair is wanted"
    assert sweeps.tied(results, "toy", "Muon") == []
    runs, records = [*runs, *more], [*records, *(record(run, 2.1) for run in more)]
    results = Results(records)
    assert sweeps.chosen(results, "toy", "Muon") is None
    wanted = [run for run in sweeps.seeds(results, "toy", "Muon", apart=True) if run not in runs]
    assert [(run.lr, run.rest_lr, run.seed) for run in wanted] == [
        (2e-2, 3e-3, 1), (2e-2, 3e-3, 2), (2e-2, 6e-3, 1), (2e-2, 6e-3, 2),
    ]  # fmt: skip
    done = Results([*records, *(record(run, 2.0 if run.rest_lr == 6e-3 else 2.01) for run in wanted)])
    assert sweeps.chosen(done, "toy", "Muon") == (2e-2, 6e-3)
    longer = list(sweeps.seeds(done, "toy", "Muon", part=1.5, apart=True))
    assert {(run.lr, run.rest_lr, run.part) for run in longer} == {(2e-2, 6e-3, 1.5)}


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
