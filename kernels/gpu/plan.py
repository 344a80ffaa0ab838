"""The step of a list of items: a plan of which go into one launch together, kept from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..lasting import lasting
from ..reference.rules import begin
from ..spec import Item, ItemList, Selection, SGDRule, StepSpec, Strength, SumsTable, check_kinds
from .batch import Batch
from .configure import configure, hyper_parameters, static_key
from .eligible import arrange, order_matters
from .launch import Step, on
from .tables import is_in_place, state_columns

_NOTHING = torch.zeros(0, 7, dtype=torch.float64, device="cpu")


class Plan:
    """The batches of a list of items."""

    def __init__(self, items: Sequence[Item], spec: StepSpec, begins: Sequence[bool]) -> None:
        self.key, self.spec = static_key(spec), spec
        buckets: dict[tuple[object, ...], list[int]] = {}
        for index, item in enumerate(items):
            on_host = spec.rule.counts_steps and item.state["step"].device.type == "cpu"
            dtypes = tuple(None if c is None else c.dtype for c in state_columns(item, spec.rule))
            in_place = is_in_place(item, spec.rule)
            key = (item.param.dtype, item.grad.dtype, dtypes, item.param.device, on_host, begins[index], in_place)
            buckets.setdefault(key, []).append(index)
        self.batches = []
        for members in buckets.values():
            cfg = configure(items[members[0]], spec, begins[members[0]])
            self.batches.append(Batch(cfg, items, members, spec))
        self.numels = [item.param.numel() for item in items]

    def fits(self, items: Sequence[Item], spec: StepSpec) -> bool:
        """True if the batches are still right. Gradients may be elsewhere, and numbers may have changed."""
        if len(items) != len(self.numels) or static_key(spec) != self.key:
            return False
        return all(batch.fits(items) for batch in self.batches)

    def run(self, items: Sequence[Item], spec: StepSpec) -> list[Tensor | None]:
        """Step all batches. Returns the sums of each."""
        self.spec, clock = spec, spec.draw.clock
        sums = []
        for batch in self.batches:
            with on(batch.device):
                here = None if clock is None or clock.device != batch.device else clock
                batch.update(items, spec, own_clock=here is None)
                sums.append(Step(batch, spec.selection.function, here)())
                batch.stepped(items)
        return sums

    def upload_hyperparameters(self, selection: Selection, strength: Strength) -> None:
        """Upload changed hyper-parameters now, for the replays of a CUDA graph.

        Another kind of selection or strength would be another graph: then the recorded one goes on as it is.
        """
        spec = replace(self.spec, selection=selection, strength=strength)
        if static_key(spec) != self.key:
            return
        for batch in self.batches:
            with on(batch.device):
                batch.upload_hyperparameters(hyper_parameters(spec), selection)


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


def step_again(items: ItemList, spec: StepSpec) -> SumsTable | None:
    """Step by the plan of an earlier step. If that does not fit any more, return None and change nothing."""
    plan = items.cache.get("plan")
    if plan is None or not plan.fits(items, spec):
        return None
    if spec.strength.kind == "alignment" and any("average" not in item.policy_state for item in items):
        return None
    sums = plan.run(items, spec)
    return _together(plan, sums) if spec.statistics else SumsTable(_NOTHING, [])


def selective_step(items: Sequence[Item], spec: StepSpec) -> SumsTable | None:
    """Steps 5 to 7 of these tensors, in place, by Triton kernels. See `selective.kernels.selective_step`."""
    if not items:
        return SumsTable(_NOTHING, []) if spec.statistics else None
    check_kinds("the GPU", spec)
    arranged, back, begins = prepared(items, spec)
    with lasting():
        plan = Plan(arranged, spec, begins)
    if isinstance(items, ItemList) and not back and not any(begins):
        items.cache["plan"] = plan
        items.cache["upload_hyperparameters"] = plan.upload_hyperparameters
    sums = plan.run(arranged, spec)
    for tensor, copy in back:
        tensor.copy_(copy)
    return _together(plan, sums) if spec.statistics else None


def _together(plan: Plan, sums: list[Tensor | None]) -> SumsTable:
    """The batches' sums as one table in the order of the items, on the first batch's device."""
    tables = [s for s in sums if s is not None]
    if len(tables) == 1:
        return SumsTable(tables[0], plan.numels)
    order = [i for batch in plan.batches for i in batch.members]
    back = torch.tensor([order.index(i) for i in range(len(order))], device="cpu")
    joined = torch.cat([s.to(tables[0].device) for s in tables])
    return SumsTable(joined[back.to(joined.device, non_blocking=True)], plan.numels)
