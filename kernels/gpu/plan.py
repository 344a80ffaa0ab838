"""A step over a list of items: which of them go into one launch together, remembered from step to step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..lasting import lasting
from ..reference.rules import begin
from ..spec import AdamRule, Draw, Item, ItemList, Rule, Selection, SGDRule, Strength, SumsTable, check_kinds
from .batch import Batch
from .configure import configure, hyper_parameters, static_key
from .eligible import arrange, order_matters
from .launch import Step, on
from .tables import is_in_place, state_columns

_NOTHING = torch.zeros(0, 7, dtype=torch.float64, device="cpu")


class Plan:
    """The batches of a list of items."""

    def __init__(
        self, items: Sequence[Item], rule: Rule, selection: Selection, strength: Strength, draw: Draw,
        statistics: bool, begins: Sequence[bool],
    ) -> None:  # fmt: skip
        self.key = static_key(rule, selection, strength, draw, statistics)
        self.rule, self.draw, self.statistics = rule, draw, statistics
        together: dict[tuple[object, ...], list[int]] = {}
        for index, item in enumerate(items):
            on_host = isinstance(rule, AdamRule) and item.state["step"].device.type == "cpu"
            dtypes = tuple(None if c is None else c.dtype for c in state_columns(item, rule))
            in_place = is_in_place(item, rule)
            key = (item.param.dtype, item.grad.dtype, dtypes, item.param.device, on_host, begins[index], in_place)
            together.setdefault(key, []).append(index)
        self.batches = []
        for members in together.values():
            first = members[0]
            cfg = configure(items[first], rule, selection, strength, draw, statistics, begins[first])
            self.batches.append(Batch(cfg, items, members, rule, selection, strength))
        self.numels = [item.param.numel() for item in items]

    def fits(
        self, items: Sequence[Item], rule: Rule, selection: Selection, strength: Strength, draw: Draw, statistics: bool
    ) -> bool:
        """Whether the batches are still right for these items: only gradients may be elsewhere, and numbers changed."""
        if len(items) != len(self.numels) or static_key(rule, selection, strength, draw, statistics) != self.key:
            return False
        return all(batch.fits(items) for batch in self.batches)

    def run(
        self, items: Sequence[Item], rule: Rule, selection: Selection, strength: Strength, draw: Draw
    ) -> list[Tensor | None]:
        """Step all batches; their sums."""
        self.rule = rule
        sums = []
        for batch in self.batches:
            with on(batch.device):
                clock = None if draw.clock is None or draw.clock.device != batch.device else draw.clock
                batch.update(items, rule, selection, strength, draw, own_clock=clock is None)
                sums.append(Step(batch, selection.function, clock)())
                batch.stepped(items)
        return sums

    def refresh(self, selection: Selection, strength: Strength) -> None:
        """Put changed hyper-parameters on the device now, for the replays of a CUDA graph.

        Another kind of selection or strength would be another graph: the recorded one goes on as it is.
        """
        if static_key(self.rule, selection, strength, self.draw, self.statistics) != self.key:
            return
        for batch in self.batches:
            with on(batch.device):
                batch.refresh(hyper_parameters(self.rule, selection, strength), selection)


def _begin(item: Item, rule: Rule, strength: Strength) -> bool:
    """Make the state that a first step lacks, as the reference does; whether SGD's momentum begins in it."""
    if strength.kind == "alignment" and "average" not in item.policy_state:
        item.policy_state["average"] = torch.ones((), dtype=torch.float32, device=item.param.device)
    if not isinstance(rule, SGDRule) or rule.momentum == 0 or item.state.get("momentum_buffer") is not None:
        return False
    return begin(item, rule).first


def prepared(
    items: Sequence[Item], rule: Rule, selection: Selection, strength: Strength, draw: Draw
) -> tuple[list[Item], list[tuple[Tensor, Tensor]], list[bool]]:
    """The items as the kernels take them, what has to be copied back after the step, whose momentum begins in it."""
    begins = [_begin(item, rule, strength) for item in items]
    arranged, back = [], []
    for item in items:
        one, copied = arrange(item, rule, order_matters(selection, strength, draw, item))
        arranged.append(one)
        back += copied
    return arranged, back, begins


def step_again(
    items: ItemList, *, rule: Rule, selection: Selection, strength: Strength, draw: Draw, statistics: bool = False
) -> SumsTable | None:
    """The step by the plan of an earlier one; None, and nothing has happened, where that does not fit any more."""
    plan = items.cache.get("plan")
    if plan is None or not plan.fits(items, rule, selection, strength, draw, statistics):
        return None
    if strength.kind == "alignment" and any("average" not in item.policy_state for item in items):
        return None
    sums = plan.run(items, rule, selection, strength, draw)
    return _together(plan, sums) if statistics else SumsTable(_NOTHING, [])


def selective_step(
    items: Sequence[Item], *, rule: Rule, selection: Selection, strength: Strength, draw: Draw, statistics: bool = False
) -> SumsTable | None:
    """Steps 5 to 7 of these tensors, in place, by Triton kernels. See `selective.kernels.selective_step`."""
    if not items:
        return SumsTable(_NOTHING, []) if statistics else None
    check_kinds("the GPU", rule, selection, strength)
    how = (rule, selection, strength, draw)
    arranged, back, begins = prepared(items, *how)
    with lasting():
        plan = Plan(arranged, *how, statistics, begins)
    if isinstance(items, ItemList) and not back and not any(begins):
        items.cache["plan"] = plan
        items.cache["refresh"] = plan.refresh
    sums = plan.run(arranged, *how)
    for tensor, copy in back:
        tensor.copy_(copy)
    return _together(plan, sums) if statistics else None


def _together(plan: Plan, sums: list[Tensor | None]) -> SumsTable:
    """One table in the order of the items; on the first batch's device where there are several."""
    tables = [s for s in sums if s is not None]
    if len(tables) == 1:
        return SumsTable(tables[0], plan.numels)
    order = [i for batch in plan.batches for i in batch.members]
    back = torch.tensor([order.index(i) for i in range(len(order))], device="cpu")
    joined = torch.cat([s.to(tables[0].device) for s in tables])
    return SumsTable(joined[back.to(joined.device, non_blocking=True)], plan.numels)
