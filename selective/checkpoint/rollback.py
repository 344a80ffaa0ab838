"""Loading all or nothing: everything is put back if it fails half-way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer

from selective.base.mismatch import CheckpointMismatch
from selective.plan.groups import Groups
from selective.state.store import StateStore
from selective.step_count import StepCount


@contextmanager
def rollback(
    base: Optimizer, groups: Groups, store: StateStore, count: StepCount, wrap_error: Callable[[str], ValueError]
) -> Iterator[None]:
    """Put the base and all parts back as they were if the body raises.

    `wrap_error` turns the reason into the error that is raised. A `CheckpointMismatch` is raised again as it is.
    """
    undo = snapshot(base, groups, store, count)
    try:
        yield
    except BaseException as error:
        undo()
        if not isinstance(error, Exception) or isinstance(error, CheckpointMismatch):
            raise
        reason = str(error).removeprefix("SelectiveUpdate: ")
        raise wrap_error(f"{type(error).__name__}: {reason}") from error


def snapshot(base: Optimizer, groups: Groups, store: StateStore, count: StepCount) -> Callable[[], None]:
    """Return a function that puts the base and all parts back as they are now."""
    undo_all = [base_snapshot(base), store.snapshot(), groups.snapshot(), count.snapshot()]

    def undo() -> None:
        for undo_part in undo_all:
            undo_part()

    return undo


def base_snapshot(base: Optimizer) -> Callable[[], None]:
    """Return a function that puts the base back as it is now: attributes, groups and the state of each parameter."""
    groups = base.param_groups
    # torch's load replaces these; a base with one of its own may write into them
    dictionaries: list[Any] = [vars(base), base.state, *groups, *base.state.values()]
    contents = [(one, dict(one)) for one in dictionaries if isinstance(one, dict)]
    members = list(groups)

    def undo() -> None:
        for dictionary, content in contents:
            dictionary.clear()
            dictionary.update(content)
        groups[:] = members

    return undo
