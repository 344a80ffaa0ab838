"""The line of `explain()` on the learning rate: by how much a policy or a rotation changes the length of a step.

Sources: the mean multipliers follow from the policy's numbers, and stand in docs/guides/choose-a-policy.md and
docs/reference/rules.md. The rates of rotated spaces are those that were best in the runs of docs/evidence.md
and of docs/how-it-works/rotation.md ("What it gains"): with running averages 2 to 4 times the base's (0.004 for 0.002,
0.008 for 0.002, 0.006 for 0.0015), and with the gradient of one step 1 to 2 times.
"""

from __future__ import annotations

from selective.policies import Dense, Policy
from selective.policies.random import MatchedRandomMask
from selective.policies.selections import Bernoulli, Everything, Selection, TopK
from selective.policies.strengths import Alignment, Fixed, MeanPreserving, NormPreserving
from selective.preconditioner import Eigenbasis, Preconditioner


def rate_advice(policy: Policy, preconditioner: Preconditioner | None) -> str | None:
    """Return what to do with a learning rate that was tuned for the base; None if it can stay.

    Args:
        policy: the group's.
        preconditioner: the group's; None if it rotates nothing.
    """
    parts = [] if isinstance(policy, Dense) else [_of_policy(policy)]
    parts += [] if preconditioner is None else [_of_rotation(preconditioner)]
    return "; ".join(parts) if parts else None


def mean_multiplier(policy: Policy) -> float | None:
    """Return the mean of a policy's multipliers over coordinates and steps; None if it depends on the gradients."""
    parts = policy.parts()
    if parts is None:
        return None
    selection, strength = parts
    share = _share(selection)
    if isinstance(strength, MeanPreserving):
        return 1.0
    if type(strength) is Fixed and strength.selected == strength.rest and not strength.still:
        return strength.selected
    if type(strength) is not Fixed or share is None or strength.still:
        return None
    return share * strength.selected + (1 - share) * strength.rest


def _of_policy(policy: Policy) -> str:
    if isinstance(policy, MatchedRandomMask):
        return f"as for its policy: {_of_policy(policy.policy)}"
    parts, mean = policy.parts(), mean_multiplier(policy)
    if mean is not None and mean > 0:
        return f"the mean multiplier is {mean:.4g}: {_begin_with(mean)}"
    if parts is None:
        return f"how far {type(policy).__name__} goes, its own code decides: sweep it"
    selection, strength = parts
    share = _share(selection)
    if isinstance(strength, NormPreserving):
        return f"the norm of the {strength.of} is kept: {_begin_with(1)}"
    if isinstance(strength, Alignment) and share:  # a sigmoid of a cosine, which is 1/2 where nothing aligns
        mean = share * 0.5 + (1 - share) * strength.rest
        return f"the mean multiplier is about {mean:.2g}: {_begin_with(mean)}, and sweep it"
    if isinstance(strength, Fixed) and abs(strength.selected) == abs(strength.rest) == 1:
        return f"coordinates move as far as the base's, some the other way: {_begin_with(1)}"
    if isinstance(strength, Fixed):
        low, high = sorted((strength.rest, strength.selected))
        return f"the mean multiplier is between {low:g} and {high:g}, by how much agrees: sweep it"
    return "the mean multiplier depends on the gradients: sweep it"


def _begin_with(mean: float) -> str:
    tuned = "begin with the rate that is tuned for the base"
    if abs(mean - 1) < 0.005:
        return tuned
    return f"{tuned}, {'divided' if mean > 1 else 'multiplied'} by {mean if mean > 1 else 1 / mean:.4g}"


def _of_rotation(preconditioner: Preconditioner) -> str:
    if not isinstance(preconditioner, Eigenbasis):
        return "a rotated space may want another rate than the base: sweep it"
    times = "2 to 4" if preconditioner.statistic == "ema" else "1 to 2"
    return f"rotated, the best rates were {times} times those of the base in our runs: sweep it"


def _share(selection: Selection) -> float | None:
    """Return the share of coordinates that is selected; None if it depends on the gradients."""
    if isinstance(selection, TopK):
        return selection.fraction
    if isinstance(selection, Bernoulli):
        return selection.probability
    return 1.0 if isinstance(selection, Everything) else None
