"""Checkpoints, copies and pickles of `SelectiveUpdate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor
from torch.optim import Optimizer

from selective.capture.base import Parameter
from selective.capture.fused import fused_rule
from selective.loading import check_basis, first_saved
from selective.own_basis import ON_THE_HOST, is_of_basis
from selective.planning import Planning
from selective.policies import Dense, Policy
from selective.preconditioner import Preconditioner
from selective.state import (
    BASIS_STEPS,
    MOMENTUM,
    POLICY,
    POLICY_STATE,
    PRECONDITIONER,
    RESIDUE,
    SEED,
    STEP,
    base_part,
    check_entries,
    check_layout,
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
                    state.setdefault(index, {}).update(self._saved_entries(self._own[p], policy_group))
                index += 1
        found["state"] = state
        for hook in self._optimizer_state_dict_post_hooks.values():
            result = hook(self, found)
            found = found if result is None else result
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a checkpoint of this wrapper, or of the plain base. Everything is checked before anything is loaded.

        dtypes are kept exactly. The checkpoint's hyper-parameters win, of policy and preconditioner as of the base; a
        policy or a preconditioner of another kind, or another basis, is a ValueError.
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
        preconditioners = self._checked_preconditioners(order, ours)
        theirs = base_part(found)
        self._check_base_state(found["param_groups"], theirs["state"])
        self.base.load_state_dict(theirs)
        parameters = [parameter for members in self._parameters() for parameter in members]
        for index, parameter in zip(order, parameters, strict=True):
            if index in theirs["state"]:
                restore_dtypes(self.base.state[parameter.tensor], theirs["state"][index])
        for number, (policy_group, members) in enumerate(zip(self.policy_groups, self._members, strict=True)):
            policy_group.policy = policies[number]
            found_there = preconditioners[number]
            if found_there is not None:
                policy_group.preconditioning.load(found_there)
            members.kept.drop()
            members.kept_rotated.drop()
        self._own = {
            parameter.tensor: _own_tensors(ours[index], parameter.tensor)
            for index, parameter in zip(order, parameters, strict=True)
            if index in ours
        }
        self._steps, self._seed = counted.get(STEP, 0), counted.get(SEED, self._seed)
        self._clocks.set(self._seed, self._steps)
        self._plan()
        self._bring_home(parameters)
        self._make_missing_bases(parameters)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _make_missing_bases(self, parameters: list[Parameter]) -> None:
        """Bases of parameters that were saved without: they start afresh."""
        for parameter in parameters:
            own = self._own.get(parameter.tensor)
            if own is not None and BASIS_STEPS not in own and self._stage_of(parameter) is not None:
                own.update(self._fresh_basis(parameter))
                self._enter_basis([parameter])

    def _checked_preconditioners(
        self, order: list[Any], ours: dict[Any, dict[str, Tensor]]
    ) -> list[Preconditioner | None]:
        """What a group's bases were saved with, None where nothing was; a ValueError where they are not this one's."""
        found: list[Preconditioner | None] = []
        indices = iter(order)
        for number, (group, members) in enumerate(zip(self.policy_groups, self._parameters(), strict=True)):
            entries = [ours.get(next(indices), {}) for _ in members]
            saved = first_saved(entries, PRECONDITIONER, Preconditioner, number)
            found.append(saved)
            if saved is None:
                continue
            for member, one in zip(members, entries, strict=True):
                check_basis(one, saved, self._stages[number], group.preconditioning, member)
        return found

    def _checked_policies(self, order: list[Any], ours: dict[Any, dict[str, Tensor]]) -> list[Policy]:
        """The policies after loading, by group; a ValueError where the checkpoint's is of another kind."""
        policies: list[Policy] = []
        position = 0
        for number, (policy_group, members) in enumerate(zip(self.policy_groups, self._parameters(), strict=True)):
            policy = policy_group.policy
            indices = order[position : position + len(members)]
            position += len(members)
            saved = first_saved([ours.get(index, {}) for index in indices], POLICY, Policy, number)
            if saved is not None and kinds_of(saved.model_dump()) != kinds_of(policy.model_dump()):
                raise ValueError(
                    f"SelectiveUpdate: param_groups[{number}] has the policy {policy!r}, the checkpoint was made with "
                    f"{saved!r}; construct the optimizer with that policy, or load only the base's part "
                    f"(selective.base_part(state_dict))"
                )
            policy = policy if saved is None else saved
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
        found = {k: v for k, v in _own_tensors(entries, member.tensor).items() if not is_of_basis(k)}
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
        left_out |= {"step", "_report", "defaults", "_members", "_recorded", "_clocks", "_stages", "_places"}
        return {key: value for key, value in self.__dict__.items() if key not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__dict__.update(_report=None, defaults=self.base.defaults)
        self._start_planning()
        Optimizer.__setstate__(self, {})

    def __repr__(self) -> str:
        policies = ", ".join(repr(group.policy) for group in self.policy_groups)
        found = [group.preconditioning.preconditioner for group in self.policy_groups]
        rotated = f", preconditioner={', '.join(map(repr, found))}" if any(p is not None for p in found) else ""
        return f"{type(self).__name__}({self.base!r}, policy={policies}{rotated})"


def kinds_of(data: Any) -> Any:
    """The kinds in a policy's data, its own and those of what it is made of: what makes two of one kind."""
    if not isinstance(data, dict) or "kind" not in data:
        return None
    return data["kind"], {key: kinds_of(value) for key, value in data.items() if kinds_of(value) is not None}


def _own_tensors(entries: dict[str, Tensor], param: Tensor) -> dict[str, Tensor]:
    kept = {
        key: cast(Tensor, value)
        for key, value in entries.items()
        if key in (MOMENTUM, RESIDUE) or key.startswith(POLICY_STATE) or is_of_basis(key)
    }
    return {
        key: value.detach().clone().to("cpu" if key in ON_THE_HOST else param.device) for key, value in kept.items()
    }
