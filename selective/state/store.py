"""What we keep of each parameter beside the base: Note [our state entries]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.base.fused_rules import FusedRule, fused_rule
from selective.base.lent_gradients import LentGradients, gradient_dtype
from selective.base.same_class import class_names
from selective.base.step_base import run_step_on
from selective.kernels import spec
from selective.kernels.lasting import lasting
from selective.parameter import Parameter, initialized, is_lazy
from selective.plan.group_plan import GroupPlan
from selective.plan.policy_groups import PolicyGroup
from selective.policies import Dense, Policy
from selective.policies.view import StepView, Tensors
from selective.sharding.gathering import cut_like
from selective.state.entries import (
    BASIS_STEPS,
    MOMENTUM,
    POLICY,
    POLICY_STATE,
    PRECONDITIONER,
    RESIDUE,
    SEED,
    STEP,
    encode_model,
)
from selective.state.live import Live
from selective.state.parameter_state import Own
from selective.state.rotation_state import OwnBasis
from selective.step_count import Clocks


class OwnState(OwnBasis):
    """The part of `SelectiveUpdate` that keeps state: ours beside the base's."""

    policy_groups: list[PolicyGroup]
    _seed: Live[int] = Live()
    _steps: Live[int] = Live()
    _momentum_beta: float | None
    _constructing: bool
    _clocks: Live[Clocks] = Live()

    def _saved_entries(self, own: dict[str, Tensor], group: PolicyGroup) -> dict[str, Tensor]:
        step, seed = (torch.tensor(number, device="cpu") for number in (self._steps, self._seed))
        entries = {STEP: step, SEED: seed, POLICY: encode_model(group.policy, class_names(self.base)), **own}
        preconditioner = group.preconditioning.preconditioner
        if preconditioner is not None and BASIS_STEPS in own:
            entries[PRECONDITIONER] = encode_model(preconditioner)
        return entries

    def _count_steps(self) -> None:
        """Learn how many steps were taken; replays of a CUDA graph are counted on the device: Note [the clock]."""
        self._steps = self._clocks.count(self._steps)

    def _own_state(self, parameter: Parameter, policy: Policy) -> dict[str, Tensor]:
        """The policy's state of one parameter, made on first use. The tensors are the stored ones."""
        own = self._own_of(parameter, policy)
        return {key[len(POLICY_STATE) :]: value for key, value in own.items() if key.startswith(POLICY_STATE)}

    def _own_of(self, parameter: Parameter, policy: Policy) -> dict[str, Tensor]:
        own = self._own.get(parameter.tensor)
        if own is None:
            with lasting():
                own = self._fresh(parameter, policy)
            self._own[parameter.tensor] = own
            try:
                self._enter_basis([parameter])
            except BaseException:  # a preconditioner may raise: then its basis is made anew, and entered, next time
                del self._own[parameter.tensor]
                raise
        return own

    def _fresh(self, parameter: Parameter, policy: Policy) -> Own:
        """All that we keep of a parameter before its first step."""
        entries = {**self._fresh_own(parameter, policy), **self._fresh_basis(parameter)}
        own = Own(entries, [parameter.tensor.shape])
        own.fits()
        return own

    def _fresh_own(self, parameter: Parameter, policy: Policy) -> dict[str, Tensor]:
        """What we keep of a parameter before its first step, its basis aside."""
        view = StepView(
            Tensors(parameter.tensor), reads=frozenset({"param"}), who=type(policy).__name__, name=parameter.name,
            draw=spec.Draw(self._seed, self._steps), address=parameter.address,
        )  # fmt: skip
        made = policy.init_state(view)
        own = {POLICY_STATE + key: cut_like(value, parameter.tensor) for key, value in made.items()}
        if self._momentum_beta is not None and not isinstance(policy, Dense):
            dtype = torch.float64 if parameter.tensor.dtype == torch.float64 else torch.float32
            own[MOMENTUM] = torch.zeros_like(parameter.tensor, dtype=dtype)
        if self._plans[parameter.group].capture_of(parameter).keeps_residue(parameter.tensor):
            own[RESIDUE] = torch.zeros_like(parameter.tensor)
        return own

    def _own_momentum(self, parameter: Parameter, policy: Policy) -> Tensor:
        return self._own_of(parameter, policy)[MOMENTUM]

    def _own_residue(self, parameter: Parameter, policy: Policy) -> Tensor:
        return self._own_of(parameter, policy)[RESIDUE]

    def _make_own_state(self, wanted: Callable[[Parameter], bool]) -> None:
        """Our state for the wanted parameters, unless their step is the base's alone."""
        for plan in self._plans:
            for parameter in plan.params.parameters:
                if wanted(parameter) and self._keeps_own(parameter, plan.policy):
                    self._own_of(parameter, plan.policy)

    def _keeps_own(self, parameter: Parameter, policy: Policy) -> bool:
        """Whether we keep anything of it: not where its step is the base's alone, or where it has no shape yet."""
        masked = not isinstance(policy, Dense) or self._rotated_as(parameter) is not None
        return masked and not is_lazy(parameter.tensor)

    def _renew_own_state(self, plan: GroupPlan) -> None:
        """After a switch of a group's policy: the new one's state, with the momentum and residue that we keep."""
        policy = plan.policy
        self._own = dict(self._own)  # another object says that entries were replaced
        for parameter in plan.params.parameters:
            kept = self._own.pop(parameter.tensor, Own())
            if self._keeps_own(parameter, policy) and (kept or self._has_base_state(parameter)):
                with lasting():
                    fresh = self._fresh(parameter, policy)
                fresh.update((k, v) for k, v in kept.items() if k in fresh and not k.startswith(POLICY_STATE))
                self._own[parameter.tensor] = fresh
                if not kept:
                    self._enter_basis([parameter])

    def _has_base_state(self, parameter: Parameter) -> bool:
        """Whether the base holds state of it already, so that ours has to join it.

        torch.distributed.checkpoint reads the names of entries off live state. Bases that make theirs in the
        constructor (Adagrad), or that have trained before they were wrapped, have it from the start.
        """
        return bool(self.base.state.get(parameter.tensor))

    def _plan(self) -> None:
        raise TypeError("OwnState is a part of SelectiveUpdate; it is not used alone")

    def init_state(self) -> None:
        """Make all state now, as the first step would, without moving a parameter.

        For bases with a fused rule, dense groups and other captures included, this is exactly their state before the
        first step. Other bases make theirs in a step with zero gradients and learning rate 0, as
        torch.distributed.checkpoint does it; those that count steps have counted one then.
        """
        self._plan()
        known = fused_rule(self.base)
        for plan in self._plans:
            group, members = plan.group, [p for p in plan.params.parameters if not is_lazy(p.tensor)]
            rule: FusedRule | None = None if known is None or known.supports(group) else known
            todo = [m for m in members if m.tensor.requires_grad and not self.base.state.get(m.tensor)]
            if rule is not None:
                for member in todo:
                    rule.init_state(group, member.tensor, self.base.state[member.tensor])
            elif todo:
                _step_on_nothing(self.base, group, [member.tensor for member in todo])
            for member in members:
                if member.tensor.requires_grad and self._keeps_own(member, plan.policy):
                    self._own_of(member, plan.policy)


def _step_on_nothing(base: Optimizer, group: dict[str, Any], params: list[Tensor]) -> None:
    """Let the base make its state for these parameters: zero gradients, learning rate 0, parameters put back."""
    saved, lent = [(p, p.detach().clone()) for p in initialized(group["params"])], LentGradients()
    rate = group.get("lr")
    for p, _ in saved:
        lent.lend(p, None)
    for p in params:
        p.grad = torch.zeros_like(p, dtype=gradient_dtype(p))
    try:
        if rate is not None:
            group["lr"] = torch.zeros_like(rate) if isinstance(rate, Tensor) else 0.0
        run_step_on(base, [group])
    finally:
        if rate is not None:
            group["lr"] = rate
        with torch.no_grad():
            for p, value in saved:
                p.copy_(value)
        lent.give_back()
