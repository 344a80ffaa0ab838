"""Fused capture of rotated parameters: the known rule runs on zeros and leaves -mask u there, in the rotated space.

So nothing but the products, and the buffer that they are made from, is added to a fused step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from selective.base.fused_rules import FusedRule
from selective.base.lent_gradients import LentGradients
from selective.capture.rotated import RotatedJob
from selective.kernels import advance, begin_sharded, selective_step, spec
from selective.sharding.dtensor import is_dtensor, local_like, wrapped_like


class RotatedFusedJob(RotatedJob):
    """The rule of a known base, on its own state."""

    steps_base = False

    def __init__(self, *args: Any, rule: FusedRule, hides: bool, alone: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fused, self.hides, self.alone = rule, hides, alone
        self.hidden = LentGradients()

    def prepare(self) -> None:
        super().prepare()
        self.factors = self._factors()
        if self.hides:  # the base steps the rest of the group, and skips what has no gradient
            for p in self.tensors():
                self.hidden.lend(p, None)

    def finish(self) -> None:
        self.hidden.give_back()
        in_kernel = self.specs is not None and not self.in_original
        for indices in self.rotation.alike(self.moving, self.rotation.at_once(narrow=in_kernel)):
            grads = [self.gradients[i] for i in indices]
            self._step(indices, self.rotation.gradients_in(indices, grads, narrow=in_kernel), in_kernel)
        if self.alone:  # else the other job of the group does it
            self.fused.after(self.group)
        self.close()

    def restore(self) -> None:
        self.hidden.give_back()
        super().restore()

    def _step(self, indices: list[int], rotated: list[Tensor], in_kernel: bool) -> None:
        rule = self.fused.rule(self.context.base, self.group)
        # Decay and `maximize` are in the gradient already, or a factor on the parameter.
        undecayed: Any = {"decay_factor": 1.0} if isinstance(rule, spec.LionRule) else {}
        rule = replace(rule, weight_decay=0.0, maximize=False, **undecayed)
        states, fresh = [], []
        kept: list[dict[str, Any]] = []  # the base's own dictionaries, of which shards get a copy with what is here
        for i in indices:
            p = self.parameters[i].tensor
            state = self.context.base.state[p]
            if not state:
                self.fused.init_state(self.group, p, state)
            if isinstance(rule, spec.SGDRule) and state.get("momentum_buffer") is None:
                fresh.append((self.base_dtype(i), state))
            kept.append(state)
            states.append({k: local_like(v, p) for k, v in state.items()} if is_dtensor(p) else state)
        # SGD's momentum is made in the dtype of what is stepped.
        left = self.nothing(indices, torch.float32 if fresh else rotated[0].dtype)
        items = []
        for i, buffer, grad, state in zip(indices, left, rotated, states, strict=True):
            own = self.context.own_state(self.parameters[i], self.policy)
            items.append(spec.Item(buffer, grad, state, self._address(i), own, self.shard(i)))
        if in_kernel:
            self.waiting.update(zip(indices, left, strict=True))
            self._step_in_kernel(indices, items, rule)
        else:
            self._step_outside(indices, items, rule)
        for i, mine, theirs in zip(indices, states, kept, strict=True):
            if mine is not theirs:
                p = self.parameters[i].tensor
                theirs.update({k: wrapped_like(v, p) for k, v in mine.items() if theirs.get(k) is None})
        for dtype, state in fresh:
            _in_dtype(dtype, state)

    def _step_in_kernel(self, indices: list[int], items: list[spec.Item], rule: spec.Rule) -> None:
        assert self.specs is not None
        report = self.context.report
        passing = self.kept.passing(self.calls, items, self.policy, self.context.recording)
        self.calls += 1
        draw = self.context.draw_on(items[0].param.device)
        how: dict[str, Any] = {
            "rule": rule, "selection": self.specs[0], "strength": self.specs[1],
            "draw": replace(draw, stochastic=False),  # the parameter is rounded later, in `land`
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

    def _step_outside(self, indices: list[int], items: list[spec.Item], rule: spec.Rule) -> None:
        """The rule alone, and then the mask: where it is a policy's own code, or not of the rotated space."""
        moved = [advance(item, rule, keep_previous="previous_momentum" in self.reads) for item in items]
        momenta = [one.momentum if "momentum" in self.reads else None for one in moved]
        self.take(indices, [one.grad for one in moved], momenta, [one.previous_momentum for one in moved])
        self.mask_and_land(indices, [one.update for one in moved], negated=False)


def _in_dtype(dtype: torch.dtype, state: dict[str, Any]) -> None:
    """SGD's buffer, which the rule makes in its first step, in the dtype in which the base would have made it."""
    buffer = state.get("momentum_buffer")
    if buffer is not None:
        state["momentum_buffer"] = buffer.to(dtype)
