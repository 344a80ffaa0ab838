"""The step of lists of items, by plans that are kept from step to step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..lasting import lasting
from ..reference.rules import begin
from ..spec import Item, SGDRule, StepCall, StepSpec, SumsTable, check_kinds
from .batches import Plan
from .eligible import arrange, order_matters
from .kept_plans import keep

_NOTHING = torch.zeros(0, 7, dtype=torch.float64, device="cpu")


def _begin(item: Item, spec: StepSpec) -> bool:
    """Make the state that a first step lacks, as the reference does. Returns whether SGD's momentum begins in it."""
    rule = spec.rule
    if spec.strength.kind == "alignment" and "average" not in item.policy_state:
        item.policy_state["average"] = torch.ones((), dtype=torch.float32, device=item.param.device)
    if not isinstance(rule, SGDRule) or rule.momentum == 0 or item.state.get("momentum_buffer") is not None:
        return False
    return begin(item, rule).first


def prepared(items: Sequence[Item], spec: StepSpec) -> tuple[list[Item], list[tuple[Tensor, Tensor]], list[bool]]:
    """The items as the kernels take them, the (tensor, copy) pairs to write back, and whose momentum begins now."""
    begins = [_begin(item, spec) for item in items]
    arranged, back = [], []
    for item in items:
        one, copied = arrange(item, spec.rule, order_matters(spec, item))
        arranged.append(one)
        back += copied
    return arranged, back, begins


def selective_step(items: Sequence[Item], spec: StepSpec) -> SumsTable | None:
    """Steps 5 to 7 of these tensors, in place, by Triton kernels. See `selective.kernels.selective_step`."""
    if not items:
        return SumsTable(_NOTHING, []) if spec.statistics else None
    return selective_steps([StepCall(items, spec)])[0]


def selective_steps(calls: Sequence[StepCall]) -> list[SumsTable | None]:
    """`selective_step` of several calls that have items, which share launches. Returns the sums of each.

    A call whose tensors have to be copied, or whose momentum begins now, gets a plan of its own, which is not kept.
    """
    results: list[SumsTable | None] = [None] * len(calls)
    together: dict[int, StepCall] = {}
    for place, call in enumerate(calls):
        check_kinds("the GPU", call.spec)
        arranged, back, begins = prepared(call.items, call.spec)
        ready = StepCall(arranged, call.spec, graphs=call.graphs)
        copied = any(ours is not theirs for ours, theirs in zip(arranged, call.items, strict=True))
        if not copied and not any(begins):
            together[place] = ready
            continue
        (results[place],) = _new_plan([ready], begins).run([ready])
        for tensor, copy in back:
            tensor.copy_(copy)
    if together:
        plan = _new_plan(list(together.values()), [False] * sum(len(call.items) for call in together.values()))
        keep(plan, [calls[place].items for place in together])
        for place, sums in zip(together, plan.run(list(together.values())), strict=True):
            results[place] = sums
    return results


def _new_plan(calls: Sequence[StepCall], begins: Sequence[bool]) -> Plan:
    with lasting():
        return Plan(calls, begins)
