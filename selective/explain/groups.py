"""The text of `opt.explain()`: a paragraph for each parameter group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from selective.capture.choose import Capture
from selective.capture.delta import LOW_PRECISION
from selective.explain.rotated import explain_rotation
from selective.explain.sharded import explain_shards, in_plain_torch
from selective.kernels import backend_in_use, spec, why_reference
from selective.parameter import initialized
from selective.plan.group_plan import GroupPlan
from selective.plan.options import Options
from selective.policies import Decay, Policy
from selective.policies.kernel_terms import has_own_code, specs_of, why_not_in_kernel
from selective.sharding.dtensor import local_of, shard_of

_MEMORY = {
    "dense": "none",
    "fused": "none that lasts; during the step at most a few times the largest tensor",
    "scratch": "one copy of the group's parameters during the step",
    "delta": "one copy of the group's parameters during the step; after the base's, the update of 256 MiB at a time",
}


_DRAWN = "reference (plain torch), because RandomDecay has no kernel"
_DRAWN_MEMORY = "one copy of the group's parameters during the step, because RandomDecay has no kernel"


def explain(base: Optimizer, plans: Sequence[GroupPlan], options: Options) -> str:
    """One paragraph a parameter group, in plain words."""
    lines = [f"SelectiveUpdate over {type(base).__module__}.{type(base).__name__}"]
    for plan in plans:
        group, policy, capture = plan.group, plan.policy, plan.capture
        drawn = plan.decay is not None and plan.decay.at_random and capture.way == "fused"
        count = sum(p.numel() for p in initialized(group["params"]))
        lines += [
            f"param_groups[{plan.number}]: {_count(len(group['params']), 'tensor')}, {_count(count, 'element')}"
            + _without_shape(group),
            f"  policy    {policy!r}",
            f"  capture   {capture.way}: {capture.reason}",
            f"  decay     {_decay(capture) if plan.decay is None else _selective_decay(plan.decay, capture)}",
            f"  momentum  {_momentum(capture, group, options.momentum_beta)}",
            f"  memory    {_DRAWN_MEMORY if drawn else _memory(policy, capture, group)}",
        ]
        selection = _selection(policy, group)
        kernels = _kernels(base, group, policy, capture, options.scope, options.rounding)
        kernels = _DRAWN if kernels and plan.decay is not None and plan.decay.at_random else kernels
        lines += [f"  selection {selection}"] if selection else []
        lines += [f"  kernels   {kernels}"] if kernels else []
        shards = explain_shards(group, policy, capture, options.scope, options.statistics and not plan.is_dense)
        lines += [f"  sharded   {shards}"] if shards else []
        lines += [] if plan.rotation is None else explain_rotation(plan.rotation, policy, options.mask_space)
        notes = _notes(capture)
        if notes:
            lines.append(f"  note      {notes}")
    return "\n".join(lines)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _decay(capture: Capture) -> str:
    facts = capture.facts
    if facts.decay == "none" and facts.depends_on_param:
        return "none under 'weight_decay'; decay by another name would be part of the update, and masked with it"
    if facts.decay == "none":
        return "none"
    if facts.decay == "coupled":
        return "coupled: added to the gradient, so the policy sees it"
    if facts.decay == "inside":
        return "inside the base's update, and masked with it"
    return f"decoupled, the parameter × ({facts.decay_rule}): reaches every coordinate, never masked"


def _selective_decay(decay: Decay, capture: Capture) -> str:
    """Return what `explain()` says of a selective decay, which is never coupled."""
    factor = capture.facts.decay_rule if decay.weight_decay is None else f"1 - lr*{decay.weight_decay}"
    factors = f"the parameter × ({factor})"
    if not decay.at_random:
        return f"{decay!r}: {factors} where the update agrees, × 1 elsewhere"
    return (
        f"{decay!r}: {factors} at random coordinates, as many as the update agrees with, × 1 elsewhere; each sharded "
        "parameter takes an all-reduce"
    )


def _momentum(capture: Capture, group: dict[str, object], momentum_beta: float | None) -> str:
    if momentum_beta is not None:
        return f"our own, with momentum_beta={momentum_beta}"
    if not capture.has_momentum(group):
        return "none; a policy that needs one takes momentum_beta=0.9"
    key = capture.facts.momentum_key
    return f"the base's state[{key!r}]" if key else "the base's own"


def _memory(policy: Policy, capture: Capture, group: dict[str, Any]) -> str:
    if capture.way == "fused" and has_own_code(policy, group["params"]):
        why = _why_own_code(policy, group["params"])
        return f"one copy of the group's parameters during the step, because {why}"
    low = any(p.dtype in LOW_PRECISION for p in group["params"])
    if capture.way == "scratch" and capture.facts.decay == "coupled" and _decays(group):
        gradients = "the policy's float32 and the base's" if low else "with the decay in them"
        return f"{_MEMORY['scratch']}, and copies of its gradients, {gradients}"
    if capture.way == "delta" and low:
        return (
            "one copy of the group's parameters during the step, and float32 copies of them and of their gradients; "
            "after the base's, the update of 256 MiB at a time"
        )
    if capture.way == "fused" and any(p.is_cuda for p in group["params"]):
        if any(shard_of(p) is not None for p in group["params"]):
            return "none that lasts; during the step up to 10 bytes for each element of this rank's shards"
        return "none that lasts; during the step up to 0.3 bytes a parameter (exact top-K, statistics)"
    return _MEMORY[capture.way]


def _selection(policy: Policy, group: dict[str, Any]) -> str | None:
    """Return a line on whether a selection's own kernel runs; None if it has none."""
    specs = specs_of(policy)
    if specs is None or specs[0].kind != "function":
        return None
    why = why_not_in_kernel(specs[0], group["params"])
    if why is not None:
        return f"its select() runs, the torch twin of its kernel, because {why}"
    return "its kernel, a Triton function, is inlined into the step"


def _kernels(
    base: Optimizer, group: dict[str, Any], policy: Policy, capture: Capture, scope: str, stochastic: bool
) -> str | None:
    """Return a line on whether Triton steps the elements; None on the CPU, where it never does."""
    params = initialized(group["params"])
    if capture.way == "dense" or not (backend_in_use() == "gpu" or any(p.is_cuda for p in params)):
        return None
    if has_own_code(policy, params):
        return f"reference (plain torch), because {_why_own_code(policy, params)}"
    rule = spec.GivenRule() if capture.rule is None else capture.rule.kernel_rule(base, group)
    if scope == "global" and in_plain_torch(policy, params, rule, stochastic):
        return "reference (plain torch), because what it selects depends on the shards of other ranks"
    for p in params:
        state = {} if capture.rule is None else {k: local_of(v) for k, v in base.state.get(p, {}).items()}
        here, grad = local_of(p), local_of(p if p.grad is None else p.grad)
        why = why_reference(spec.Item(here, grad, state, 0), rule)
        if why is not None:
            return f"reference (plain torch), because {why}"
    return "Triton"


def _why_own_code(policy: Policy, params: list[Tensor]) -> str:
    specs = specs_of(policy)
    why = None if specs is None or specs[0].control is None else why_not_in_kernel(specs[0], params)
    return why or "the policy is your own code"


def _without_shape(group: dict[str, Any]) -> str:
    count = len(group["params"]) - len(initialized(group["params"]))
    return f", and {_count(count, 'tensor')} without a shape yet" if count else ""


def _decays(group: dict[str, Any]) -> bool:
    decay = group.get("weight_decay", 0.0)
    return isinstance(decay, Tensor) or decay != 0


def _notes(capture: Capture) -> str:
    facts = capture.facts
    found = []
    if facts.writes_grad:
        found.append("the base writes on .grad, so a copy is kept for the policy")
    if facts.clears_grad:
        found.append("the base clears .grad in its step")
    if facts.source == "measured":
        found.append("an unknown class: found out by stepping a small stand-in")
    return "; ".join(found)
