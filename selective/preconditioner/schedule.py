"""The schedule of refreshes, as a function of a parameter's step count and its place."""

from __future__ import annotations

from typing import Literal

Stagger = Literal[True, False, "shapes"]

FIRST_ROUND = 10
"""Number of steps in which staggered parameters get their first basis. It is made by the slowest solver, so not all in
one step. But no parameter should wait for all of a long interval."""


def is_due(steps: int, place: int, count: int, *, start: int, every: int, stagger: bool) -> bool:
    """Return True if parameter `place` of `count` is refreshed after it has taken `steps` steps.

    Without `stagger`, all are refreshed in steps `start`, `start + every`, and so on. With it, each is refreshed once
    in a first round, and then once in any `every` steps in a row. Then at most ⌈count / every⌉ are due in a step, and
    in the first round at most ⌈count / 10⌉ more.
    """
    since = steps - start
    if not stagger:
        return since >= 0 and since % every == 0
    first = place * min(every, FIRST_ROUND) // count
    return since == first or (since > first and since % every == place * every // count)
