"""What we keep of rotated parameters: the preconditioner's tensors, a count of steps, a count of gradients left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.parameter import Parameter
from selective.plan.group_plan import GroupPlan
from selective.plan.rotation_plan import RotationPlan
from selective.preconditioner import Shape, State
from selective.rotation.basis import Basis
from selective.rotation.carry import enter
from selective.rotation.moments import moments_of
from selective.rotation.refresh_gathered import on_wholes
from selective.sharding.collectives import sums_over_ranks
from selective.sharding.dtensor import is_first, shard_of
from selective.state.entries import BASIS, BASIS_SHAPE, BASIS_SKIPPED, BASIS_STEPS
from selective.state.live import Live
from selective.state.parameter_state import Own


class OwnBasis(Optimizer):
    """The part of `SelectiveUpdate` that keeps bases."""

    base: Optimizer
    _own: Live[dict[Tensor, Own]] = Live()  # Note [stand-ins]
    _plans: Live[list[GroupPlan]] = Live()
    _places: Live[dict[Tensor, int]] = Live()  # the number of each rotated parameter among all of them

    def _rotated_as(self, parameter: Parameter) -> tuple[RotationPlan, Shape] | None:
        """The rotation that takes this parameter, and as what; None where it is left alone."""
        return self._plans[parameter.group].rotated_as(parameter)

    def _has_bases(self, rotation: RotationPlan) -> bool:
        """Whether any of its parameters has one: before the first step everything may still be changed."""
        return any(BASIS_STEPS in self._own.get(p, {}) for p in rotation.shapes)

    def _fresh_basis(self, parameter: Parameter) -> dict[str, Tensor]:
        """What we keep of its basis before its first step; nothing of parameters that are not rotated."""
        found = self._rotated_as(parameter)
        if found is None:
            return {}
        rotation, shape = found
        made = rotation.fresh(parameter.tensor)
        if not isinstance(made, dict):
            raise TypeError(
                f"SelectiveUpdate: {type(rotation.preconditioner).__name__}.init_state returned {made!r} for parameter "
                f"{parameter.name!r}, must be a dictionary of tensors; an empty one where nothing is kept"
            )
        for key, value in made.items():
            here = isinstance(value, Tensor) and value.device == parameter.tensor.device
            if not here and not (isinstance(value, Tensor) and value.device.type == "cpu" and value.dim() == 0):
                raise TypeError(
                    f"SelectiveUpdate: {type(rotation.preconditioner).__name__}.init_state: {key!r} of parameter "
                    f"{parameter.name!r} must be a tensor on {parameter.tensor.device}, or a 0-d one on the CPU"
                )
        own = {BASIS + key: value.detach() for key, value in made.items()}
        own[BASIS_STEPS] = torch.zeros((), dtype=torch.int64, device="cpu")
        own[BASIS_SHAPE] = torch.tensor(shape, dtype=torch.int64, device="cpu")
        own[BASIS_SKIPPED] = torch.zeros((), dtype=torch.int64, device=parameter.tensor.device)
        return own

    def _bring_home(self, parameters: Sequence[Parameter]) -> None:
        """After a load: what a preconditioner keeps goes to the device on which it keeps it."""
        homes: dict[tuple[object, ...], dict[str, torch.device]] = {}
        for parameter in parameters:
            found, own = self._rotated_as(parameter), self._own.get(parameter.tensor, {})
            if found is None or BASIS_STEPS not in own:
                continue
            rotation, shape = found
            self._keep_part(parameter, rotation)
            key = (id(rotation.of(parameter.tensor)), shape, parameter.tensor.device)
            if key not in homes:
                made = rotation.fresh(parameter.tensor)
                homes[key] = {BASIS + name: value.device for name, value in made.items()}
            own.update({name: own[name].to(device) for name, device in homes[key].items() if name in own})

    def _basis(self, parameter: Parameter) -> Basis:
        """The stored tensors of a rotated parameter."""
        found = self._rotated_as(parameter)
        assert found is not None
        own = self._own[parameter.tensor]
        state = {key[len(BASIS) :]: value for key, value in own.items() if key.startswith(BASIS)}
        device, place = parameter.tensor.device, self._places[parameter.tensor]
        here, shard = found[0].local_shape(parameter.tensor), shard_of(parameter.tensor)
        gathers = parameter.tensor in found[0].gathered
        return Basis(here, device, state, own[BASIS_STEPS], own[BASIS_SKIPPED], place, found[1], shard, gathers)

    def _keep_part(self, parameter: Parameter, rotation: RotationPlan) -> None:
        """After a load: of what is a sum over ranks, a checkpoint has the whole, and one rank keeps it."""
        own = self._own[parameter.tensor]
        if shard_of(parameter.tensor) is not None and not is_first(parameter.tensor):
            own.update({key: torch.zeros_like(own[key]) for key in _parts_in(own, rotation, parameter.tensor)})

    def _summed_entries(self) -> dict[Tensor, dict[str, Tensor]]:
        """The wholes of what each rank has a part of. All ranks of a mesh have to ask for them together."""
        parts: list[tuple[Tensor, str, Tensor]] = []
        for rotation in (plan.rotation for plan in self._plans if plan.rotation is not None):
            for p in rotation.shapes:
                own = self._own.get(p, {})
                if shard_of(p) is not None and BASIS_STEPS in own:
                    parts += [(p, key, own[key]) for key in _parts_in(own, rotation, p)]
        found: dict[Tensor, dict[str, Tensor]] = {}
        sums = sums_over_ranks([value for _, _, value in parts], [shard_of(p) for p, _, _ in parts])
        for (p, key, _), value in zip(parts, sums, strict=True):
            found.setdefault(p, {})[key] = value
        return found

    def _enter_basis(self, parameters: Sequence[Parameter]) -> None:
        """Take the moments that the base has already into bases that were just made.

        They are of the parameter's own space where the base has trained alone, or a plain checkpoint was loaded.
        """
        for parameter in parameters:
            found = self._rotated_as(parameter)
            if found is None or parameter.tensor not in self.base.state:
                continue
            rotation, shape = found[0], found[0].local_shape(parameter.tensor)
            moments = moments_of(self.base, self.base.param_groups[parameter.group], rotation.capture.facts)
            basis, preconditioner = self._basis(parameter), rotation.preconditioner

            def change(x: Tensor, state: State = basis.state, project: Any = preconditioner.project_in) -> Tensor:
                return project([state], [x])[0]

            shard = basis.shard if basis.gathers else None
            entered = change if shard is None else on_wholes(shard, basis.whole, change)
            with torch.no_grad():
                enter(self.base, parameter.tensor, moments, shape, entered)


def _parts_in(own: dict[str, Tensor], rotation: RotationPlan, param: Tensor) -> list[str]:
    """Names of the entries of a sharded matrix that are parts of sums over ranks."""
    if param in rotation.gathered:
        return [BASIS_SKIPPED]
    names = [key for key in own if key.startswith(BASIS) and rotation.preconditioner.is_part(key[len(BASIS) :])]
    return [BASIS_SKIPPED, *names]
