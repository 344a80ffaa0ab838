"""The line of `explain()` about norms that are kept."""

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
    text = (
        f"kept of {len(norms.shapes):,} parameters, which turn by {rate}, relative to it; a step holds a copy of them"
    )
    if not norms.reasons:
        return text
    reasons = dict.fromkeys(norms.reasons.values())
    return f"{text}; {len(norms.reasons):,} others are stepped at lr: {'; '.join(reasons)}"
