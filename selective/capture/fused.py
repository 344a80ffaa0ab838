"""Fused capture: bases whose rule we know. One kernel reads and writes the base's own state, under its own keys.

The base's `step()` is not called, so nothing has to be copied; its checkpoints stay its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from selective.base.fused_rules import FusedRule
from selective.base.hyperparameters import lookahead
from selective.capture.items import DeviceItems, KeptItems
from selective.capture.job import Job
from selective.capture.own_code import masked_step
from selective.kernels import advance, apply_mask, as_seen, begin_sharded, selective_step, spec
from selective.parameter import Parameter
from selective.policies.view import Tensors


class FusedJob(Job):
    """A group whose rule runs in our kernels."""

    steps_base = False

    def __init__(self, *args: Any, rule: FusedRule, kept: KeptItems, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fused, self.kept = rule, kept
        self.specs = kept.specs(self.policy, self.parameters)
        self.own_code = self.specs is None

    def prepare(self) -> None:
        if self.own_code:  # may raise half-way through the group: keep what it takes to put it back
            self.saved = [parameter.tensor.clone() for parameter in self.parameters]

    def finish(self) -> None:
        rule = self.fused.rule(self.context.base, self.group)
        make_state = partial(self.fused.init_state, self.group)
        with self.kept.of(self.context, self.parameters, self.policy, make_state) as lists:
            for one in lists:
                if self.specs is None:
                    for parameter, item in zip(one.parameters, one.items, strict=True):
                        self._step_with_own_code(parameter, item, rule)
                    one.let_go()
                else:
                    self._step_in_kernel(one, rule, *self.specs)
        self.fused.after(self.group)

    def _step_in_kernel(
        self, one: DeviceItems, rule: spec.Rule, selection: spec.Selection, strength: spec.Strength
    ) -> None:
        context = self.context
        how: dict[str, Any] = {
            "rule": rule, "selection": selection, "strength": strength, "draw": context.draw_on(one.device),
            "statistics": context.report is not None,
        }  # fmt: skip

        def done(sums: Sequence[spec.Sums] | None) -> None:
            one.let_go()
            if sums is not None and context.report is not None:
                context.report.add_all(one.names, sums)

        if one.asks:
            context.exchange.add(begin_sharded(one.items, **how), len(one.items), done)
        else:
            done(selective_step(one.items, **how))

    def _step_with_own_code(self, parameter: Parameter, item: spec.Item, rule: spec.Rule) -> None:
        keep = "previous_momentum" in self.policy.needs()
        moved = advance(item, rule, keep_previous=keep)
        seen = as_seen(rule, moved)
        tensors = Tensors(
            item.param, seen.update, seen.grad, seen.momentum, seen.previous_momentum,
            lookahead(self.context.base, self.group),
        )  # fmt: skip
        mask = masked_step(self.context, self.policy, parameter, tensors, item.shard)
        if mask is not None:
            apply_mask(item, rule, moved.update, mask, self.context.draw_on(item.param.device))
