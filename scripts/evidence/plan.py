"""The plan: which runs are wanted, in the order in which they are made, in stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from evidence.runs import Results, Run, best_rate, next_rates
from evidence.setups import POLICIES, control_of

SEEDS = (0, 1, 2)
LONGER = 1.5  # the share of the steps that the baseline gets in the comparison of whole schedules
GRIDS: dict[str, tuple[float, ...]] = {
    "AdamW": (7.5e-4, 1.5e-3, 3e-3, 6e-3),
    "Lion": (7.5e-5, 1.5e-4, 3e-4, 6e-4),
}
Plan = Callable[[Results], Iterator[Run]]


def sweep(results: Results, task: str, setup: str, grid: Sequence[float]) -> Iterator[Run]:
    """The runs that a setup's sweep over learning rates still needs, with seed 0, and those that it has."""
    losses = results.losses(task, setup)
    for lr in sorted({*losses, *next_rates(losses, grid)}, key=lambda lr: (lr not in grid, lr)):
        yield Run(task, setup, lr)


def settled(results: Results, task: str, setup: str, grid: Sequence[float]) -> float | None:
    """The best learning rate of a sweep that is done. None if it is not done, or if all of its runs diverged."""
    losses = results.losses(task, setup)
    return None if next_rates(losses, grid) else best_rate(losses)


def seeds(
    results: Results, task: str, setup: str, grid: Sequence[float], part: float = 1.0, all_seeds: Sequence[int] = SEEDS
) -> Iterator[Run]:
    """The runs of all seeds at the best learning rate, once the sweep is done."""
    lr = settled(results, task, setup, grid)
    if lr is not None:
        yield from (Run(task, setup, lr, seed, part=part) for seed in all_seeds)


def around(results: Results, task: str, setup: str, grid: Sequence[float]) -> tuple[float, ...]:
    """The two learning rates at which a control begins: the best of its policy, and the better one beside it."""
    lr = settled(results, task, setup, grid)
    if lr is None:
        return ()
    losses = results.losses(task, setup)
    beside = [rate for rate in (lr / 2, 2 * lr) if rate in losses]
    return (lr, *sorted(beside, key=losses.__getitem__)[:1])


def masks(results: Results, task: str, base: str, policies: Sequence[str]) -> Iterator[Run]:
    """A base bare and with each policy: sweeps, seeds at the best rates, then the same of the controls.

    A control has two rates at first. Its sweep goes on to the rates beside its best at the end, when everything else
    is done, and its seeds are at the best of those that it has.
    """
    grid = GRIDS[base]
    masked = [f"{name} on {base}" for name in policies]
    for setup in (base, *masked):
        yield from sweep(results, task, setup, grid)
    for setup in (base, *masked):
        yield from seeds(results, task, setup, grid)
    yield from seeds(results, task, base, grid, LONGER)
    for setup in masked:
        yield from _control(results, task, setup, grid)
    for setup in masked:
        if two := around(results, task, setup, grid):
            yield from sweep(results, task, control_of(setup), two)
            yield from seeds(results, task, control_of(setup), two)


def _control(results: Results, task: str, setup: str, grid: Sequence[float]) -> Iterator[Run]:
    """The first two rates of a setup's control, and its seeds at the better one."""
    control, two = control_of(setup), around(results, task, setup, grid)
    yield from (Run(task, control, lr) for lr in two)
    losses = results.losses(task, control)
    if two and losses.keys() >= set(two) and (lr := best_rate(losses)) is not None:
        yield from (Run(task, control, lr, seed) for seed in SEEDS)


def stage_1(results: Results) -> Iterator[Run]:
    """34M on Python source: AdamW and Lion, bare and with each mask, and the controls."""
    for base in ("AdamW", "Lion"):
        yield from masks(results, "python-34m", base, list(POLICIES))


STAGES: dict[int, Plan] = {1: stage_1}


def wanted(results: Results, stages: Sequence[int]) -> list[Run]:
    """The runs of some stages, each once. Runs that depend on results are among them once those are there."""
    return list(dict.fromkeys(run for stage in stages for run in STAGES[stage](results)))
