"""KeptBases: the bases of one group's rotated parameters, which are kept from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from operator import is_

from selective.parameter import Parameter
from selective.rotation.basis import Basis
from selective.rotation.stacks import Stacks


@dataclass
class KeptBases:
    """The bases of these parameters, and the stacks in which their entries lie; None if they don't.

    `made_of` are the objects that the bases were made of: they hold as long as none of them is replaced.
    """

    parameters: list[Parameter] = field(default_factory=list)
    made_of: tuple[object, ...] = ()
    bases: list[Basis] = field(default_factory=list)
    stacks: Stacks | None = None

    def __post_init__(self) -> None:
        # What statistics read of stacked bases: they are kept after the step, and the matrices shall not be with them.
        self.counted = [
            replace(basis, state={name: x for name, x in basis.state.items() if x.dim() == 0}) for basis in self.bases
        ]

    def hold(self, parameters: Sequence[Parameter], made_of: tuple[object, ...]) -> bool:
        """True if they are those of these parameters, and nothing has changed since they were made."""
        return (
            len(made_of) == len(self.made_of)
            and all(map(is_, made_of, self.made_of))
            and self.are_of(parameters)
            and (self.stacks is None or self.stacks.are_in_place())
        )

    def are_of(self, parameters: Sequence[Parameter]) -> bool:
        """True if they are those of these parameters, in this order."""
        return len(parameters) == len(self.parameters) and all(map(is_, parameters, self.parameters))
