"""Fused capture of rotated parameters: the known rule steps zeros in the rotated space, which become -mask u.

Compared with a fused step without rotation, only the products are added, and the buffer of zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from selective.base.fused_rules import FusedRule, FusedSGD
from selective.base.lent_gradients import LentGradients
from selective.capture.rotated import RotatedJob
from selective.capture.rotated_planned import Calls, KeptStep, Step
from selective.kernels import advance, begin_sharded, selective_step, spec
from selective.parameter import Parameter
from selective.policies.kernel_terms import everything_as_it_is
from selective.preconditioner.stacked import StackedEigenbasis
from selective.sharding.dtensor import is_dtensor, local_like, wrapped_like


class RotatedFusedJob(RotatedJob):
    """The job of rotated parameters whose rule our kernels compute on the base's own state.

    `hides_gradients` is True if the base steps the rest of the group, and must not step these. `all_rotated` is True if
    the group has no other parameters.
    """

    steps_base = False

    def __init__(
        self,
        *args: Any,
        fused_rule: FusedRule,
        kept_step: KeptStep,
        hides_gradients: bool,
        all_rotated: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.fused_rule, self.hides_gradients, self.all_rotated = fused_rule, hides_gradients, all_rotated
        self.kept_step = kept_step
        self.hidden = LentGradients()
        self.in_kernel = self.specs is not None and not self.in_original and not self.decays_by_unmasked
        self.in_stacks = False

    def prepare(self) -> None:
        self._undecayed_rule()  # it is kept; here it is refused if it can't be read off the group
        self.factors = self._factors()

    def before_base(self) -> None:
        super().before_base()
        if self.hides_gradients:  # the base skips parameters without a gradient
            for p in self.tensors():
                self.hidden.lend(p, None)

    def after_base(self) -> None:
        self.hidden.give_back()
        if self.in_stacks:
            self._step_in_stacks()
        else:
            self.kept_step.drop_unless(self.context.base_token)
            for indices in self.rotation.buckets(self.moving, self.rotation.bucket_elements(narrow=self.in_kernel)):
                grads = [self.gradients[i] for i in indices]
                rotated = self.rotation.gradients_in(indices, grads, narrow=self.in_kernel)
                self._step(indices, rotated, self.in_kernel)
            self.rotation.observe(self._matrices)
        self.rotation.count_steps()
        if self.all_rotated:  # otherwise the group's other job does it
            self.fused_rule.count_step_in_group(self.group)

    def steps_in_stacks(self) -> bool:
        """True if `PlannedStep` has all that this step needs: one factor of decay, all moments, and everyone moves."""
        self.in_stacks = (
            self.rotation.stacks is not None
            and self.in_kernel
            and not self.facts.decay_per_parameter
            and len(self.moving) == self.count
            and not self._lacks_momentum()
        )
        return self.in_stacks

    def _lacks_momentum(self) -> bool:
        """True if SGD makes a momentum in this step, whose dtype then follows from the gradient's."""
        if not isinstance(self.fused_rule, FusedSGD) or not self.fused_rule.has_momentum(self.group):
            return False
        table = self.context.base.state
        return any(table[p].get("momentum_buffer") is None for p in self.tensors())

    def _step_in_stacks(self) -> None:
        """Take steps 4 to 8 for all parameters together, or begin them."""
        rotation, context = self.rotation, self.context
        assert rotation.stacks is not None
        limit, token = rotation.bucket_elements(narrow=True), context.base_token
        states = self.kept_step.states(token, self.parameters)
        if states is None:
            table, tensors = context.base.state, self.tensors()
            states = [table[p] for p in tensors]
            token = token if all(states) else None
            for p, state in zip(tensors, states, strict=True):
                if not state:
                    self.fused_rule.init_state(self.group, p, state)
        planned = self.kept_step.get(
            rotation.stacks, self.parameters, states, context.own_table, context.own_state, self.shard, limit
        )
        self.kept_step.trust(token)
        basis = StackedEigenbasis(rotation.preconditioner)  # type: ignore[arg-type]  # as `Stacks` are of these alone
        planned.step(Step(rotation, basis, self.gradients, self._kernel_calls()))

    def _kernel_calls(self) -> Calls:
        """Return the arguments of the kernel calls of a step in stacks."""
        stacks = self.rotation.stacks
        assert self.specs is not None and stacks is not None
        report, draw = self.context.report, self.context.draw_on(self.parameters[0].tensor.device)
        graphs = {} if stacks.on_ranks else {"graphs": self.context.graphs}  # none is recorded between collectives
        everything, as_it_is = everything_as_it_is()

        def add(parameters: list[Parameter], sums: Sequence[spec.Sums]) -> None:
            assert report is not None
            report.add_all([parameter.name for parameter in parameters], sums)

        rule_call = {
            "rule": self._undecayed_rule(), "selection": self.specs[0], "strength": self.specs[1],
            "draw": _unrounded(draw),  # the parameter is rounded when it is written
            "statistics": report is not None, **graphs,
        }  # fmt: skip
        rate = 1.0 if self.decay is None else self.rate
        write_call = {
            "rule": spec.GivenRule(self.factors[0], 0.0, negated=True, rate=rate),
            "selection": everything, "strength": as_it_is, "draw": draw,
            "decay": None if self.decay is None else self.decay.spec("update"), **graphs,
        }  # fmt: skip
        return Calls(rule_call, write_call, add, self.context.exchange)

    def _undecayed_rule(self) -> spec.Rule:
        """Return the rule of the rotated space.

        Coupled decay and `maximize` are in the gradient already, decoupled decay is a factor on the parameter.
        """
        rule = self.kept_items.rule(self.fused_rule, self.context.base, self.group)
        return self.kept_step.undecayed(rule)

    def restore(self) -> None:
        self.hidden.give_back()
        self.kept_step.give_back()
        super().restore()

    def _step(self, indices: list[int], rotated: list[Tensor], in_kernel: bool) -> None:
        """Step one bucket on its rotated gradients; with `in_kernel` the kernel of the rule also masks."""
        rule = self._undecayed_rule()
        states: list[dict[str, Any]] = []  # with this rank's parts of sharded entries
        base_states: list[dict[str, Any]] = []  # the base's own dictionaries
        without_buffer = []  # SGD: state and dtype of parameters whose momentum the rule is about to make
        for i in indices:
            p = self.parameters[i].tensor
            state = self.context.base.state[p]
            if not state:
                self.fused_rule.init_state(self.group, p, state)
            if isinstance(rule, spec.SGDRule) and state.get("momentum_buffer") is None:
                without_buffer.append((self.base_dtype(i), state))
            base_states.append(state)
            states.append({k: local_like(v, p) for k, v in state.items()} if is_dtensor(p) else state)
        # The rule makes SGD's momentum in the dtype of the buffer.
        buffers = self.zeros(indices, torch.float32 if without_buffer else rotated[0].dtype)
        items = []
        for i, buffer, grad, state in zip(indices, buffers, rotated, states, strict=True):
            policy_state = self.context.own_state(self.parameters[i])
            items.append(spec.Item(buffer, grad, state, self._address(i), policy_state, self.shard(i)))
        if in_kernel:
            self.waiting.update(zip(indices, buffers, strict=True))
            self._step_in_kernel(indices, items, rule)
        elif self.specs is not None and not self.in_original:
            self._step_in_two_kernels(indices, items, rule)
        else:
            self._step_outside(indices, items, rule)
        for i, state, base_state in zip(indices, states, base_states, strict=True):
            if state is not base_state:
                p = self.parameters[i].tensor
                base_state.update({k: wrapped_like(v, p) for k, v in state.items() if base_state.get(k) is None})
        for dtype, state in without_buffer:
            _cast_momentum_buffer(dtype, state)

    def _step_in_kernel(self, indices: list[int], items: list[spec.Item], rule: spec.Rule) -> None:
        """Let one kernel compute the rule and the mask. A sharded step is only begun, as in `GenericJob`."""
        assert self.specs is not None
        report = self.context.report
        passing = self.kept_items.passing(self.calls, items, self.policy, self.context.recording)
        self.calls += 1
        draw = self.context.draw_on(items[0].param.device)
        how: dict[str, Any] = {
            "rule": rule, "selection": self.specs[0], "strength": self.specs[1],
            "draw": replace(draw, stochastic=False),  # `apply_masked` rounds, when it writes the parameter
            "statistics": report is not None,
        }  # fmt: skip

        def done(sums: Sequence[spec.Sums] | None) -> None:
            if sums is not None and report is not None:
                report.add_all([self.parameters[i].name for i in indices], sums)
            self.stepped(indices)

        if items[0].shard is None:
            done(selective_step(passing, **how))
        else:
            self.context.exchange.add(begin_sharded(passing, **how), len(items), done)

    def _step_in_two_kernels(self, indices: list[int], items: list[spec.Item], rule: spec.Rule) -> None:
        """Let one kernel compute the rule, and a second one the mask, because the decay reads the unmasked update."""
        (selection, strength), draw = everything_as_it_is(), self.context.draw_on(items[0].param.device)
        previous: list[Tensor | None] = [None] * len(items)
        if "previous_momentum" in self.reads:
            stored = [item.state.get(rule.previous_momentum or "") for item in items]
            zeros = self.zeros(indices)
            previous = [
                zero if x is None else x.to(torch.float32, copy=True) for x, zero in zip(stored, zeros, strict=True)
            ]
        alone = [replace(item, shard=None) for item in items]  # the rule looks at single coordinates
        passing = self.kept_items.passing(self.calls, alone, self.policy, self.context.recording)
        self.calls += 1
        draw = replace(draw, stochastic=False)
        selective_step(passing, rule=rule, selection=selection, strength=strength, draw=draw)
        momenta = [item.state[rule.first_moment or ""] if "momentum" in self.reads else None for item in alone]
        self.take(indices, [item.grad for item in alone], momenta, previous)
        self.mask_and_apply(indices, [item.param for item in alone], negated=True)

    def _step_outside(self, indices: list[int], items: list[spec.Item], rule: spec.Rule) -> None:
        """Compute the rule alone, and mask afterwards: by a policy's own code, or in the original space."""
        moved = [advance(item, rule, keep_previous="previous_momentum" in self.reads) for item in items]
        momenta = [step.momentum if "momentum" in self.reads else None for step in moved]
        self.take(indices, [step.grad for step in moved], momenta, [step.previous_momentum for step in moved])
        self.mask_and_apply(indices, [step.update for step in moved], negated=False)


def _unrounded(draw: spec.Draw) -> spec.Draw:
    """Return the draw of a kernel that does not write the parameter."""
    return replace(draw, stochastic=False) if draw.stochastic else draw


def _cast_momentum_buffer(dtype: torch.dtype, state: dict[str, Any]) -> None:
    """Cast SGD's buffer, which the rule makes in its first step, to the dtype that the base would have given it."""
    buffer = state.get("momentum_buffer")
    if buffer is not None:
        state["momentum_buffer"] = buffer.to(dtype)
