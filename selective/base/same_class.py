"""Whether a checkpoint was made with a base of this class.

Two things tell. The names of the class and of those that it inherits from stand with the policy (Note [our state
entries]), so that Adam's checkpoint is told apart from RAdam's, whose entries have the same names. And what the base
keeps of a parameter after its first step has to be in the checkpoint: that is all there is to go by where nothing of
ours was saved, and it tells two classes of one name apart that keep different things.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.base.clone import unnoticed
from selective.base.first_state import first_state
from selective.mismatch import CheckpointMismatch


def class_names(base: Optimizer) -> str:
    """The base's class and what it inherits from, with the distribution of each: "torch.AdamW torch.Adam".

    The modules between move from version to version, and a class of one's own from file to file.
    """
    chain = type(base).__mro__
    own = chain[: chain.index(Optimizer)]
    return " ".join(f"{cls.__module__.partition('.')[0]}.{cls.__name__}" for cls in own)


def check_class(saved: str, base: Optimizer) -> bool:
    """Refuse the `class_names` of another class; whether they are of the very same one.

    One that inherits from the other is none, nor is one of the same name in another package: `check_first_state` looks
    at those.
    """
    theirs, own = saved.split(), class_names(base).split()
    first, ours = theirs[0], own[0]
    if first == ours:
        return True
    if _name(first) not in map(_name, own) and _name(ours) not in map(_name, theirs):
        raise CheckpointMismatch(
            f"the checkpoint is not of {_name(ours)}: it was made with {first}, the base here is {ours}",
            "Construct the optimizer with that base; or, if this one can go on from what the other kept, load only the "
            "base's part (selective.base_part(state_dict))",
        )
    return False


def _name(qualified: str) -> str:
    return qualified.rpartition(".")[2]


def check_options(base: Optimizer, saved: Mapping[str, Any]) -> None:
    """Refuse options that this class would not keep: torch's AdamW decouples its decay whatever was saved."""
    coupled = saved.get("decoupled_weight_decay") is False and saved.get("weight_decay", 0) != 0
    if isinstance(base, torch.optim.AdamW) and coupled:
        raise CheckpointMismatch(
            "the checkpoint is Adam's, whose decay is in the gradient, and AdamW would decouple it",
            "Construct the optimizer with Adam",
        )


def check_first_state(
    base: Optimizer,
    saved_options: Mapping[str, Any],
    group: Mapping[str, Any],
    states: Mapping[Tensor, Mapping[str, Any]],
    residue: Collection[str],
) -> None:
    """Refuse a checkpoint that lacks what the base's first step makes, under the options that were saved.

    `states` are the saved entries by parameter; one of them is looked at, a small one. `residue` may be there or not.
    """
    param = min((p for p in states if p.numel()), key=lambda p: p.numel(), default=None)
    if param is None:
        return
    with unnoticed():
        first = first_state(base, {**group, **saved_options, "params": group["params"]}, param, param.dtype)
    saved = {*residue, *_names(states[param])}
    missing = [key for key in ({} if first is None else first.entries) if key not in saved]
    if missing:
        raise CheckpointMismatch(
            f"the checkpoint is not of {type(base).__name__}: a parameter's state has "
            f"{sorted(map(str, states[param]))}, and not {', '.join(map(repr, missing))}"
        )


def _names(entries: Mapping[str, Any]) -> list[str]:
    """Of the entries, and of those that a base packs into one when it saves (bitsandbytes: what is quantised)."""
    packed = (name for value in entries.values() if isinstance(value, Mapping) for name in value)
    return [*entries, *packed]
