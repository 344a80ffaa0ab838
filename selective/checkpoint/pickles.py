"""Copies and pickles of whole optimizers. Between versions a run goes on by `state_dict()`; a pickle does not.

Note [versions of pickles]: a pickle names classes of this library by their modules, which move from version to version.
So the version stands first in it, and is looked at while it is read: before anything that could not be found.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from selective.plan.groups import Groups
from selective.plan.options import Options
from selective.state.store import StateStore
from selective.step_count import StepCount
from selective.version import __version__


class Version:
    """The version of the library that a pickle was made by."""

    def __init__(self, version: str = __version__) -> None:
        self.version = version

    def __reduce__(self) -> Any:
        return same_version, (self.version,)


def same_version(version: str | None) -> Version:
    """Return the version in a pickle; raise if it is not the running one."""
    if version != __version__:
        made = "a version that did not write its number" if version is None else f"version {version}"
        raise ValueError(
            f"SelectiveUpdate: this pickle of a whole optimizer was made by {made} of selective, and this is version "
            f"{__version__}: only the version that made a pickle can read it. Save state_dict() with that version, "
            f"and load it here with load_state_dict()"
        )
    return Version()


def contents(base: Optimizer, options: Options, groups: Groups, store: StateStore, count: StepCount) -> dict[str, Any]:
    """Return all that a copy is made of. Anything else is made anew, or is not copied: hooks, tables, reports."""
    return {
        "version": Version(),
        "base": base,
        "options": options,
        "steps": count.read(),
        "seed": count.seed,
        "skipped": count.skipped,
        "default": groups.default,
        "policies": groups.policies,
        "choices": groups.choices(),
        "entries": store.table,
    }


def parts(state: Mapping[str, Any]) -> tuple[Optimizer, Options, Groups, StateStore, StepCount]:
    """Rebuild base, options, groups, store and count from what `contents` returned."""
    if "version" not in state:
        same_version(None)
    base, options, count = state["base"], state["options"], StepCount(state["seed"], state["steps"], state["skipped"])
    groups = Groups(base, options, state["default"], state["policies"], state["choices"])
    return base, options, groups, StateStore(base, options, count, state["entries"]), count
