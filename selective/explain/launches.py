"""The line of `explain()` on launches: made one by one, or replayed as a CUDA graph, and why."""

from __future__ import annotations

from selective.kernels.graph_switch import SWITCH, switched_off
from selective.plan.group_plan import GroupPlan
from selective.plan.options import Options

AT_FIRST = "made one by one in the first steps, then replayed as a CUDA graph"


def explain_launches(plan: GroupPlan, options: Options) -> str | None:
    """Return how the launches of a group that Triton steps are made; None where nothing could record them.

    That is on a CPU, and in groups that are rotated as a whole or whose base takes its own step.
    """
    if plan.capture.way != "fused" or not plan.params.cuda_devices:
        return None
    rotated = () if plan.rotation is None else plan.rotation.shapes
    if all(parameter.tensor in rotated for parameter in plan.params.parameters):
        return None
    if options.graph is False:
        return "made one by one, because graph=False"
    if switched_off():
        return f"made one by one, because the environment says {SWITCH}=0"
    return "; ".join(dict.fromkeys(plan.kept.describe_launches())) or AT_FIRST
