"""Policy: a selection and a strength under one name, or a mask of your own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, ConfigDict, SerializeAsAny
from torch import Tensor

from selective.configured import Configured
from selective.kernels import spec
from selective.policies.function import policy_of_function
from selective.policies.selections import AnySelection, Selection
from selective.policies.strengths import AnyStrength, Strength
from selective.policies.view import TENSORS, StepView


class Policy(Configured):
    """Decides by how much each coordinate of an update is multiplied.

    There are three ways to get a policy:

    - combine a selection and a strength: `Policy(selection=TopK(fraction=0.3), strength=Fixed(selected=2, rest=0.5))`;
    - take a named one (`MGUP()`, `Cautious()`, ...), a subclass whose fields are its paper's symbols;
    - write a subclass with your own `mask(view)`, and pydantic fields as hyper-parameters.

    A policy never writes. Its state lives in the optimizer (`init_state`). A subclass whose `reads` names something
    that a `StepView` does not have raises TypeError where it is defined.
    """

    _family: ClassVar[str] = "policy"
    _registry: ClassVar[dict[str, type[Configured]]] = {}
    _state_is_kept: ClassVar[str] = (
        "make what changes from step to step in init_state(view), and return (mask, state) from mask(view). To change "
        "a hyper-parameter: opt.policy_groups[i][{name!r}] = ..."
    )

    reads: ClassVar[frozenset[str]] = frozenset({"update", "grad"})
    """The tensors of the view that a custom `mask` reads: any of update, grad, momentum, previous_momentum, param."""
    scope: ClassVar[Literal["tensor", "row", "element"]] = "tensor"
    """The part of a parameter that `mask` has to see at once: the whole tensor, whole rows, or any shard of it."""

    if TYPE_CHECKING:

        def __init__(self, **data: Any) -> None: ...

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        unknown = set(cls.reads) - set(TENSORS)
        if unknown:
            raise TypeError(
                f"{cls.__name__}: reads names {sorted(unknown)}, which a StepView does not have; it has "
                f"{', '.join(TENSORS)}"
            )

    def __new__(cls, *args: Any, **data: Any) -> Policy:
        # Policy(selection=..., strength=...) is a Combined: the fields are kept off Policy itself, so that a custom
        # policy doesn't inherit two that mean nothing to it.
        return object.__new__(Combined if cls is Policy else cls)

    def parts(self) -> tuple[Selection, Strength] | None:
        """The selection and the strength that this policy stands for; None if it only has a `mask`."""
        return None

    def code_name(self) -> str:
        """The name of the class, or classes, whose code makes the mask: for messages."""
        return type(self).__name__

    def specs(self) -> tuple[spec.Selection, spec.Strength] | None:
        """This policy in the kernels' terms; None if it, its selection or its strength exists in Python only."""
        parts = self.parts()
        if parts is None:
            return None
        selection, strength = parts[0].spec(), parts[1].spec()
        return None if selection is None or strength is None else (selection, strength)

    def needs(self) -> frozenset[str]:
        """The names of the view's tensors that this policy reads."""
        parts = self.parts()
        if parts is None:
            return self.reads
        return parts[0].needs() | parts[1].needs()

    def init_state(self, view: StepView) -> dict[str, Tensor]:
        """The initial state of one parameter: tensors, each 0-d or shaped like the parameter.

        Called once, before the parameter's first step. Empty unless a strength or a subclass keeps state.
        """
        parts = self.parts()
        return {} if parts is None else parts[1].init_state(view)

    def mask(self, view: StepView) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The multiplier of each coordinate: a bool or float tensor that broadcasts to the parameter's shape.

        Return `(mask, state)` to update the state as well. Not called on empty tensors. Raises TypeError in a policy
        that overrides neither this nor `parts`.
        """
        parts = self.parts()
        if parts is None:
            raise TypeError(
                f"{type(self).__name__}: override mask(view), or parts() to name a selection and a strength"
            )
        selection, strength = parts
        selected = selection.select(view)
        if is_dense_top_k(selection, selected.numel()):
            return torch.ones((), dtype=view.dtype, device=view.device), dict(view.state)
        of_selected, of_rest, state = strength.multipliers(view, selected)
        return two_multipliers(view, selected, of_selected, of_rest, still_coordinates(strength, view)), state


def is_dense_top_k(selection: Selection, numel: int) -> bool:
    """True if `selection` is a top-K whose K is 0 on a tensor of `numel` elements: such a tensor is left dense."""
    described = selection.spec()
    return described is not None and described.leaves_dense(numel)


def still_coordinates(strength: Strength, view: StepView) -> Tensor | None:
    """True at coordinates that the strength multiplies by 0 whatever is selected; None if there are none."""
    described = strength.spec()
    return view.update * view.grad == 0 if described is not None and described.still else None


def two_multipliers(
    view: StepView, selected: Tensor, of_selected: Tensor | float, of_rest: Tensor | float, still: Tensor | None
) -> Tensor:
    """The mask of a selection and a strength, in the view's dtype; 0 where `still` is true."""
    one = torch.ones((), dtype=view.dtype, device=view.device)
    mask = torch.where(selected, one * of_selected, one * of_rest)
    return mask if still is None else torch.where(still, 0.0, mask)


class Combined(Policy):
    """The class of `Policy(selection=..., strength=...)`."""

    model_config = ConfigDict(title="Policy")
    kind: ClassVar[str] = "Policy"
    selection: AnySelection
    strength: AnyStrength

    def __repr_name__(self) -> str:
        return "Policy"

    def parts(self) -> tuple[Selection, Strength]:
        return self.selection, self.strength

    def code_name(self) -> str:
        own = [type(self.selection)] if type(self.selection).select is not Selection.select else []
        own += [type(self.strength)] if type(self.strength).multipliers is not Strength.multipliers else []
        return " and ".join(part.__name__ for part in own) or self.kind


def policy_from(data: Any) -> Policy:
    """Make a policy of a `Policy`, a kind's name ("MGUP"), a dict with a `kind`, or JSON text; None is `Dense()`.

    A function of a `StepView` that returns a mask is taken as well: `policy_from(lambda view: view.update.abs() > 1)`.
    It can read the tensors that it names as attributes of its view. A checkpoint knows it by its name: load it into an
    optimizer with the function of that name. One with hyper-parameters or state is a subclass of `Policy`.

    Raises `ValueError` for a wrong key or value, with its path and bound, and for an unknown kind. Raises TypeError
    for a function that can't be called with a view alone.
    """
    if callable(data) and not isinstance(data, (type, Configured)):
        return policy_of_function(data, Policy, policy_from)
    return Policy.from_data("Dense" if data is None else data)


AnyPolicy = Annotated[SerializeAsAny[Policy], BeforeValidator(Policy.part_from_data)]
