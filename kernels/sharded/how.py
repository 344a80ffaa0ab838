"""What holds for all tensors of a sharded step, and what follows from it: which sums are asked for, and when."""

from __future__ import annotations

from dataclasses import dataclass

from ..spec import Draw, Rule, Selection, Strength


@dataclass
class How:
    """What holds for all tensors of a call."""

    rule: Rule
    selection: Selection
    strength: Strength
    draw: Draw
    statistics: bool

    @property
    def by_previous(self) -> bool:
        return self.selection.kind == "agreement" and self.selection.product == "previous_momentum"

    @property
    def reads_momentum(self) -> bool:
        """Whether a strength does, after the selection."""
        strength = self.strength
        return strength.kind == "alignment" or (strength.kind == "norm_preserving" and strength.of == "momentum")

    @property
    def strength_waits(self) -> bool:
        """Whether the strength's sums are of the selected coordinates themselves, and not only of how many they are."""
        return self.strength.kind == "norm_preserving" or (
            self.strength.kind == "mean_preserving" and self.strength.estimate == "sampled"
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """The sums that are asked for."""
        names = ["selected"]
        if self.statistics:
            names += ["update_sq", "grad_sq", "update_grad", "chosen_u"]
            names += ["equal_u"] if self.selection.kind == "top_k" and not self.strength_waits else []
            names += ["others_u"] if self.strength.still else []
        if self.strength.kind == "alignment":
            names += ["dot", "momentum_sq", "grad_sq"]
        if self.strength_waits:
            names += ["chosen_sq", "others_sq"]
        return tuple(dict.fromkeys([*names, "moving"] if self.by_previous else names))

    @property
    def needs_sums(self) -> bool:
        return self.statistics or self.by_previous or self.strength.kind != "fixed"
