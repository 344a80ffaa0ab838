"""Fused capture: one kernel computes the rule and the mask on the base's own state, for a base whose rule we know.

The base's `step()` is not called, so that nothing has to be copied. The state stays under the base's own keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from selective.base.fused_rules import FusedRule
from selective.base.hyperparameters import lookahead
from selective.capture.decay import decaying_coordinates, with_own_factor
from selective.capture.items import DeviceItems, KeptItems
from selective.capture.job import Job
from selective.capture.own_code import masked_step
from selective.kernels import advance, apply_mask, as_seen, begin_sharded, selective_step, spec
from selective.parameter import Parameter
from selective.policies.view import Tensors


class FusedJob(Job):
    """The job of a group whose rule our kernels compute."""

    steps_base = False
    rule: spec.Rule  # of this step

    def __init__(self, *args: Any, fused_rule: FusedRule, kept_items: KeptItems, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fused_rule, self.kept_items = fused_rule, kept_items
        at_random = self.decay is not None and self.decay.at_random  # no kernel draws
        self.specs = None if at_random else kept_items.specs(self.policy, self.parameters)
        self.own_code = self.specs is None
        self.all_items: list[DeviceItems] = []
        self.steps: list[Callable[[], None]] = []  # steps in kernels that `after_base` begins or takes

    def prepare(self) -> None:
        rule = self.kept_items.rule(self.fused_rule, self.context.base, self.group)
        self.rule = with_own_factor(rule, self.decay, self.group)
        make_state = partial(self.fused_rule.init_state, self.group)
        self.all_items = self.kept_items.with_gradients(self.context, self.parameters, self.policy, make_state)
        if self.specs is not None:
            for device_items in self.all_items:
                self._begin_in_kernel(device_items, *self.specs)

    def before_base(self) -> None:
        if self.own_code:  # it may raise half-way through the group, which is restored then
            self.saved = [parameter.tensor.clone() for parameter in self.parameters]

    def after_base(self) -> None:
        if self.specs is None:
            for device_items in self.all_items:
                for parameter, item in zip(device_items.parameters, device_items.items, strict=True):
                    self._step_with_own_code(parameter, item, self.rule)
                device_items.let_go()
        for step in self.steps:
            step()
        self.fused_rule.count_step_in_group(self.group)

    def _begin_in_kernel(self, device_items: DeviceItems, selection: spec.Selection, strength: spec.Strength) -> None:
        """Let one kernel compute rule and mask on one device, in a call that is checked and not made yet.

        `run_jobs` checks and makes it, together with those of other jobs, if it is in `context.calls`. A sharded step
        is begun in `after_base`, and `run_jobs` finishes it through `context.exchange`.
        """
        context = self.context
        draw, decay = context.draw_on(device_items.device), None if self.decay is None else self.decay.spec()
        how = spec.StepSpec(self.rule, selection, strength, draw, context.report is not None, decay)

        def done(sums: Sequence[spec.Sums] | None) -> None:
            device_items.let_go()
            if sums is not None and context.report is not None:
                context.report.add_all(device_items.names, sums)

        if device_items.is_sharded:
            parts = begin_sharded(device_items.items, **vars(how))
            self.steps.append(partial(context.exchange.add, parts, len(device_items.items), done))
        elif context.calls is not None:
            context.calls.add(device_items, how, done, context.graphs)
        else:
            self.steps.append(lambda: done(selective_step(device_items.items, **vars(how))))

    def restore(self) -> None:
        for device_items in self.all_items:
            device_items.let_go()
        super().restore()

    def _step_with_own_code(self, parameter: Parameter, item: spec.Item, rule: spec.Rule) -> None:
        """Compute the rule of one parameter, and mask its update by the policy's own code."""
        moved = advance(item, rule, keep_previous="previous_momentum" in self.policy.needs())
        seen = as_seen(rule, moved)
        tensors = Tensors(
            item.param, seen.update, seen.grad, seen.momentum, seen.previous_momentum,
            lookahead(self.context.base, self.group),
        )  # fmt: skip
        mask = masked_step(self.context, self.policy, parameter, tensors, item.shard)
        if mask is None:
            return
        decays = None
        if self.decay is not None:
            of = self.decay.spec()
            decays = decaying_coordinates(self.decay, of, item, rule, moved.update, mask, seen.grad, self.context)
        apply_mask(item, rule, moved.update, mask, self.context.draw_on(item.param.device), decays)
