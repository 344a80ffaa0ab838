"""The line of `explain()` on rotated parameters: they are stepped together in stacks, or the reason why not."""

from __future__ import annotations

from collections.abc import Sequence

from selective.plan.group_plan import GroupPlan
from selective.policies import Dense
from selective.policies.kernel_terms import has_own_code
from selective.preconditioner import Eigenbasis
from selective.state.kept_bases import why_not_stacked

TOGETHER = "in stacks: all matrices of one shape share each product"


def explain_stacks(plans: Sequence[GroupPlan], mask_space: str) -> list[str]:
    """Return the texts on groups that are alike; none if no preconditioner of ours is around a known rule."""
    texts: dict[str, None] = {}
    for plan in plans:
        rotation = plan.rotation
        if rotation is None or not rotation.shapes or rotation.capture.way != "fused":
            continue
        if isinstance(rotation.preconditioner, Eigenbasis):
            reason = _why_not(plan, mask_space)
            texts[TOGETHER if reason is None else f"matrix by matrix, or few at a time: {reason}"] = None
    return list(texts)


def _why_not(plan: GroupPlan, mask_space: str) -> str | None:
    rotation, decay = plan.rotation, plan.decay
    assert rotation is not None
    rotated = [p for p in rotation.members if p.tensor in rotation.shapes]
    if has_own_code(plan.policy, [p.tensor for p in rotated]):
        return "the policy runs code of its own"
    if mask_space == "original":
        return "the mask is made in the original space"
    if decay is not None and decay.at_random:
        return "the decay is drawn at random"
    if decay is not None and decay.of == "update" and not isinstance(plan.policy, Dense):
        return "the decay reads the update without its mask"
    return why_not_stacked(rotation, rotated)
