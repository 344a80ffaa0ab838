"""Whether a checkpoint is of this optimizer, and what puts everything back where loading it fails nevertheless."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor

from selective.base.fused_rules import fused_rule
from selective.base.same_class import check_class, check_first_state, check_options
from selective.checkpoint.matches_basis import check_basis, first_saved
from selective.kernels.lasting import lasting
from selective.mismatch import CheckpointMismatch
from selective.parameter import Parameter, is_lazy
from selective.policies import Policy
from selective.preconditioner import Preconditioner
from selective.sharding.gathering import cut_like
from selective.state.entries import MOMENTUM, POLICY, PRECONDITIONER
from selective.state.fits import Settling
from selective.state.parameter_state import ON_THE_HOST, Own, is_kept, is_of_basis


def cant_be_loaded(reason: str) -> CheckpointMismatch:
    """The error for a checkpoint that looked right, and that failed while it was loaded."""
    return CheckpointMismatch(f"the checkpoint can't be loaded ({reason})")


class Checking(Settling):
    """The part of `SelectiveUpdate` that refuses checkpoints."""

    _live: dict[str, Any]

    @contextmanager
    def _all_or_nothing(self, failed: Callable[[str], ValueError] = cant_be_loaded) -> Iterator[None]:
        """Put base and wrapper back as they were if loading fails half-way; `failed` makes the error of the reason."""
        base, own = vars(self.base), ("_own", "_steps", "_seed", "_places")
        theirs, ours = dict(base), {name: getattr(self, name) for name in own}
        # torch's load replaces these; a base with one of its own may write into them
        contents = [(group, dict(group)) for group in self.base.param_groups]
        contents += [(entry, dict(entry)) for entry in self.base.state.values() if isinstance(entry, dict)]
        groups = [
            (group, group.policy, group.preconditioning, dict(vars(group.preconditioning)))
            for group in self.policy_groups
        ]
        plans = [(plan, plan.choice, plan.rotation) for plan in self._plans]
        try:
            yield
        except BaseException as error:
            base.clear()
            base.update(theirs)
            for dictionary, before in contents:
                dictionary.clear()
                dictionary.update(before)
            self._live.update(ours, _plans=[plan for plan, _, _ in plans])
            for plan, choice, rotation in plans:
                plan.choice, plan.rotation = choice, rotation
            for group, policy, preconditioning, before in groups:
                group.policy = policy
                vars(preconditioning).update(before)
            self._clocks.set(self._seed, self._steps)
            for plan in self._look():
                plan.look_anew()
            if not isinstance(error, Exception) or isinstance(error, CheckpointMismatch):
                raise
            reason = str(error).removeprefix("SelectiveUpdate: ")
            raise failed(f"{type(error).__name__}: {reason}") from error

    def _checked_preconditioners(
        self, order: list[Any], ours: dict[Any, dict[str, Tensor]]
    ) -> list[Preconditioner | None]:
        """What a group's bases were saved with, None where nothing was; a ValueError where they are not this one's."""
        found: list[Preconditioner | None] = []
        indices = iter(order)
        for plan in self._plans:
            entries = [ours.get(next(indices), {}) for _ in plan.params.parameters]
            saved = first_saved(entries, PRECONDITIONER, Preconditioner, plan.number)
            found.append(saved)
            if saved is None:
                continue
            for member, one in zip(plan.params.parameters, entries, strict=True):
                if is_lazy(member.tensor):
                    continue  # looked at when it has a shape
                check_basis(one, saved, plan.rotation, plan.preconditioning, member)
        return found

    def _checked_policies(self, order: list[Any], ours: dict[Any, dict[str, Tensor]]) -> list[Policy]:
        """The policies after loading, by group; a ValueError where the checkpoint's is of another kind."""
        policies: list[Policy] = []
        position = 0
        for number, plan in enumerate(self._plans):
            policy, members = plan.policy, plan.params.parameters
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
                if index in ours and not is_lazy(member.tensor):  # those are looked at when they have a shape
                    self._check_own_shapes(ours[index], member, policy)
        return policies

    def _check_base(
        self,
        groups: list[dict[str, Any]],
        states: dict[Any, dict[str, Any]],
        names: set[str],
        ours: Collection[Any],
    ) -> None:
        """Refuse what another optimizer or another model has saved.

        `names`: of the classes it was saved with. `ours`: the parameters of which there are entries of ours.
        """
        same = [check_class(one, self.base) for one in sorted(names)]
        known = fused_rule(self.base)
        for group, plan in zip(groups, self._plans, strict=True):
            check_options(self.base, group)
            stepped = [index for index in group["params"] if states.get(index)]
            lacking = [index for index in stepped if index not in ours]
            # of a dense group only what is rotated has entries
            if not plan.is_dense and 0 < len(lacking) < len(stepped):
                raise CheckpointMismatch(
                    f"the checkpoint has entries of ours for {len(stepped) - len(lacking)} of the {len(stepped)} "
                    f"parameters of param_groups[{plan.number}] that have stepped, and none for parameter {lacking[0]}",
                    "To load the base's part alone: selective.base_part(state_dict)",
                )
            found = zip(group["params"], plan.params.parameters, strict=True)
            found = [(index, member) for index, member in found if not is_lazy(member.tensor)]
            saved = [(member, entries) for index, member in found if (entries := states.get(index))]
            for member, entries in saved:
                facts = plan.capture.facts
                keys = [facts.momentum_key] if facts.momentum_key is not None else []
                if known is not None:
                    keys = known.moments(group, entries, type(self.base).__name__)
                for key in keys:
                    shape = getattr(entries.get(key), "shape", member.tensor.shape)
                    if shape != member.tensor.shape:
                        raise CheckpointMismatch(
                            f"the checkpoint's {key!r} of parameter {member.name!r} has shape {tuple(shape)}, the "
                            f"parameter {tuple(member.tensor.shape)}"
                        )
            if saved and known is None and not (same and all(same)):
                by_param = {member.tensor: entries for member, entries in saved}
                check_first_state(self.base, group, plan.group, by_param, plan.capture.facts.residue)

    def _check_own_shapes(self, entries: dict[str, Tensor], member: Parameter, policy: Policy) -> None:
        """Refuse entries that this optimizer would not have made."""
        found = {k: v for k, v in own_tensors(entries, member.tensor).items() if not is_of_basis(k)}
        wanted = self._fresh_own(member, policy)
        if (MOMENTUM in found) != (MOMENTUM in wanted):
            had = "was" if MOMENTUM in found else "was not"
            raise CheckpointMismatch(
                f"the checkpoint {had} made with momentum_beta; construct the optimizer the same way"
            )
        theirs = {key: (tuple(value.shape), value.dtype) for key, value in found.items()}
        ours = {key: (tuple(value.shape), value.dtype) for key, value in wanted.items()}
        if theirs != ours:
            raise CheckpointMismatch(
                f"the checkpoint's state of parameter {member.name!r} does not fit {policy!r}: found {theirs}, "
                f"expected {ours}"
            )


def kinds_of(data: Any) -> Any:
    """The kinds in a policy's data, its own and those of what it is made of: what makes two of one kind."""
    if not isinstance(data, dict) or "kind" not in data:
        return None
    return data["kind"], {key: kinds_of(value) for key, value in data.items() if kinds_of(value) is not None}


def own_tensors(entries: dict[str, Tensor], param: Tensor) -> Own:
    """What of a parameter's saved entries is kept, as copies of our own."""
    kept = {key: cast(Tensor, value) for key, value in entries.items() if is_kept(key)}
    with lasting():
        made = {
            key: cut_like(value.detach().clone().to("cpu" if key in ON_THE_HOST else param.device), param)
            for key, value in kept.items()
        }
    own = Own(made, [] if is_lazy(param) else [param.shape])
    own.fits()
    return own
