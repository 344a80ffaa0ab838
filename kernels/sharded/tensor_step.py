"""One tensor's part of a sharded step: this rank's part of its sums, and the step that the whole sums lead to."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.decay import decaying
from ..reference.rules import Advanced, apply_mask
from ..reference.strengths import multipliers, total
from ..spec import Item, StepSpec, Sums
from .selections import ShardSelection
from .strengths import Named, correct_first_step_sums, names_of_sums, parts_of, strength_sums, waits_for_selection


class ShardedTensorStep:
    """The step of one shard, whose moments have moved.

    Call in this order: the search for the K-th score (top-K only, `selection.ranked`), `sums`, and
    `finish(sums over ranks)`. `sums` may be called before the ties of a top-K are settled or after.
    """

    def __init__(self, item: Item, spec: StepSpec, moved: Advanced) -> None:
        assert item.shard is not None
        self.item, self.spec, self.shard, self.device = item, spec, item.shard, item.param.device
        self.selection = ShardSelection(item, spec, moved)
        self.dense = self.selection.k == 0
        self.moving: Tensor | None = None  # the number of previous momenta that are not 0
        if spec.keeps_previous:
            assert moved.previous_momentum is not None
            self.moving = total(moved.previous_momentum != 0)
        # The steps of all tensors are kept until the sums are there, so tensors that are not read again are freed.
        momentum = moved.momentum if "momentum" in spec.strength.reads else None
        self.moved = Advanced(moved.grad, moved.update, momentum, None)

    def sums(self) -> Tensor:
        """This rank's part of the sums `names_of_sums`: float64, 1-d. Zeros on a replica that is not counted."""
        spec, chosen = self.spec, self.selection.chosen
        sums: Named = {"selected": total(chosen)}
        if spec.statistics:
            sums |= self._statistics(chosen)
        if spec.statistics or spec.strength.kind == "alignment":
            sums["grad_sq"] = total(self.moved.grad * self.moved.grad)
        sums |= strength_sums(spec, chosen, self.item, self.moved)
        if self.moving is not None:
            sums["moving"] = self.moving
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        row = torch.stack([sums.get(name, zero) for name in names_of_sums(spec)])
        return row if self.shard.counted else torch.zeros_like(row)

    def _statistics(self, chosen: Tensor) -> Named:
        u, g = self.moved.update, self.moved.grad
        squares = u * u
        sums: Named = {"update_sq": total(squares), "update_grad": total(u * g)}
        if self.spec.strength.still and not self.dense:
            squares = torch.where(u * g == 0, 0.0, squares)
        sums["selected_update_sq"] = total(torch.where(chosen, squares, 0.0))
        sums["rest_update_sq"] = total(torch.where(chosen, 0.0, squares))
        if self.selection.ties_are_open:
            ranked = self.selection.ranked
            assert ranked is not None
            equal = (ranked.key == ranked.prefix).reshape(squares.shape)
            sums["tied_update_sq"] = total(torch.where(equal, squares, 0.0))
        return sums

    def finish(self, sums: Named | None) -> Sums | None:
        """Step the parameter by the whole tensor's sums. Returns the report, if statistics are asked for."""
        spec, moved, item, selection = self.spec, self.moved, self.item, self.selection
        if sums is not None:
            self._complete(sums)
        selected, rest = multipliers(spec.strength, parts_of(spec, sums, item), item.policy_state, self.device)
        if self.dense:
            selected, rest = torch.ones_like(selected), torch.ones_like(rest)
        dtype = moved.update.dtype
        mask = torch.where(selection.chosen, selected.to(dtype), rest.to(dtype))
        if spec.strength.still and not self.dense:
            mask = torch.where(moved.update * moved.grad == 0, 0.0, mask)
        report = None
        if spec.statistics:
            assert sums is not None
            masked = selected * selected * sums["selected_update_sq"] + rest * rest * sums["rest_update_sq"]
            report = Sums(
                self.shard.numel, sums["selected"], selected, rest, sums["update_sq"], sums["grad_sq"],
                sums["update_grad"], masked,
            )  # fmt: skip
        decays = None
        if spec.decay is not None:
            decays = decaying(spec.decay, item, spec.rule, moved.update, mask, moved.grad)
        apply_mask(item, spec.rule, moved.update, mask, spec.draw, decays)
        return report

    def _complete(self, sums: Named) -> None:
        """Add what is known only now: the rest's squares, the ties that are selected, a first step."""
        if self.spec.statistics and "rest_update_sq" not in sums:
            sums["rest_update_sq"] = (sums["update_sq"] - sums["selected_update_sq"]).clamp(min=0)
        if self.selection.has_ties and not waits_for_selection(self.spec.strength):
            self._add_ties(sums)
        if self.spec.keeps_previous:  # a tensor whose previous momentum is 0 everywhere is selected everywhere
            self.selection.select_all(correct_first_step_sums(sums, float(self.shard.numel)))

    def _add_ties(self, sums: Named) -> None:
        """Add the ties that are selected to sums that were made before these were known.

        Of the ties' squares, the share of the ties that is selected is added.
        """
        ranked = self.selection.ranked
        assert ranked is not None and ranked.need is not None and ranked.among is not None
        sums["selected"] = sums["selected"] + ranked.need
        if not self.spec.statistics:
            return
        share = ranked.need / ranked.among.clamp(min=1) * sums["tied_update_sq"]
        sums["selected_update_sq"] = sums["selected_update_sq"] + share
        sums["rest_update_sq"] = (sums["rest_update_sq"] - share).clamp(min=0)
