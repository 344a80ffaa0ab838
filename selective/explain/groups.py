"""The text of `opt.explain()`: a paragraph for each kind of parameter group. `paragraphs` has them as data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from selective.base.known import why_measured
from selective.capture.choose import Capture
from selective.explain.launches import explain_launches
from selective.explain.memory import memory_lines, temporary_memory
from selective.explain.norms import explain_norms, held_memory, norm_advice
from selective.explain.own_code import why_own_code
from selective.explain.paragraph import Line, Paragraph, under
from selective.explain.rate import rate_advice
from selective.explain.rotated import explain_rotations
from selective.explain.sharded import explain_shards, in_plain_torch
from selective.explain.stacks import explain_stacks
from selective.explain.title import title_of
from selective.kernels import backend_in_use, spec, why_reference
from selective.parameter import initialized
from selective.plan.group_plan import GroupPlan
from selective.plan.options import Options
from selective.policies import Decay, Policy
from selective.policies.kernel_terms import has_own_code, specs_of, why_not_in_kernel
from selective.preconditioner import Preconditioner
from selective.sharding.dtensor import local_of
from selective.state.store import StateStore

TRITON = "Triton"
"""The text of the line on kernels where Triton steps a group."""
_DRAWN = "reference (plain torch), because RandomDecay has no kernel"
_DRAWN_MEMORY = "one copy of the group's parameters during the step, because RandomDecay has no kernel"


def explain(base: Optimizer, plans: Sequence[GroupPlan], options: Options, store: StateStore) -> str:
    """A paragraph for each kind of parameter group, in plain words. Groups of which the same can be said share one."""
    of_groups = paragraphs(base, plans, options, store)
    total = sum(paragraph.lasting_bytes for paragraph in of_groups)
    texts = [f"SelectiveUpdate over {type(base).__module__}.{type(base).__name__}", *map(str, of_groups)]
    if len(of_groups) > 1 and total:
        texts.append(f"all groups: {total:,} bytes that last, beside the base's state")
    return "\n".join(texts)


def paragraphs(base: Optimizer, plans: Sequence[GroupPlan], options: Options, store: StateStore) -> list[Paragraph]:
    """Return the paragraphs of `explain`. The plans are up to date."""
    alike: dict[object, list[GroupPlan]] = {}
    for plan in plans:
        alike.setdefault(_same_for(base, plan, options), []).append(plan)
    return [_paragraph(base, members, options, store) for members in alike.values()]


def _paragraph(base: Optimizer, members: Sequence[GroupPlan], options: Options, store: StateStore) -> Paragraph:
    """Return the paragraph of groups that are alike."""
    plan = members[0]
    policy = plan.policy
    memory, lasting = memory_lines(members, store, _temporary(plan))
    lines = _facts(base, plan, options)
    rotations = [one.rotation for one in members if one.rotation is not None]
    if rotations:
        on_stacks = explain_stacks(members, options.mask_space)
        lines += explain_rotations(rotations, policy, options.mask_space, on_stacks)
    lines += under("memory", memory)
    advice, notes = norm_advice(plan) or rate_advice(policy, _rotating(plan)), _notes(base, plan)
    lines += [] if advice is None else [Line("rate", advice)]
    lines += [Line("note", notes)] if notes else []
    title = title_of({member.number: member.group for member in members})
    return Paragraph(tuple(member.number for member in members), title, tuple(lines), lasting)


def _same_for(base: Optimizer, plan: GroupPlan, options: Options) -> object:
    """Return what has to be equal for two groups to share a paragraph."""
    rotation = plan.rotation
    rotated = None if rotation is None else (repr(rotation.preconditioner), rotation.capture.way, bool(rotation.shapes))
    return *_facts(base, plan, options), _temporary(plan), rotated, _notes(base, plan)


def _temporary(plan: GroupPlan) -> str:
    drawn = plan.capture.way == "fused" and _draws(plan)
    found = _DRAWN_MEMORY if drawn else temporary_memory(plan.policy, plan.capture, plan.group)
    copy = held_memory(plan)
    if not copy:
        return found
    return f"during the step {copy}" if found == "none" else f"{found}, and {copy}"


def _draws(plan: GroupPlan) -> bool:
    return plan.decay is not None and plan.decay.at_random


def _facts(base: Optimizer, plan: GroupPlan, options: Options) -> list[Line]:
    """Return the lines that do not depend on which parameters the group has."""
    group, policy, capture = plan.group, plan.policy, plan.capture
    lines = [
        Line("policy", repr(policy)),
        Line("capture", f"{capture.way}: {capture.reason}"),
        Line("decay", _decay_of(plan)),
        Line("momentum", _momentum(capture, group, options.momentum_beta)),
    ]
    selection = _selection(policy, group)
    kernels = _kernels(base, group, policy, capture, options.scope, options.rounding)
    kernels = _DRAWN if kernels and _draws(plan) else kernels
    shards = explain_shards(group, policy, capture, options.scope, options.statistics and not plan.is_dense)
    launches = explain_launches(plan, options) if kernels == TRITON else None
    more = {
        "norm": explain_norms(plan),
        "selection": selection,
        "kernels": kernels,
        "launches": launches,
        "sharded": shards,
    }
    lines += [Line(label, text) for label, text in more.items() if text]
    return lines


def _rotating(plan: GroupPlan) -> Preconditioner | None:
    return plan.rotation.preconditioner if plan.rotation is not None and plan.rotation.shapes else None


def _decay_of(plan: GroupPlan) -> str:
    if plan.norms is not None and not plan.norms.reasons:
        return f"none, because of {plan.norms.norm!r}"
    text = _decay(plan.capture) if plan.decay is None else _selective_decay(plan.decay, plan.capture)
    return f"{text}; not of the matrices whose norm is kept" if plan.norms is not None and plan.norms.shapes else text


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
    if decay.at_random:
        chosen = "at random coordinates, at as many as CautiousDecay would decay"
    else:
        chosen = f"where the {'masked update' if decay.of == 'masked' else 'update'} moves it towards 0"
        chosen += "" if decay.strict else " or is 0"
    sent = "; each sharded parameter takes an all-reduce" if decay.at_random else ""
    return f"{decay!r}: {factors} {chosen}, × 1 elsewhere{sent}"


def _momentum(capture: Capture, group: dict[str, object], momentum_beta: float | None) -> str:
    if momentum_beta is not None:
        return f"our own, with momentum_beta={momentum_beta}"
    if not capture.has_momentum(group):
        return "none; a policy that needs one takes momentum_beta=0.9"
    key = capture.facts.momentum_key
    return f"the base's state[{key!r}]" if key else "the base's own"


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
        return f"reference (plain torch), because {why_own_code(policy, params)}"
    rule = spec.GivenRule() if capture.rule is None else capture.rule.kernel_rule(base, group)
    if scope == "global" and in_plain_torch(policy, params, rule, stochastic):
        return "reference (plain torch), because what it selects depends on the shards of other ranks"
    for p in params:
        given = isinstance(rule, spec.GivenRule)  # the base's state is nothing that kernels read then
        state = {} if given else {k: local_of(v) for k, v in base.state.get(p, {}).items()}
        here, grad = local_of(p), local_of(p if p.grad is None else p.grad)
        why = why_reference(spec.Item(here, grad, state, 0), rule)
        if why is not None:
            return f"reference (plain torch), because {why}"
    return TRITON


def _notes(base: Optimizer, plan: GroupPlan) -> str:
    facts = plan.capture.facts
    notes = []
    if facts.writes_grad:
        notes.append("the base writes on .grad, so a copy is kept for the policy")
    if facts.clears_grad:
        notes.append("the base clears .grad in its step")
    if facts.source == "measured":
        notes.append(f"{why_measured(base, plan.group)}: measured by steps of a small stand-in")
    return "; ".join(notes)
