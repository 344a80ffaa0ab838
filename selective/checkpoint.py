"""Checkpoints, copies and pickles of `SelectiveUpdate`, and the state that is its own: Note [our state entries]."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.capture.base import Parameter
from selective.capture.choose import Capture
from selective.capture.fused import FusedRule, fused_rule
from selective.capture.stepping import run_step_on
from selective.groups import PolicyGroup
from selective.kernels import spec
from selective.policies import Dense, Policy
from selective.state import (
    MOMENTUM,
    POLICY,
    POLICY_STATE,
    RESIDUE,
    SEED,
    STEP,
    MergedState,
    base_part,
    check_entries,
    check_layout,
    decode_policy,
    encode_policy,
    own_part,
    restore_dtypes,
)  # fmt: skip
from selective.view import StepView, Tensors


class Checkpointing(Optimizer):
    """The half of `SelectiveUpdate` that is about what lasts."""

    base: Optimizer
    policy_groups: list[PolicyGroup]
    _own: dict[Tensor, dict[str, Tensor]]
    _seed: int
    _steps: int
    _momentum_beta: float | None
    _captures: list[tuple[object, Capture]]
    _constructing: bool

    @property
    def state(self) -> MergedState:
        """The base's state and ours, by parameter: a live view with the keys of `state_dict()["state"]`."""
        policies: dict[Tensor, Policy] = {}  # looked up once for each view: reading all of it stays linear

        def ours(param: Tensor) -> dict[str, Tensor]:
            if not policies:
                for group, policy_group in zip(self.base.param_groups, self.policy_groups, strict=False):
                    policies.update(dict.fromkeys(group["params"], policy_group.policy))
            if param not in self._own or param not in policies:
                return {}
            return self._saved_entries(self._own[param], policies[param])

        return MergedState(lambda: self.base.state, ours, lambda: self._own)

    @state.setter
    def state(self, value: Any) -> None:
        if not self._constructing:
            raise AttributeError("SelectiveUpdate.state is a view; load_state_dict changes the state")

    def _saved_entries(self, own: dict[str, Tensor], policy: Policy) -> dict[str, Tensor]:
        step, seed = (torch.tensor(number, device="cpu") for number in (self._steps, self._seed))
        return {STEP: step, SEED: seed, POLICY: encode_policy(policy), **own}

    def _own_state(self, parameter: Parameter, policy: Policy) -> dict[str, Tensor]:
        """The policy's state of one parameter, made on first use. The tensors are the stored ones."""
        own = self._own_of(parameter, policy)
        return {key[len(POLICY_STATE) :]: value for key, value in own.items() if key.startswith(POLICY_STATE)}

    def _own_of(self, parameter: Parameter, policy: Policy) -> dict[str, Tensor]:
        own = self._own.get(parameter.tensor)
        if own is None:
            own = self._own[parameter.tensor] = self._fresh_own(parameter, policy)
        return own

    def _fresh_own(self, parameter: Parameter, policy: Policy) -> dict[str, Tensor]:
        """What we keep of a parameter before its first step."""
        view = StepView(
            Tensors(parameter.tensor), reads=frozenset({"param"}), who=type(policy).__name__, name=parameter.name,
            draw=spec.Draw(self._seed, self._steps), address=parameter.address,
        )  # fmt: skip
        own = {POLICY_STATE + key: value for key, value in policy.init_state(view).items()}
        if self._momentum_beta is not None:
            dtype = torch.float64 if parameter.tensor.dtype == torch.float64 else torch.float32
            own[MOMENTUM] = torch.zeros_like(parameter.tensor, dtype=dtype)
        if self._captures[parameter.group][1].keeps_residue(parameter.tensor):
            own[RESIDUE] = torch.zeros_like(parameter.tensor)
        return own

    def _own_momentum(self, parameter: Parameter, policy: Policy) -> Tensor:
        return self._own_of(parameter, policy)[MOMENTUM]

    def _own_residue(self, parameter: Parameter, policy: Policy) -> Tensor:
        return self._own_of(parameter, policy)[RESIDUE]

    def _make_own_state(self, wanted: Callable[[Parameter], bool]) -> None:
        """Our state for the wanted parameters, unless their step is the base's alone."""
        for policy_group, members in zip(self.policy_groups, self._parameters(), strict=True):
            if isinstance(policy_group.policy, Dense):
                continue
            for parameter in members:
                if wanted(parameter):
                    self._own_of(parameter, policy_group.policy)

    def _has_base_state(self, parameter: Parameter) -> bool:
        """Whether the base holds state of it already, so that ours has to join it.

        torch.distributed.checkpoint reads the names of entries off live state. Bases that make theirs in the
        constructor (Adagrad), or that have trained before they were wrapped, have it from the start.
        """
        return bool(self.base.state.get(parameter.tensor))

    def _parameters(self) -> list[list[Parameter]]:
        raise TypeError("Checkpointing is the half of SelectiveUpdate; it is not used alone")

    def _plan(self) -> None:
        raise TypeError("Checkpointing is the half of SelectiveUpdate; it is not used alone")

    def init_state(self) -> None:
        """Make all state now, as the first step would, without moving a parameter.

        For bases with a fused rule, dense groups and other captures included, this is exactly their state before the
        first step. Other bases make theirs in a step with zero gradients and learning rate 0, as
        torch.distributed.checkpoint does it; those that count steps have counted one then.
        """
        self._plan()
        known = fused_rule(self.base)
        for number, (group, members) in enumerate(zip(self.base.param_groups, self._parameters(), strict=True)):
            rule: FusedRule | None = None if known is None or known.supports(group) else known
            todo = [m for m in members if m.tensor.requires_grad and not self.base.state.get(m.tensor)]
            if rule is not None:
                for member in todo:
                    rule.init_state(group, member.tensor, self.base.state[member.tensor])
            elif todo:
                _step_on_nothing(self.base, group, [member.tensor for member in todo])
            policy = self.policy_groups[number].policy
            for member in members:
                if member.tensor.requires_grad and not isinstance(policy, Dense):
                    self._own_of(member, policy)

    def state_dict(self) -> dict[str, Any]:
        """torch's form, `{"state", "param_groups"}`: the base's own, with our entries under `selective/`."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        self._plan()  # groups that were added on the base are ours too
        found = dict(self.base.state_dict())
        state = {index: dict(entries) for index, entries in found["state"].items()}
        index = 0
        for group, policy_group in zip(self.base.param_groups, self.policy_groups, strict=True):
            for p in group["params"]:
                if p in self._own:
                    state.setdefault(index, {}).update(self._saved_entries(self._own[p], policy_group.policy))
                index += 1
        found["state"] = state
        for hook in self._optimizer_state_dict_post_hooks.values():
            result = hook(self, found)
            found = found if result is None else result
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a checkpoint of this wrapper, or of the plain base. Everything is checked before anything is loaded.

        dtypes are kept exactly. The checkpoint's hyper-parameters win, of the policy as of the base; a policy of
        another kind is a ValueError.
        """
        found = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = hook(self, found)
            found = found if result is None else dict(result)
        self._plan()
        check_layout(found, self.base.param_groups)
        order = [index for group in found["param_groups"] for index in group["params"]]
        ours = own_part(found)
        counted = check_entries(ours)
        policies = self._checked_policies(order, ours)
        theirs = base_part(found)
        self.base.load_state_dict(theirs)
        parameters = [parameter for members in self._parameters() for parameter in members]
        for index, parameter in zip(order, parameters, strict=True):
            if index in theirs["state"]:
                restore_dtypes(self.base.state[parameter.tensor], theirs["state"][index])
        for policy_group, policy in zip(self.policy_groups, policies, strict=True):
            policy_group.policy = policy
        self._own = {
            parameter.tensor: _own_tensors(ours[index], parameter.tensor)
            for index, parameter in zip(order, parameters, strict=True)
            if index in ours
        }
        self._steps, self._seed = counted.get(STEP, self._steps), counted.get(SEED, self._seed)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _checked_policies(self, order: list[Any], ours: dict[Any, dict[str, Tensor]]) -> list[Policy]:
        """The policies after loading, by group; a ValueError where the checkpoint's is of another kind."""
        policies: list[Policy] = []
        position = 0
        for number, (policy_group, members) in enumerate(zip(self.policy_groups, self._parameters(), strict=True)):
            policy = policy_group.policy
            indices = order[position : position + len(members)]
            position += len(members)
            for index in indices:
                if index in ours and POLICY in ours[index]:
                    saved = decode_policy(ours[index][POLICY], f"param_groups[{number}]")
                    if saved.kind != policy.kind:
                        raise ValueError(
                            f"SelectiveUpdate: param_groups[{number}] has the policy {policy!r}, the checkpoint was "
                            f"made with {saved!r}; construct the optimizer with that policy, or load only the "
                            f"base's part (selective.base_part(state_dict))"
                        )
                    policy = saved
                    break
            policies.append(policy)
            for index, member in zip(indices, members, strict=True):
                if index in ours and not isinstance(policy, Dense):
                    self._check_own_shapes(ours[index], member, policy)
        return policies

    def _check_own_shapes(self, entries: dict[str, Tensor], member: Parameter, policy: Policy) -> None:
        """Refuse entries that this optimizer would not have made."""
        found = _own_tensors(entries, member.tensor)
        wanted = self._fresh_own(member, policy)
        if (MOMENTUM in found) != (MOMENTUM in wanted):
            had = "was" if MOMENTUM in found else "was not"
            raise ValueError(
                f"SelectiveUpdate: the checkpoint {had} made with momentum_beta; construct the optimizer the same way"
            )
        theirs = {key: (tuple(value.shape), value.dtype) for key, value in found.items()}
        ours = {key: (tuple(value.shape), value.dtype) for key, value in wanted.items()}
        if theirs != ours:
            raise ValueError(
                f"SelectiveUpdate: the checkpoint's state of parameter {member.name!r} does not fit {policy!r}: found "
                f"{theirs}, expected {ours}"
            )

    def __getstate__(self) -> dict[str, Any]:
        hooks = {name for name in self.__dict__ if name.endswith("_hooks")}
        return {k: v for k, v in self.__dict__.items() if k not in hooks and k not in ("step", "_report", "defaults")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__dict__.update(_report=None, defaults=self.base.defaults)
        Optimizer.__setstate__(self, {})

    def __repr__(self) -> str:
        policies = ", ".join(repr(group.policy) for group in self.policy_groups)
        return f"{type(self).__name__}({self.base!r}, policy={policies})"


def _own_tensors(entries: dict[str, Tensor], param: Tensor) -> dict[str, Tensor]:
    kept = {k: v for k, v in entries.items() if k in (MOMENTUM, RESIDUE) or k.startswith(POLICY_STATE)}
    return {key: cast(Tensor, value).detach().clone().to(param.device) for key, value in kept.items()}


def _step_on_nothing(base: Optimizer, group: dict[str, Any], params: list[Tensor]) -> None:
    """Let the base make its state for these parameters: zero gradients, learning rate 0, parameters put back."""
    saved = [(p, p.detach().clone(), p.grad) for p in group["params"]]
    rate = group.get("lr")
    for p in group["params"]:
        p.grad = None
    for p in params:
        p.grad = torch.zeros_like(p)
    try:
        if rate is not None:
            group["lr"] = torch.zeros_like(rate) if isinstance(rate, Tensor) else 0.0
        run_step_on(base, [group])
    finally:
        if rate is not None:
            group["lr"] = rate
        with torch.no_grad():
            for p, value, grad in saved:
                p.copy_(value)
                p.grad = grad
