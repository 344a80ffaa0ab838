"""The parts of a plan: sweeps over one learning rate or two, seeds at the best ones, and controls.

Each yields the runs that it wants, those that are done among them. Runs that depend on results come once those are
there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from evidence.runs import Point, Results, Run, best_point, best_rate, next_rates
from evidence.setups import control_of, setup_of

SEEDS = (0, 1, 2)
MORE_SEEDS = (0, 1, 2, 3, 4)  # of fine-tuning, whose differences are small
GRIDS: dict[str, tuple[float, ...]] = {
    "AdamW": (7.5e-4, 1.5e-3, 3e-3, 6e-3),
    "Lion": (7.5e-5, 1.5e-4, 3e-4, 6e-4),
    "Soap": (1.5e-3, 3e-3, 6e-3, 1.2e-2),
    "AdaDiag": (1e-3, 2e-3, 4e-3),
    "Muon": (1e-2, 2e-2, 4e-2, 8e-2),
    "norm control": (9e-3, 1.8e-2, 3.6e-2),  # relative to the norms of the matrices
}
REST = 3e-3  # the rate of what is no inner matrix, at which the sweep of a setup with two bases begins


def grid_of(setup: str) -> tuple[float, ...]:
    """The learning rates at which the sweep of a setup begins."""
    return GRIDS[setup_of(setup).rates]


def first_rest(setup: str) -> float | None:
    """The rate of what is no inner matrix during the first sweep of a setup. None: that of the matrices.

    It is `REST` where the rates of the two have nothing to do with one another.
    """
    return REST if setup_of(setup).rates in ("Muon", "norm control") else None


def sweep(results: Results, task: str, setup: str, grid: Sequence[float] = ()) -> Iterator[Run]:
    """The runs of a sweep over learning rates with seed 0: those of the grid, then the next one beyond an edge."""
    grid, rest = grid or grid_of(setup), first_rest(setup)
    losses = results.losses(task, setup, rest)
    for lr in sorted({*losses, *next_rates(losses, grid)}, key=lambda lr: (lr not in grid, lr)):
        yield Run(task, setup, lr, rest_lr=rest)


def settled(results: Results, task: str, setup: str, grid: Sequence[float] = ()) -> float | None:
    """The best learning rate of a sweep that is done. None if it is not done, or if all of its runs diverged."""
    losses = results.losses(task, setup, first_rest(setup))
    return None if next_rates(losses, grid or grid_of(setup)) else best_rate(losses)


def rest_grid(setup: str, lr: float) -> tuple[float, ...]:
    """The rates of what is no inner matrix at which its sweep begins."""
    return (REST / 2, REST, 2 * REST) if first_rest(setup) else (lr / 4, lr / 2, lr, 2 * lr)


def rest_sweep(results: Results, task: str, setup: str) -> Iterator[Run]:
    """The runs of the sweep over the other rate, at the best rate of the matrices, once that is known."""
    lr = settled(results, task, setup)
    if lr is None:
        return
    losses = results.rest_losses(task, setup, lr)
    grid = rest_grid(setup, lr)
    for rest in sorted({*losses, *next_rates(losses, grid)}, key=lambda rest: (rest not in grid, rest)):
        same = first_rest(setup) is None and rest == lr
        yield Run(task, setup, lr, rest_lr=None if same else rest)


def rest_settled(results: Results, task: str, setup: str) -> Point | None:
    """The best pair of rates, once both sweeps are done."""
    lr = settled(results, task, setup)
    if lr is None or next_rates(results.rest_losses(task, setup, lr), rest_grid(setup, lr)):
        return None
    return best_point(results.points(task, setup))


def seeds(
    results: Results,
    task: str,
    setup: str,
    grid: Sequence[float] = (),
    part: float = 1.0,
    apart: bool = False,
    all_seeds: Sequence[int] = SEEDS,
) -> Iterator[Run]:
    """The runs of all seeds at the best rate, or with `apart` at the best pair of rates, once it is known."""
    if apart:
        point = rest_settled(results, task, setup)
    else:
        lr = settled(results, task, setup, grid)
        point = None if lr is None else (lr, first_rest(setup))
    if point is not None:
        yield from (Run(task, setup, point[0], seed, point[1], part) for seed in all_seeds)


def around(results: Results, task: str, setup: str, grid: Sequence[float] = ()) -> tuple[float, ...]:
    """The two learning rates at which a control begins: the best of its policy, and the better one beside it."""
    lr = settled(results, task, setup, grid)
    if lr is None:
        return ()
    losses = results.losses(task, setup, first_rest(setup))
    beside = [rate for rate in (lr / 2, 2 * lr) if rate in losses]
    return (lr, *sorted(beside, key=losses.__getitem__)[:1])


def control(
    results: Results, task: str, setup: str, grid: Sequence[float] = (), all_seeds: Sequence[int] = SEEDS
) -> Iterator[Run]:
    """The first two rates of a setup's control, and its seeds at the better one.

    What is no inner matrix has the rate that is best for the setup, where that is another one.
    """
    name, rest, two = control_of(setup), first_rest(setup), around(results, task, setup, grid)
    if rest is not None:
        point = rest_settled(results, task, setup)
        rest, two = (None, ()) if point is None else (point[1], two)
    yield from (Run(task, name, lr, rest_lr=rest) for lr in two)
    losses = results.losses(task, name, rest)
    if two and losses.keys() >= set(two) and (lr := best_rate(losses)) is not None:
        yield from (Run(task, name, lr, seed, rest) for seed in all_seeds)


def swept_control(results: Results, task: str, setup: str) -> Iterator[Run]:
    """The whole sweep of a setup's control, which begins at its first two rates, and its seeds."""
    if two := around(results, task, setup):
        yield from sweep(results, task, control_of(setup), two)
        yield from seeds(results, task, control_of(setup), two)
