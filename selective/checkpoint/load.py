"""Checkpoints, copies and pickles of `SelectiveUpdate`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from selective.checkpoint.frame import check_entries, check_layout, checked_frame
from selective.checkpoint.matches_basis import advice
from selective.checkpoint.matches_policies import own_tensors
from selective.kernels.lasting import lasting
from selective.mismatch import CheckpointMismatch
from selective.parameter import Parameter
from selective.policies import Policy
from selective.preconditioner import Preconditioner
from selective.sharding.dtensor import is_dtensor
from selective.sharding.gathering import cut_like
from selective.state.entries import BASIS_STEPS, POLICY, SEED, STEP, base_part, decode_note, own_part, restore_dtypes
from selective.state.live import is_live
from selective.state.writing import Writing


class Checkpointing(Writing):
    """The part of `SelectiveUpdate` that saves and loads, copies and pickles."""

    def state_dict(self) -> dict[str, Any]:
        """torch's form, `{"state", "param_groups"}`: the base's own, with our entries under `selective/`."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        self._plan()  # groups that were added on the base are ours too
        self._complete_own()
        self._check_all_there()
        self._count_steps()
        if self._steps and not self._own:  # no masked parameter has had a gradient yet: the count needs a place
            self._make_own_state(lambda parameter: parameter.tensor.requires_grad)
        found = dict(self.base.state_dict())
        state = {index: dict(entries) for index, entries in found["state"].items()}
        wholes = self._summed_entries()
        for saved, plan in zip(found["param_groups"], self._plans, strict=True):
            for index, p in zip(saved["params"], plan.group["params"], strict=True):
                if p in self._own:
                    ours = {**self._saved_entries(self._own[p], plan.policy_group), **wholes.get(p, {})}
                    state.setdefault(index, {}).update(ours)
        found["state"] = state
        for hook in self._optimizer_state_dict_post_hooks.values():
            result = hook(self, found)
            found = found if result is None else result
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a checkpoint of this wrapper, or of the plain base: all of it, or nothing at all.

        What can be known beforehand is checked before anything is loaded; where the base refuses it later, all is put
        back. The tensors of the base's state are shared with the checkpoint, as torch does it.

        dtypes are kept exactly. The checkpoint's hyper-parameters win, of policy and preconditioner as of the base; a
        policy or a preconditioner of another kind, or another basis, is a ValueError.
        """
        found = checked_frame(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = hook(self, found)
            found = found if result is None else checked_frame(result)
        self._plan()
        check_layout(found, self.base.param_groups)
        order = [index for group in found["param_groups"] for index in group["params"]]
        ours = own_part(found)
        counted = check_entries(ours, order)
        policies = self._checked_policies(order, ours)
        preconditioners = self._checked_preconditioners(order, ours)
        theirs = self._cut(order, base_part(found))
        names = {decode_note(entries[POLICY]) for entries in ours.values()} - {""}
        self._check_base(found["param_groups"], theirs["state"], names, ours)
        to_say = advice(preconditioners, [plan.preconditioning for plan in self._plans])
        with self._all_or_nothing():
            self._load_base(order, theirs)
            self._load_own(order, ours, policies, preconditioners)
            self._steps, self._seed = counted.get(STEP, 0), counted.get(SEED, self._seed)
            self._clocks.set(self._seed, self._steps)
            self._plan()
            parameters = [parameter for plan in self._plans for parameter in plan.params.parameters]
            self._bring_home(parameters)
            self._make_missing_bases(parameters)
        if to_say is not None:
            warnings.warn(to_say, stacklevel=2)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _cut(self, order: list[Any], theirs: dict[str, Any]) -> dict[str, Any]:
        """Whole tensors of a checkpoint, where a sharded parameter's are wanted: the part that is here."""
        params = dict(zip(order, (p for group in self.base.param_groups for p in group["params"]), strict=True))
        if not any(map(is_dtensor, params.values())):
            return theirs
        state = {
            index: {k: cut_like(v, params[index]) if isinstance(v, Tensor) else v for k, v in entries.items()}
            for index, entries in theirs["state"].items()
            if index in params
        }
        return {**theirs, "state": state}

    def _load_base(self, order: list[Any], theirs: dict[str, Any]) -> None:
        before = [dict(group) for group in self.base.param_groups]
        self.base.load_state_dict(theirs)
        for number, (old, new) in enumerate(zip(before, self.base.param_groups, strict=True)):
            missing = [key for key in old if key in self.base.defaults and key not in new]
            if missing:  # only now: the base may know how to read older checkpoints of its own
                raise CheckpointMismatch(
                    f"the checkpoint is not of {type(self.base).__name__}: its param_groups[{number}] has no "
                    f"{', '.join(map(repr, missing))}"
                )
        params = [p for group in self.base.param_groups for p in group["params"]]
        for index, p in zip(order, params, strict=True):
            if index in theirs["state"]:
                restore_dtypes(self.base.state[p], theirs["state"][index])

    def _load_own(
        self,
        order: list[Any],
        ours: dict[Any, dict[str, Tensor]],
        policies: list[Policy],
        preconditioners: list[Preconditioner | None],
    ) -> None:
        for plan, policy, preconditioner in zip(self._plans, policies, preconditioners, strict=True):
            plan.policy_group.policy = policy
            if preconditioner is not None:
                plan.preconditioning.load(preconditioner)
            plan.look_anew()
        params = [p for group in self.base.param_groups for p in group["params"]]
        self._own = {p: own_tensors(ours[i], p) for i, p in zip(order, params, strict=True) if i in ours}

    def _make_missing_bases(self, parameters: list[Parameter]) -> None:
        """Bases of parameters that were saved without: they start afresh."""
        for parameter in parameters:
            own = self._own.get(parameter.tensor)
            if own is not None and BASIS_STEPS not in own and self._rotated_as(parameter) is not None:
                with lasting():
                    own.update(self._fresh_basis(parameter))
                self._enter_basis([parameter])

    def __getstate__(self) -> dict[str, Any]:
        self._count_steps()
        found = {**self.__dict__, **self._live}
        left_out = {name for name in found if name.endswith("_hooks")} | {"_live"}
        left_out |= {"step", "_report", "defaults", "_plans", "_recorded", "_clocks", "_places", "_edited"}
        found["_choices"] = {plan.number: plan.choice for plan in self._plans if plan.choice is not None}
        return {key: value for key, value in found.items() if key not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy or a pickle: all of it. Of `{"state", "param_groups", "defaults"}`: as torch's optimizers do it."""
        if "base" not in state:
            self._set_as_torch(state)
            return
        live = {name: value for name, value in state.items() if is_live(type(self), name)}
        self.__dict__.update({name: value for name, value in state.items() if name not in live})
        self.__dict__.update(_live={**live, "_report": None}, defaults=self.base.defaults)
        self._start_planning()
        Optimizer.__setstate__(self, {})

    def __repr__(self) -> str:
        policies = ", ".join(repr(group.policy) for group in self.policy_groups)
        found = [group.preconditioning.preconditioner for group in self.policy_groups]
        rotated = f", preconditioner={', '.join(map(repr, found))}" if any(p is not None for p in found) else ""
        return f"{type(self).__name__}({self.base!r}, policy={policies}{rotated})"
