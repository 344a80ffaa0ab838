"""The parts of a plan: sweeps over one learning rate or two, seeds at the best ones, and controls.

Each yields the runs that it wants, those that are done among them. Runs that depend on results come once those are
there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from evidence.runs import Point, Results, Run, best_point, best_rate, next_rates
from evidence.setups import control_of, setup_of

SEEDS = (0, 1, 2)
MORE_SEEDS = (0, 1, 2, 3, 4)  # of fine-tuning, whose differences are small
MOST_PAIRS = 20  # of rates, of a sweep over both
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
    """The start around the rates that were best for a setup on another task. None if those are unknown."""
    point = best_point(results.points(task, setup))
    return None if point is None else Start((point[0] / 2, point[0], 2 * point[0]), point[1])


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
    """The runs on all four sides of the best pair of rates, with seed 0, once both sweeps are done.

    They go on until the best pair has a worse one on either side in both rates, or has `MOST_PAIRS` of them.
    """
    start = start or start_of(setup)
    if rest_settled(results, task, setup, start) is None:
        return
    points = results.points(task, setup)
    yield from (_run(task, setup, point) for point in points)
    if len(points) < MOST_PAIRS:
        yield from (_run(task, setup, point) for point in _around(best_point(points)) if not _has(points, point))


def joint_settled(results: Results, task: str, setup: str, start: Start | None = None) -> Point | None:
    """The best pair of rates, once the joint sweep is done."""
    point, points = rest_settled(results, task, setup, start), results.points(task, setup)
    if point is None or (len(points) < MOST_PAIRS and not all(_has(points, beside) for beside in _around(point))):
        return None
    return point


def _around(point: Point | None) -> list[Point]:
    """The pairs on all four sides of one."""
    if point is None:
        return []
    lr, rest = point[0], point[0] if point[1] is None else point[1]
    return [(lr / 2, rest), (2 * lr, rest), (lr, rest / 2), (lr, 2 * rest)]


def _has(points: Mapping[Point, float], point: Point) -> bool:
    """True if a pair was run. Where both rates are the same one, it may have been run as a single one."""
    lr, rest = point
    return point in points or (rest == lr and (lr, None) in points)


def _run(task: str, setup: str, point: Point) -> Run:
    return Run(task, setup, point[0], rest_lr=point[1])


def rest_settled(results: Results, task: str, setup: str, start: Start | None = None) -> Point | None:
    """The best pair of rates, once both sweeps are done."""
    start = start or start_of(setup)
    lr = settled(results, task, setup, start)
    if lr is None or next_rates(results.rest_losses(task, setup, lr), start.rests(lr)):
        return None
    return best_point(results.points(task, setup))


def seeds(
    results: Results,
    task: str,
    setup: str,
    start: Start | None = None,
    part: float = 1.0,
    apart: bool = False,
    all_seeds: Sequence[int] = SEEDS,
    joint: bool = False,
) -> Iterator[Run]:
    """The runs of all seeds at the best rate, or with `apart` at the best pair of rates, once it is known.

    With `joint`, that is the best one of the joint sweep.
    """
    start = start or start_of(setup)
    if apart:
        point = (joint_settled if joint else rest_settled)(results, task, setup, start)
    else:
        lr = settled(results, task, setup, start)
        point = None if lr is None else (lr, start.rest)
    if point is not None:
        yield from (Run(task, setup, point[0], seed, point[1], part) for seed in all_seeds)


def screened(results: Results, task: str, setup: str, rival: str, point: Point) -> Iterator[Run]:
    """A setup at a rival's best pair of rates: seed 0, and the other seeds only if it ends below the rival's there."""
    first = _run(task, setup, point)
    yield first
    mine, theirs = (results.points(task, name).get(point) for name in (setup, rival))
    if mine is not None and theirs is not None and mine < theirs:
        yield from (Run(task, setup, point[0], seed, point[1]) for seed in SEEDS)


def control_start(results: Results, task: str, setup: str, start: Start | None = None) -> Start | None:
    """The start of the sweep of a setup's control. None if that is not known yet.

    It has two rates at first: the best of its policy, and the better one beside it. What is no inner matrix has the
    rate that is best for the setup, where that is another one.
    """
    start = start or start_of(setup)
    lr = settled(results, task, setup, start)
    if lr is None:
        return None
    losses = results.losses(task, setup, start.rest)
    beside = [rate for rate in (lr / 2, 2 * lr) if rate in losses]
    grid = (lr, *sorted(beside, key=losses.__getitem__)[:1])
    if start.rest is None:
        return Start(grid)
    point = rest_settled(results, task, setup, start)
    return None if point is None else Start(grid, point[1])


def control(
    results: Results, task: str, setup: str, start: Start | None = None, all_seeds: Sequence[int] = SEEDS
) -> Iterator[Run]:
    """The first two rates of a setup's control, and its seeds at the better one."""
    name, begin = control_of(setup), control_start(results, task, setup, start)
    if begin is None:
        return
    yield from (Run(task, name, lr, rest_lr=begin.rest) for lr in begin.grid)
    losses = results.losses(task, name, begin.rest)
    if losses.keys() >= set(begin.grid) and (lr := best_rate(losses)) is not None:
        yield from (Run(task, name, lr, seed, begin.rest) for seed in all_seeds)


def swept_control(results: Results, task: str, setup: str) -> Iterator[Run]:
    """The whole sweep of a setup's control, over both rates if the setup has two, and its seeds at the best."""
    name, start = control_of(setup), control_start(results, task, setup)
    if start is None:
        return
    apart = start.rest is not None
    yield from sweep(results, task, name, start)
    if apart:
        yield from rest_sweep(results, task, name, start)
    yield from seeds(results, task, name, start, apart=apart)
