"""The lines of `explain()` about norms that are kept, and about the learning rate there.

The rates are those that were best in the runs of docs/evidence.md: 0.018 for AdamW, and 0.036 for AdamW in Soap.
"""

from __future__ import annotations

from selective.norms import NormControl
from selective.plan.group_plan import GroupPlan


def explain_norms(plan: GroupPlan) -> str | None:
    """Say of how many parameters the norm is kept, at which rate they turn, and why others do not; None without one."""
    norms = plan.norms
    if norms is None:
        return None
    assert isinstance(norms.norm, NormControl)
    rate = "lr" if norms.norm.scale == 1 else f"lr * {norms.norm.scale:g}"
    text = f"kept of {_counted(len(norms.shapes), 'parameter')}, turned by {rate}, relative to it; a step holds a copy"
    if not norms.reasons:
        return text
    reasons = dict.fromkeys(norms.reasons.values())
    return f"{text}; {_counted(len(norms.reasons), 'other')} stepped at lr: {'; '.join(reasons)}"


def norm_advice(plan: GroupPlan) -> str | None:
    """Return what to do with the learning rate of a group whose norms are kept; None for another one."""
    norms = plan.norms
    if norms is None or not norms.shapes:
        return None
    scale = norms.norm.scale if isinstance(norms.norm, NormControl) else 1.0
    rest = "; give what is no matrix a group with a rate of its own" if norms.reasons and scale == 1 else ""
    best = f"{0.018 / scale:.2g} (AdamW) to {0.036 / scale:.2g} (in Soap)"
    return f"relative to the norm: {best} were best in our runs with 34M parameters; sweep it{rest}"


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
