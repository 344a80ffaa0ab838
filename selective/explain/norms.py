"""The lines of `explain()` about norms that are kept, and about the learning rate there.

The rates are those that were best in the runs of docs/evidence.md: 0.018 for AdamW, and 0.036 for AdamW in Soap.
"""

from __future__ import annotations

from selective.norms import NormControl
from selective.plan.group_plan import GroupPlan
from selective.sharding.dtensor import is_dtensor, local_of


def explain_norms(plan: GroupPlan) -> str | None:
    """Say of how many parameters the norm is kept, at which rate they turn, and why others do not; None without one."""
    norms = plan.norms
    if norms is None:
        return None
    assert isinstance(norms.norm, NormControl)
    if not norms.shapes:
        return f"{norms.norm!r}: no parameter here; {'; '.join(dict.fromkeys(norms.reasons.values()))}"
    rate = "lr" if norms.norm.scale == 1 else f"lr * {norms.norm.scale:g}"
    text = f"kept of {_counted(len(norms.shapes), 'parameter')}, turned by {rate}, relative to it{_sent(plan)}"
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


def held_memory(plan: GroupPlan) -> str:
    """The memory that a step takes for copies, in words; empty where no norm is kept."""
    held = 0 if plan.norms is None else sum(local_of(p).numel() * p.element_size() for p in plan.norms.shapes)
    return f"a copy of the matrices whose norm is kept, {held:,} bytes" if held else ""


def _sent(plan: GroupPlan) -> str:
    assert plan.norms is not None
    return "; sharded ones take one more all-reduce a step" if any(map(is_dtensor, plan.norms.shapes)) else ""


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
