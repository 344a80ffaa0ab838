"""The lines of `explain()` on memory: bytes that last, beside the base's state, and what a step takes for a while."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from selective.base.fused_rules import FusedMuon
from selective.capture.choose import Capture
from selective.capture.delta import LOW_PRECISION
from selective.capture.muon_stacks import STACK
from selective.explain.own_code import why_own_code
from selective.parameter import Parameter
from selective.plan.group_plan import GroupPlan
from selective.plan.rotation_plan import RotationPlan
from selective.policies import Policy
from selective.policies.kernel_terms import has_own_code
from selective.rotation.contract import is_foreign
from selective.sharding.dtensor import local_of, shard_of
from selective.state.entries import MOMENTUM, POLICY_STATE, RESIDUE
from selective.state.store import StateStore

_KINDS = {
    MOMENTUM: "a momentum of our own (momentum_beta)",
    RESIDUE: "what rounding has left (as the base keeps it)",
    POLICY_STATE: "state of the policy",
}


def memory_lines(plans: Sequence[GroupPlan], store: StateStore, temporary: str) -> tuple[list[str], int]:
    """Return the texts on the memory of groups that are alike, and the bytes that last for them on this rank.

    Args:
        plans: the groups.
        store: the wrapper's entries, which are counted as they are, or as the first step will make them.
        temporary: what a step takes for parameters that are not rotated.
    """
    lines, total = [], 0
    rotations = [plan.rotation for plan in plans if plan.rotation is not None and plan.rotation.shapes]
    if rotations:
        total, elements = bytes_of_bases(rotations), sum(p.numel() for r in rotations for p in r.shapes)
        lasting = "of rotated ones: none that lasts"
        if total:
            lasting = (
                f"{total:,} bytes that last, {total / max(elements, 1):.2f} a parameter: the bases of rotated ones"
            )
        lines.append(f"{lasting}; during the step {_in_step(rotations[0])}")
    own, kinds = _own_bytes(plans, store)
    if own:
        lines.append(f"{own:,} bytes that last: {' and '.join(kinds)}")
    if any(plan.rotation is None or plan.rotation.has_others for plan in plans):
        whose = "of the others: " if rotations else ""
        lines.append(whose + ("none that lasts; " if temporary.startswith("during") and not own else "") + temporary)
    return lines, total + own


def temporary_memory(policy: Policy, capture: Capture, group: dict[str, Any]) -> str:
    """Return what a step of this group takes for parameters that are not rotated."""
    params: list[Tensor] = group["params"]
    low = any(p.dtype in LOW_PRECISION for p in params)
    copy = "one copy of the group's parameters during the step"
    if capture.way == "dense":
        return "none"
    if capture.way == "scratch":
        if not (capture.facts.decay == "coupled" and _decays(group)):
            return copy
        gradients = "the policy's float32 and the base's" if low else "with the decay in them"
        return f"{copy}, and copies of its gradients, {gradients}"
    if capture.way == "delta":
        copies = ", and float32 copies of them and of their gradients" if low else ""
        return f"{copy}{copies}; after the base's, the update of 256 MiB at a time"
    if isinstance(capture.rule, FusedMuon):
        stacks = f"during the step up to 12 bytes a parameter, at most 512 MiB if no matrix has over {STACK:,} elements"
        return f"{stacks}; {copy}, because {why_own_code(policy, params)}" if has_own_code(policy, params) else stacks
    if has_own_code(policy, params):
        return f"{copy}, because {why_own_code(policy, params)}"
    if not any(p.is_cuda for p in params):
        return "during the step at most a few times the largest tensor"
    if any(shard_of(p) is not None for p in params):
        return "during the step up to 10 bytes for each element of this rank's shards"
    return "during the step up to 0.3 bytes a parameter (exact top-K, statistics)"


def bytes_of_bases(rotations: Sequence[RotationPlan]) -> int:
    """Return the bytes that preconditioners keep of the rotated parameters. One of each shape is made to count them."""
    total = 0
    for rotation in rotations:
        examples = {shape: p for p, shape in rotation.shapes.items()}
        of_shape = {shape: _bytes(rotation.fresh(p).values()) for shape, p in examples.items()}
        total += sum(of_shape[shape] for shape in rotation.shapes.values())
    return total


def _in_step(rotation: RotationPlan) -> str:
    if rotation.capture.way == "fused":
        text = "their float32 gradients and updates, of 512 MiB of them at a time"
        if any(shard_of(p) is not None for p in rotation.shapes):
            text += " (of all, where the mask needs sums over ranks)"
    else:
        text = f"float32 copies of their gradients and {'two of' if rotation.capture.way == 'delta' else 'one of'} them"
    if is_foreign(rotation.preconditioner):
        return f"{text}, and one copy of them, because the preconditioner is your own code"
    return text


def _own_bytes(plans: Sequence[GroupPlan], store: StateStore) -> tuple[int, list[str]]:
    """Return the bytes of the wrapper's entries that are not of a basis, and their kinds in words."""
    total, kinds = 0, dict.fromkeys(_KINDS, False)
    for plan in plans:
        examples: dict[object, dict[str, Tensor]] = {}
        for parameter in plan.params.parameters:
            if not store.keeps(plan, parameter):
                continue
            for name, value in _entries(plan, store, parameter, examples).items():
                kind = next((kind for kind in _KINDS if name.startswith(kind)), None)
                if kind is not None:
                    kinds[kind] = True
                    total += _bytes([value])
    return total, [_KINDS[kind] for kind, there in kinds.items() if there]


def _entries(
    plan: GroupPlan, store: StateStore, parameter: Parameter, examples: dict[object, dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Return the stored entries; before the first step, those of a parameter of the same shape and dtype."""
    stored = store.table.get(parameter.tensor)
    if stored is not None:
        return stored
    local = local_of(parameter.tensor)
    key = local.shape, local.dtype, local.device
    if key not in examples:
        examples[key] = store.fresh_entries(plan, parameter, plan.policy)
    return examples[key]


def _decays(group: dict[str, Any]) -> bool:
    decay = group.get("weight_decay", 0.0)
    return isinstance(decay, Tensor) or decay != 0


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in map(local_of, tensors))
