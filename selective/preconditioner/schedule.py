"""When a basis is refreshed: a pure function of the step and of the parameter's place."""

from __future__ import annotations

FIRST_ROUND = 10
"""Steps within which staggered parameters get their first basis. It is made by the dearest solver, so not all in one
step; but a parameter should not go without one for all of a long interval either."""


def is_due(steps: int, place: int, count: int, *, start: int, every: int, stagger: bool) -> bool:
    """Whether parameter `place` of `count` is refreshed in the step before which `steps` were taken.

    All together in the steps `start`, `start + every`, ...; staggered, each once in any `every` steps in a row, after
    a first round of its own. In no step are more than ⌈count / every⌉ due then, in the first round ⌈count / 10⌉ more.
    """
    since = steps - start
    if not stagger:
        return since >= 0 and since % every == 0
    first = place * min(every, FIRST_ROUND) // count
    return since == first or (since > first and since % every == place * every // count)
