"""The parts of a plan: sweeps over one learning rate or two, seeds at the best ones, and controls.

Each yields the runs that it wants, those that are done among them. Runs that depend on results come once those are
there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from evidence.runs import Point, Results, Run, best_of_seeds, best_rate, next_rates
from evidence.setups import control_of, setup_of

SEEDS = (0, 1, 2)
MORE_SEEDS = (0, 1, 2, 3, 4)  # of fine-tuning, whose differences are small
MOST_PAIRS = 30  # of rates, of a sweep over both
# A side of the best pair is not run if its rate was this much worse than the best one beside another second rate. With
# Muon and with norm control that difference moved by at most 0.02 with the second rate, with AdamW alone by 0.06.
FAR = 0.05
TIE = 0.001  # a pair that is at most this much worse than the best one with seed 0 gets all seeds as well
GRIDS: dict[str, tuple[float, ...]] = {
    "AdamW": (7.5e-4, 1.5e-3, 3e-3, 6e-3),
    "Lion": (7.5e-5, 1.5e-4, 3e-4, 6e-4),
    "Soap": (1.5e-3, 3e-3, 6e-3, 1.2e-2),
    "AdaDiag": (1e-3, 2e-3, 4e-3),
    "Muon": (1e-2, 2e-2, 4e-2, 8e-2),
    "norm control": (9e-3, 1.8e-2, 3.6e-2),  # relative to the norms of the matrices
    "norm control in Soap": (1.8e-2, 3.6e-2, 7.2e-2),
    "norm control of Muon": (9e-3, 1.8e-2, 3.6e-2),
}
# The rate of what is no inner matrix, at which the sweep of a setup with two rates begins. The later ones begin where
# the first ones ended.
RESTS = {"Muon": 3e-3, "norm control": 3e-3, "norm control in Soap": 6e-3, "norm control of Muon": 4.8e-2}


@dataclass(frozen=True)
class Start:
    """The start of a sweep: some learning rates, all with the same rate of what is no inner matrix.

    `rest` is None if that is the rate of the matrices.
    """

    grid: tuple[float, ...]
    rest: float | None = None

    def rests(self, lr: float) -> tuple[float, ...]:
        """The rates of what is no inner matrix at which its sweep begins; the matrices have the rate `lr`."""
        rest = lr if self.rest is None else self.rest
        return (rest / 2, rest, 2 * rest)


def grid_of(setup: str) -> tuple[float, ...]:
    """The learning rates at which the sweep of a setup begins."""
    return GRIDS[setup_of(setup).rates]


def first_rest(setup: str) -> float | None:
    """The rate of what is no inner matrix during the first sweep of a setup. None: that of the matrices.

    It has a number where the rates of the two have nothing to do with one another.
    """
    return RESTS.get(setup_of(setup).rates)


def start_of(setup: str) -> Start:
    """The start of a setup's sweep if nothing is known of it."""
    return Start(grid_of(setup), first_rest(setup))


def start_around(results: Results, task: str, setup: str) -> Start | None:
    """The start around the rates that were best for a setup on another task. None until it has all seeds there."""
    point = best_of_seeds(results, task, setup)
    if point is None or not results.by_seed(task, setup, point).keys() >= set(SEEDS):
        return None
    return Start((point[0] / 2, point[0], 2 * point[0]), point[1])


def sweep(results: Results, task: str, setup: str, start: Start | None = None) -> Iterator[Run]:
    """The runs of a sweep over learning rates with seed 0: those of its start, then the next one beyond an edge."""
    start = start or start_of(setup)
    losses = results.losses(task, setup, start.rest)
    for lr in sorted({*losses, *next_rates(losses, start.grid)}, key=lambda lr: (lr not in start.grid, lr)):
        yield Run(task, setup, lr, rest_lr=start.rest)


def settled(results: Results, task: str, setup: str, start: Start | None = None) -> float | None:
    """The best learning rate of a sweep that is done. None if it is not done, or if all of its runs diverged."""
    start = start or start_of(setup)
    losses = results.losses(task, setup, start.rest)
    return None if next_rates(losses, start.grid) else best_rate(losses)


def rest_sweep(results: Results, task: str, setup: str, start: Start | None = None) -> Iterator[Run]:
    """The runs of the sweep over the other rate, at the best rate of the matrices, once that is known."""
    start = start or start_of(setup)
    lr = settled(results, task, setup, start)
    if lr is None:
        return
    losses, grid = results.rest_losses(task, setup, lr), start.rests(lr)
    for rest in sorted({*losses, *next_rates(losses, grid)}, key=lambda rest: (rest not in grid, rest)):
        same = start.rest is None and rest == lr
        yield Run(task, setup, lr, rest_lr=None if same else rest)


def joint_sweep(results: Results, task: str, setup: str, start: Start | None = None) -> Iterator[Run]:
    """The runs on the sides of the best pair of rates, with seed 0, once both sweeps are done.

    They go on until it, and those that are tied with it, have no `open_sides` left, or until there are `MOST_PAIRS`.
    """
    start = start or start_of(setup)
    if not _swept(results, task, setup, start):
        return
    points = results.points(task, setup)
    yield from (_run(task, setup, point) for point in points)
    if len(points) < MOST_PAIRS:
        yield from (_run(task, setup, side) for near in contenders(points) for side in open_sides(points, near))


def contenders(points: Mapping[Point, float]) -> list[Point]:
    """The best pair of rates with seed 0, and those that are at most `TIE` worse, the best one first."""
    least = min(points.values(), default=math.inf)
    near = [point for point, loss in points.items() if math.isfinite(loss) and loss <= least + TIE]
    return sorted(near, key=points.__getitem__)


def open_sides(points: Mapping[Point, float], best: Point) -> list[Point]:
    """The pairs beside a good one, with half or twice of one rate, that may be better for all that is known."""
    known = {_pair(point): loss for point, loss in points.items()}
    lr, rest = _pair(best)
    sides = [(lr / 2, rest), (2 * lr, rest), (lr, rest / 2), (lr, 2 * rest)]
    return [side for side in sides if side not in known and not _far_worse(known, (lr, rest), side)]


def _far_worse(
    known: Mapping[tuple[float, float], float], best: tuple[float, float], side: tuple[float, float]
) -> bool:
    """True if the rate in which a side differs was worse by `FAR`, at all the nearest other rates where both ran."""
    one = 0 if side[0] != best[0] else 1

    def by_other_rate(rate: float) -> dict[float, float]:
        return {pair[1 - one]: loss for pair, loss in known.items() if pair[one] == rate}

    theirs, mine = by_other_rate(side[one]), by_other_rate(best[one])
    away = {rate: abs(math.log(rate / best[1 - one])) for rate in theirs.keys() & mine.keys()}
    nearest = [rate for rate, distance in away.items() if distance < min(away.values()) + 0.1]  # half and twice of it
    return bool(nearest) and all(theirs[rate] - mine[rate] > FAR for rate in nearest)


def _pair(point: Point) -> tuple[float, float]:
    """Both rates of a point that may have one for all."""
    lr, rest = point
    return lr, lr if rest is None else rest


def _swept(results: Results, task: str, setup: str, start: Start) -> bool:
    """True once the sweeps over either rate are done, and one run at least has not diverged."""
    lr = settled(results, task, setup, start)
    return lr is not None and not next_rates(results.rest_losses(task, setup, lr), start.rests(lr))


def tied(results: Results, task: str, setup: str, start: Start | None = None) -> list[Point]:
    """The best pair of rates, and those that are at most `TIE` worse, once the joint sweep is done."""
    start, points = start or start_of(setup), results.points(task, setup)
    found = contenders(points)
    unfinished = len(points) < MOST_PAIRS and any(open_sides(points, point) for point in found)
    return found if _swept(results, task, setup, start) and not unfinished else []


def chosen(results: Results, task: str, setup: str, start: Start | None = None) -> Point | None:
    """The pair of rates with the lowest mean loss over the seeds, once all that are tied have them."""
    points = tied(results, task, setup, start)
    whole = all(results.by_seed(task, setup, point).keys() >= set(SEEDS) for point in points)
    return best_of_seeds(results, task, setup) if points and whole else None


def _run(task: str, setup: str, point: Point) -> Run:
    return Run(task, setup, point[0], rest_lr=point[1])


def all_seeds(task: str, setup: str, point: Point, part: float = 1.0, which: Sequence[int] = SEEDS) -> Iterator[Run]:
    """The runs of all seeds at a pair of rates."""
    yield from (Run(task, setup, point[0], seed, point[1], part) for seed in which)


def seeds(
    results: Results,
    task: str,
    setup: str,
    start: Start | None = None,
    part: float = 1.0,
    apart: bool = False,
    which: Sequence[int] = SEEDS,
) -> Iterator[Run]:
    """The runs of all seeds at the best rate, or with `apart` at the best pairs of rates, once those are known.

    Another `part` of the steps has the pair that was chosen with all steps.
    """
    start = start or start_of(setup)
    if not apart:
        lr = settled(results, task, setup, start)
        points = [] if lr is None else [(lr, start.rest)]
    elif part == 1:
        points = tied(results, task, setup, start)
    else:
        point = chosen(results, task, setup, start)
        points = [] if point is None else [point]
    for point in points:
        yield from all_seeds(task, setup, point, part, which)


def screened(results: Results, task: str, setup: str, rival: str, point: Point) -> Iterator[Run]:
    """A setup at a rival's best pair of rates: seed 0, and the other seeds only if it ends below the rival's there."""
    yield _run(task, setup, point)
    mine, theirs = (results.points(task, name).get(point) for name in (setup, rival))
    if mine is not None and theirs is not None and mine < theirs:
        yield from all_seeds(task, setup, point)


def control_start(results: Results, task: str, setup: str, start: Start | None = None) -> Start | None:
    """The start of the sweep of a setup's control: the setup's best rate, and the better one beside it.

    What is no inner matrix has the rate that is best for the setup. None if those are not known yet.
    """
    start = start or start_of(setup)
    if start.rest is None:
        point = settled(results, task, setup, start), None
    else:
        point = chosen(results, task, setup, start) or (None, None)
    lr, rest = point
    if lr is None:
        return None
    losses = results.losses(task, setup, rest)
    beside = [rate for rate in (lr / 2, 2 * lr) if rate in losses]
    return Start((lr, *sorted(beside, key=losses.__getitem__)[:1]), rest)


def control(
    results: Results, task: str, setup: str, start: Start | None = None, which: Sequence[int] = SEEDS
) -> Iterator[Run]:
    """The first two rates of a setup's control, and its seeds at the better one."""
    name, begin = control_of(setup), control_start(results, task, setup, start)
    if begin is None:
        return
    yield from (Run(task, name, lr, rest_lr=begin.rest) for lr in begin.grid)
    losses = results.losses(task, name, begin.rest)
    if losses.keys() >= set(begin.grid) and (lr := best_rate(losses)) is not None:
        yield from all_seeds(task, name, (lr, begin.rest), which=which)


def swept_control(results: Results, task: str, setup: str) -> Iterator[Run]:
    """The whole sweep of a setup's control, over both rates if the setup has two, and its seeds at the best."""
    name, start = control_of(setup), control_start(results, task, setup)
    if start is None:
        return
    apart = start.rest is not None
    yield from sweep(results, task, name, start)
    if apart:
        yield from rest_sweep(results, task, name, start)
        yield from joint_sweep(results, task, name, start)
    yield from seeds(results, task, name, start, apart=apart)
