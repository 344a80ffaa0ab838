"""Checkpoints, copies and pickles of `SelectiveUpdate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor
from torch.optim import Optimizer

from selective.capture.base import Parameter
from selective.capture.fused import fused_rule
from selective.planning import Planning
from selective.policies import Dense, Policy
from selective.state import (
    MOMENTUM,
    POLICY,
    POLICY_STATE,
    RESIDUE,
    SEED,
    STEP,
    base_part,
    check_entries,
    check_layout,
    decode_policy,
    own_part,
    restore_dtypes,
)  # fmt: skip


class Checkpointing(Planning):
    """The part of `SelectiveUpdate` that saves and loads, copies and pickles."""

    def state_dict(self) -> dict[str, Any]:
        """torch's form, `{"state", "param_groups"}`: the base's own, with our entries under `selective/`."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        self._plan()  # groups that were added on the base are ours too
        self._count_steps()
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
        self._check_base_state(found["param_groups"], theirs["state"])
        self.base.load_state_dict(theirs)
        parameters = [parameter for members in self._parameters() for parameter in members]
        for index, parameter in zip(order, parameters, strict=True):
            if index in theirs["state"]:
                restore_dtypes(self.base.state[parameter.tensor], theirs["state"][index])
        for policy_group, policy, members in zip(self.policy_groups, policies, self._members, strict=True):
            policy_group.policy = policy
            members.kept.drop()
        self._own = {
            parameter.tensor: _own_tensors(ours[index], parameter.tensor)
            for index, parameter in zip(order, parameters, strict=True)
            if index in ours
        }
        self._steps, self._seed = counted.get(STEP, 0), counted.get(SEED, self._seed)
        self._clocks.set(self._seed, self._steps)
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
                    if kinds_of(saved.model_dump()) != kinds_of(policy.model_dump()):
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

    def _check_base_state(self, groups: list[dict[str, Any]], states: dict[Any, dict[str, Any]]) -> None:
        """Refuse what another optimizer or another model has saved, as far as this base is known."""
        known = fused_rule(self.base)
        for group, members in zip(groups, self._parameters(), strict=True):
            for index, member in zip(group["params"], members, strict=True):
                entries = states.get(index)
                if not entries:
                    continue
                facts = self._captures[member.group][1].facts
                keys = [facts.momentum_key] if facts.momentum_key is not None else []
                if known is not None:
                    keys = known.moments(group, entries, type(self.base).__name__)
                for key in keys:
                    shape = getattr(entries.get(key), "shape", member.tensor.shape)
                    if shape != member.tensor.shape:
                        raise ValueError(
                            f"SelectiveUpdate: the checkpoint's {key!r} of parameter {member.name!r} has shape "
                            f"{tuple(shape)}, the parameter {tuple(member.tensor.shape)}; nothing was loaded"
                        )

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
        self._count_steps()
        left_out = {name for name in self.__dict__ if name.endswith("_hooks")}
        left_out |= {"step", "_report", "defaults", "_members", "_recorded", "_clocks"}
        return {key: value for key, value in self.__dict__.items() if key not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__dict__.update(_report=None, defaults=self.base.defaults)
        self._start_planning()
        Optimizer.__setstate__(self, {})

    def __repr__(self) -> str:
        policies = ", ".join(repr(group.policy) for group in self.policy_groups)
        return f"{type(self).__name__}({self.base!r}, policy={policies})"


def kinds_of(data: Any) -> Any:
    """The kinds in a policy's data, its own and those of what it is made of: what makes two of one kind."""
    if not isinstance(data, dict) or "kind" not in data:
        return None
    return data["kind"], {key: kinds_of(value) for key, value in data.items() if kinds_of(value) is not None}


def _own_tensors(entries: dict[str, Tensor], param: Tensor) -> dict[str, Tensor]:
    kept = {k: v for k, v in entries.items() if k in (MOMENTUM, RESIDUE) or k.startswith(POLICY_STATE)}
    return {key: cast(Tensor, value).detach().clone().to(param.device) for key, value in kept.items()}
