"""The rotation of one group, which is kept from step to step."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.capture.choose import Capture
from selective.parameter import Parameter, is_lazy
from selective.plan.policy_groups import PreconditionerGroup
from selective.preconditioner import MatrixView, Preconditioner, Shape, State, as_matrix, matrix_shape
from selective.sharding.dtensor import is_dtensor, local_of, shard_of, whole_sides

# By what is in the name of a class: they rotate or orthogonalise their gradients themselves.
_ROTATING = (
    "soap", "muon", "shampoo", "dion", "kron", "psgd", "kfac", "galore", "adadiag", "scion", "spectralsphere", "conda",
    "alice", "racs", "fira", "apollo",
)  # fmt: skip
_SAMPLES: tuple[Shape, ...] = ((1, 2, 3), (1, 3, 2), (2, 2, 2))


@dataclass(eq=False)
class RotationPlan:
    """One group's preconditioner and the parameters that it rotates.

    It holds which parameters of the group are rotated, as matrices of which shape, and why the others are not.
    """

    preconditioner: Preconditioner
    matrix_view: MatrixView
    capture: Capture  # of the rotated ones
    capture_of_others: Capture  # ... and of the others: of the same way, or dense
    members: list[Parameter]
    shapes: dict[Tensor, Shape] = field(default_factory=dict)  # of those that are rotated
    reasons_not_rotated: dict[str, str] = field(default_factory=dict)  # of the others, by name
    preconditioners: dict[Tensor, Preconditioner] = field(default_factory=dict)  # DTensors: with their rotated side
    gathered: set[Tensor] = field(default_factory=set)  # ... and those that are rotated as wholes
    joined_shards: list[str] = field(default_factory=list)  # ... and the names of those that are several matrices
    full_steps: bool = False  # True if the base takes full steps on noise: Note [signs of noise]
    sizes: dict[Tensor, torch.Size] = field(default_factory=dict)  # of all that have a shape already
    _split: tuple[list[Parameter], list[Parameter], list[Parameter]] = field(default=([], [], []))

    def __post_init__(self) -> None:
        self.sizes = {p.tensor: p.tensor.shape for p in self.members if not is_lazy(p.tensor)}
        for parameter in self.members:
            found = self._on_shards(parameter.name, parameter.tensor) if is_dtensor(parameter.tensor) else None
            found = found or matrix_shape(parameter.tensor, self.matrix_view)
            if not isinstance(found, str) and not self.preconditioner_for(parameter.tensor).takes(found):
                found = self._why_not_taken(parameter.tensor, found)
            if isinstance(found, str):
                self.reasons_not_rotated[parameter.name] = found
            else:
                self.shapes[parameter.tensor] = found
        if self.shapes and self.capture.way != "fused" and self.capture.facts.keeps_memory:
            raise ValueError(
                "SelectiveUpdate: the base writes to memory that it got hold of earlier, and not to where its "
                "parameters are; a preconditioner has to step it on others. Take a base that looks at p.data in each "
                "step, or preconditioner=None"
            )

    def _why_not_taken(self, tensor: Tensor, shape: Shape) -> str:
        left_out = self.preconditioner_for(tensor).left_out(shape)
        if not left_out and 1 in shape[1:]:
            return f"{shape[1]} x {shape[2]}, a vector"
        if not left_out:
            return f"{type(self.preconditioner).__name__} does not take {list(shape)}"
        return " and ".join(
            f"its {side.side} ({side.length:,}) are left out by {side.why}, which saves {side.bytes:,} bytes"
            for side in left_out
        )

    def _on_shards(self, name: str, tensor: Tensor) -> Shape | str:
        """Return the shape of the whole matrix of a DTensor; a reason if it can't be rotated."""
        if tensor.dim() > 2:  # a part is not some rows or columns of a matrix, in each view
            return f"{tensor.dim()}-D, and of DTensors only 2-D ones are rotated"
        shape = matrix_shape(torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"), self.matrix_view)
        if isinstance(shape, str):
            return shape
        if shape[0] > 1:
            self.joined_shards.append(name)
            return (
                f"a DTensor, and matrix_view={self.matrix_view!r} makes {shape[0]} matrices of it: 'matrices' takes one"
            )
        if self.capture.way != "fused":
            return f"a DTensor, and the base steps it by itself ({self.capture.way} capture)"
        try:
            shard = shard_of(tensor)
        except ValueError as error:
            return f"it {error}"
        if shard is None:  # all of it is here
            whole = whole_sides(tensor)
            here = self.preconditioner.on_shards(shape, whole)
            found = self.preconditioner if isinstance(here, str) else here
        else:
            found = self.preconditioner.on_shards(shape, whole_sides(tensor))
            if isinstance(found, str) and self.preconditioner.gathers(shape):
                self.gathered.add(tensor)
                found = self.preconditioner
        if isinstance(found, str):
            return found
        self.preconditioners[tensor] = found
        return shape

    def with_preconditioner(self, preconditioner: Preconditioner) -> RotationPlan:
        """Return the plan that the same parameters have with another preconditioner."""
        return RotationPlan(preconditioner, self.matrix_view, self.capture, self.capture_of_others, self.members)

    @property
    def has_others(self) -> bool:
        """True if a parameter of the group is not rotated."""
        return any(member.tensor not in self.shapes for member in self.members)

    def preconditioner_for(self, tensor: Tensor) -> Preconditioner:
        """Return the preconditioner for this parameter; for a DTensor, with its rotated side filled in."""
        return self.preconditioners.get(tensor, self.preconditioner)

    def fresh(self, tensor: Tensor) -> State:
        """Return the preconditioner's initial state of this parameter."""
        shape = self.shapes[tensor]
        if not is_dtensor(tensor):
            return self.preconditioner.init_state(as_matrix(tensor, shape))
        like = torch.zeros((), dtype=torch.float32, device=local_of(tensor).device).expand(shape)
        return self.preconditioner_for(tensor).init_state(like)

    def local_shape(self, tensor: Tensor) -> Shape:
        """Return the shape of this rank's part."""
        return (1, *local_of(tensor).shape) if is_dtensor(tensor) else self.shapes[tensor]

    def forget_all_but(self, there: Collection[Tensor]) -> None:
        """Forget parameters that are not in `there`."""
        self.members = [p for p in self.members if p.tensor in there]
        self.shapes = {p: shape for p, shape in self.shapes.items() if p in there}
        self.sizes = {p: size for p, size in self.sizes.items() if p in there}
        self.preconditioners = {p: one for p, one in self.preconditioners.items() if p in there}
        self.gathered &= set(there)
        self._split = [], [], []

    def split(self, present: list[Parameter]) -> tuple[list[Parameter], list[Parameter]]:
        """The parameters that are not rotated, and those that are: the same lists as long as `present` is the same."""
        if present is not self._split[0] or not self._split[0]:
            rest = [p for p in present if p.tensor not in self.shapes]
            self._split = present, rest, [p for p in present if p.tensor in self.shapes]
        return self._split[1:]

    def is_of(self, group: PreconditionerGroup, capture_of_others: Capture, members: list[Parameter]) -> bool:
        """True if nothing has changed that this plan follows from."""
        return (
            self.preconditioner is group.preconditioner
            and self.matrix_view == group.matrix_view
            and self.capture_of_others is capture_of_others
            and self.members is members
        )


def check_change(old: RotationPlan | None, new: RotationPlan | None, number: int) -> None:
    """Raise if a change in training would change a parameter's basis: its stored moments belong to the old one.

    Such a change is a preconditioner of another kind or with other options, another `matrix_view`, or a parameter that
    is rotated as another matrix than before, or not rotated any more.
    """
    before, after = (None if rotation is None else rotation.preconditioner for rotation in (old, new))
    if before is None and after is None:
        return
    if old is None or new is None or type(before) is not type(after):
        why = "another kind"
    else:
        why = _difference(old, new)
    if why is not None:
        raise ValueError(
            f"SelectiveUpdate: preconditioner_groups[{number}] was {before!r}{_view(old)} and is {after!r}{_view(new)} "
            f"now ({why}): a basis would be another, and the moments that were collected in the "
            f"old one would mean nothing. Set it back, or construct the optimizer anew"
        )


def _view(rotation: RotationPlan | None) -> str:
    return "" if rotation is None or rotation.matrix_view == "matrices" else f" (matrix_view={rotation.matrix_view!r})"


def _difference(old: RotationPlan, new: RotationPlan) -> str | None:
    """Return the reason why a basis would be another one now; None if all are the same."""
    for p in old.members:
        then, now = old.shapes.get(p.tensor), new.shapes.get(p.tensor)
        if old.sizes.get(p.tensor) != new.sizes.get(p.tensor):
            continue  # the parameter itself was changed: its basis starts anew, see state/check_before_step.py
        if then != now and any(p.tensor is q.tensor for q in new.members):
            was, is_now = ("left alone" if shape is None else f"rotated as {list(shape)}" for shape in (then, now))
            because = new.reasons_not_rotated.get(p.name)
            return f"parameter {p.name!r} was {was} and would be {is_now}" + (f": {because}" if because else "")
    if old.preconditioner is not new.preconditioner:
        for shape in {*_SAMPLES, *old.shapes.values()}:
            if basis_form_of(old.preconditioner, shape) != basis_form_of(new.preconditioner, shape):
                return f"of matrices {list(shape)} something else would be kept"
    return None


def basis_form_of(
    preconditioner: Preconditioner, shape: Shape, device: torch.device | str = "cpu"
) -> dict[str, object]:
    """Return the names, shapes and dtypes of the basis of a matrix of this shape; {} if it is not rotated."""
    if not preconditioner.takes(shape):
        return {}
    state = preconditioner.init_state(torch.zeros(shape, dtype=torch.float32, device=device))
    return {key: (tuple(value.shape), value.dtype) for key, value in state.items()}


def warn_of_two_rotations(base: Optimizer) -> None:
    """Warn if a base that rotates or orthogonalises by itself gets rotated gradients now."""
    names = [cls.__name__ for cls in type(base).__mro__ if issubclass(cls, Optimizer) and cls is not Optimizer]
    if any(word in name.lower() for name in names for word in _ROTATING):
        warnings.warn(
            f"SelectiveUpdate: {type(base).__name__} rotates or orthogonalises gradients itself, and gets rotated ones "
            f"now: the second rotation undoes or repeats the first one's work, and costs as much again. Take AdamW as "
            f"the base, or preconditioner=None",
            stacklevel=4,
        )
