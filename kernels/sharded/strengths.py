"""Strengths of one shard: the sums over the whole tensor that they, and statistics, are made of.

The sums by their names; x is the quantity of `Strength.of`:

    selected                       number of selected coordinates
    selected_sq, rest_sq           sums of x^2 over the selected and over the rest (of a sample, if the estimate is one)
    dot, momentum_sq, grad_sq      m . g, sums of m^2 and of g^2
    update_sq, update_grad         sums of u^2 and of u g
    selected_update_sq             sum of u^2 over the selected
    rest_update_sq                 sum of u^2 over the rest
    tied_update_sq                 sum of u^2 over the scores that equal the K-th, if ties are not settled yet
    moving                         number of coordinates whose previous momentum is not 0
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.rules import Advanced
from ..reference.shard_indices import local_sample
from ..reference.strengths import Parts, total
from ..spec import Item, StepSpec, Strength, refuse_kind

Named = dict[str, Tensor]


def waits_for_selection(strength: Strength) -> bool:
    """True if the strength's sums are of the selected coordinates themselves, and not only of their number."""
    return strength.kind == "norm_preserving" or (strength.kind == "mean_preserving" and strength.is_sampled)


def needs_sums(spec: StepSpec) -> bool:
    """True if the ranks have to add up sums, besides the counts of a top-K."""
    return spec.statistics or spec.keeps_previous or spec.strength.kind != "fixed"


def sums_with_ties(spec: StepSpec) -> bool:
    """True if the sums of a top-K are sent together with its ties, instead of in a round after them."""
    return needs_sums(spec) and not waits_for_selection(spec.strength)


def names_of_sums(spec: StepSpec) -> tuple[str, ...]:
    """The names of the sums that the ranks add up, in the order in which they are sent."""
    names, waits = ["selected"], waits_for_selection(spec.strength)
    if spec.statistics:
        names += ["update_sq", "grad_sq", "update_grad", "selected_update_sq"]
        names += ["tied_update_sq"] if spec.selection.kind == "top_k" and not waits else []
        names += ["rest_update_sq"] if spec.strength.still else []
    if spec.strength.kind == "alignment":
        names += ["dot", "momentum_sq", "grad_sq"]
    if waits:
        names += ["selected_sq", "rest_sq"]
    return tuple(dict.fromkeys([*names, "moving"] if spec.keeps_previous else names))


def strength_sums(spec: StepSpec, chosen: Tensor, item: Item, moved: Advanced) -> Named:
    """This rank's part of the sums that only the strength asks for, which `grad_sq` is not."""
    strength, m, g = spec.strength, moved.momentum, moved.grad
    sums: Named = {}
    if strength.kind == "alignment":
        assert m is not None
        sums |= {"dot": total(m * g), "momentum_sq": total(m * m)}
    if waits_for_selection(strength):
        sums |= _squares(spec, chosen, item, moved)
    return sums


def _squares(spec: StepSpec, chosen: Tensor, item: Item, moved: Advanced) -> Named:
    """The sums of x^2 over the selected and the rest. For a mean, x is 1 where selected, to count in a sample."""
    strength, shard = spec.strength, item.shard
    assert shard is not None
    chosen = chosen.reshape(-1)
    x = {"update": moved.update, "momentum": moved.momentum, "gradient": moved.grad}[strength.of]
    x = chosen.to(torch.float32) if strength.kind == "mean_preserving" or x is None else x.reshape(-1)
    here = torch.ones_like(chosen)
    sample = local_sample(shard, spec.draw, item.address, item.param.device) if strength.is_sampled else None
    if sample is not None:
        places, here, _ = sample
        empty = chosen.numel() == 0
        chosen = torch.zeros_like(here) if empty else chosen[places]
        x = x.new_zeros(places.numel()) if empty else x[places]
    squares = torch.where(here, x * x, 0.0)
    return {
        "selected_sq": total(torch.where(chosen, squares, 0.0)),
        "rest_sq": total(torch.where(chosen, 0.0, squares)),
    }


def parts_of(spec: StepSpec, sums: Named | None, item: Item) -> Parts:
    """The sums of the whole tensor as `multipliers` of the reference takes them."""
    strength, shard = spec.strength, item.shard
    assert shard is not None
    numel = shard.numel
    if sums is None or strength.kind == "fixed":
        return Parts(numel)
    if strength.kind == "alignment":
        return Parts(numel, dot=sums["dot"], momentum_sq=sums["momentum_sq"], grad_sq=sums["grad_sq"])
    if strength.kind == "mean_preserving":
        if not strength.is_sampled:
            return Parts(numel, selected=sums["selected"])
        sample = local_sample(shard, spec.draw, item.address, item.param.device)
        return Parts(numel if sample is None else sample[2], selected=sums["selected_sq"])
    if strength.kind != "norm_preserving":
        refuse_kind("the sharded step", "strength", strength.kind)
    return Parts(numel, selected_sq=sums["selected_sq"], rest_sq=sums["rest_sq"])


def correct_first_step_sums(sums: Named, numel: float | Tensor) -> Tensor:
    """Correct, in place, the sums of tensors whose previous momentum is 0 everywhere, which are selected everywhere.

    `numel` is the size of the whole tensors. Returns a bool tensor shaped like the sums: True for those tensors.
    """
    first = sums["moving"] == 0
    sums["selected"] = torch.where(first, numel, sums["selected"])
    for chosen, others in (("selected_update_sq", "rest_update_sq"), ("selected_sq", "rest_sq")):
        if chosen in sums:
            sums[chosen] = torch.where(first, sums[chosen] + sums[others], sums[chosen])
            sums[others] = torch.where(first, 0.0, sums[others])
    return first
