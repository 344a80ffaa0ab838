"""The matrices of one group whose norm is kept, and what does not go together with that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from selective.base.hyperparameters import LOW_PRECISION
from selective.messages.user_line import warn
from selective.norms import Norm, NormControl
from selective.norms.matrices import matrices_of
from selective.parameter import Parameter, is_lazy
from selective.preconditioner import MatrixView, Shape
from selective.sharding.dtensor import is_dtensor

if TYPE_CHECKING:
    from selective.plan.group_plan import GroupPlan


@dataclass(eq=False)
class NormPlan:
    """One group's rule about norms, the parameters that are under it, and why the others are not."""

    norm: Norm
    matrix_view: MatrixView
    members: list[Parameter]
    from_zero: bool  # True if the base's update does not look at the parameter, so that it can step zeros
    shapes: dict[Tensor, Shape] = field(default_factory=dict)  # of those that are under it
    reasons: dict[str, str] = field(default_factory=dict)  # of the others, by name
    seen: set[Tensor] = field(default_factory=set)  # those that were looked at, and are not 0
    kept: tuple[Any, ...] | None = None  # what step/norms.py has made of the parameters of the last step

    def __post_init__(self) -> None:
        for member in self.members:
            found = self._shape_of(member.tensor)
            if isinstance(found, str):
                self.reasons[member.name] = found
            else:
                self.shapes[member.tensor] = found

    def _shape_of(self, param: Tensor) -> Shape | str:
        if is_lazy(param):
            return "it has no shape yet"
        shape = matrices_of(param, self.matrix_view)
        if is_dtensor(param) and not isinstance(shape, str) and (shape[0] > 1 or param.dim() != 2):
            many = f"{shape[0]} matrices in one" if shape[0] > 1 else f"{param.dim()}-D"
            return f"a DTensor, and {many}: of sharded parameters only 2-D ones are, as one matrix"
        return shape

    def is_of(self, norm: Norm, view: MatrixView, members: list[Parameter], from_zero: bool) -> bool:
        """True if the plan was made by these."""
        return (
            norm == self.norm and view == self.matrix_view and members is self.members and from_zero == self.from_zero
        )


def update_norms(base: Optimizer, plans: Sequence[GroupPlan]) -> None:
    """Plan anew which norms are kept, in the groups in which something has changed that it depends on.

    Raises:
        ValueError: the rule does not go together with the group's base, decay or options.
    """
    for plan in plans:
        norm = plan.norm
        if norm is None:
            plan.norms = None
            continue
        view, members, from_zero = plan.preconditioning.matrix_view, plan.params.parameters, _steps_zeros(plan)
        known = plan.norms
        if known is None or not known.is_of(norm, view, members, from_zero):
            made = NormPlan(norm, view, members, from_zero)
            made.seen |= set() if known is None else known.seen & made.shapes.keys()
            if known is None or known.shapes.keys() != made.shapes.keys():
                plan.params.state_checked, plan.params.with_entries = False, None
            plan.norms = known = made
        known.norm = norm  # an equal one may have come from a checkpoint, and is compared by identity in each step
        check_norm(base, plan)


def warn_of_norms(plans: Sequence[GroupPlan]) -> None:
    """Warn of parameters of two dimensions and more that are stepped by the base, at a rate that is relative to norms.

    With a scale other than 1 the rate of the group is meant for them.
    """
    for plan in plans:
        norms = plan.norms
        if norms is None or not isinstance(norms.norm, NormControl) or norms.norm.scale != 1:
            continue
        beside = [m for m in norms.members if m.name in norms.reasons and not is_lazy(m.tensor) and m.tensor.dim() > 1]
        if beside:
            more = f" and {len(beside) - 1:,} more" if len(beside) > 1 else ""
            warn(
                f"SelectiveUpdate: {beside[0].name!r}{more} of param_groups[{plan.number}] are not under "
                f"{norms.norm!r} ({norms.reasons[beside[0].name]}), and the base steps them at lr, which is relative "
                f"to norms there. Give them a group with norm None and a rate of their own"
            )


def _steps_zeros(plan: GroupPlan) -> bool:
    """True if what the step does to a parameter does not depend on the parameter, except for decoupled decay."""
    facts = plan.capture.facts
    looks = facts.depends_on_param or facts.decay == "inside" or bool(facts.residue)
    return not looks and "param" not in plan.policy.needs()


def check_norm(base: Optimizer, plan: GroupPlan) -> None:
    """Refuse what does not go together with a norm that is kept."""
    assert plan.norms is not None
    group, norm, where, name = plan.group, plan.norms.norm, f"param_groups[{plan.number}]", type(base).__name__
    if plan.decay is not None:
        raise ValueError(
            f"SelectiveUpdate: {norm!r} takes the place of weight decay, and {where} has decay={plan.decay!r} as well; "
            f"leave one of them out"
        )
    if group.get("lr") is None:
        raise ValueError(
            f"SelectiveUpdate: the rate of {norm!r} is lr · scale, and {where} has no lr, because {name} makes its own"
        )
    low = any(param.dtype in LOW_PRECISION for param in plan.norms.shapes)
    if plan.capture.facts.residue and low:
        raise ValueError(
            f"SelectiveUpdate: {name} keeps the rounding residues of {where}, and {norm!r} writes other values than "
            f"those which the residues are of; switch them off in {name}, or train float32 parameters"
        )
    if not plan.norms.from_zero and _decays(group):
        who = f"the policy {plan.policy!r}" if "param" in plan.policy.needs() else name
        raise ValueError(
            f"SelectiveUpdate: {norm!r} takes the place of weight decay, and here that of {name} can't be told from "
            f"its update, because {who} looks at the parameters; set weight_decay=0 in {where}, and give what is to "
            f"decay a group of its own"
        )


def _decays(group: dict[str, Any]) -> bool:
    decay = group.get("weight_decay", 0.0)
    return isinstance(decay, Tensor) or bool(decay)
