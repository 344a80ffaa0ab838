"""The check that a checkpoint was made with a base of the same class.

Two things are compared. First the names of the class and of its parents, which are saved with the policy (Note [our
state entries]). They distinguish Adam's checkpoint from RAdam's, whose entries have the same names. Second the entries
that the base makes of a parameter in its first step, which have to be in the checkpoint. They distinguish classes of
one name with different states, and there is nothing else to compare if the checkpoint has no entries of ours.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.base.clone import unnoticed
from selective.base.first_state import first_state
from selective.base.mismatch import CheckpointMismatch


def class_names(base: Optimizer) -> str:
    """Return the names of the base's class and its parents below `Optimizer`: "torch.AdamW torch.Adam".

    Each has the name of its top-level package alone, because modules move from version to version and a user's class
    from file to file.
    """
    chain = type(base).__mro__
    classes = chain[: chain.index(Optimizer)]
    return " ".join(f"{cls.__module__.partition('.')[0]}.{cls.__name__}" for cls in classes)


def check_class(saved: str, base: Optimizer) -> bool:
    """Refuse the saved `class_names` of an unrelated class, and return True if they are of the base's very class.

    A class that inherits from the other, or has its name in another package, is not refused and returns False. Such
    base optimizers are compared by `check_first_state`.

    Raises:
        ValueError: the saved class is an unrelated one.
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
    """Refuse saved options that this class ignores: torch's AdamW decouples its decay whatever was saved."""
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
    """Refuse a checkpoint that lacks an entry which the base makes in its first step with the saved options.

    `states` are the saved entries by parameter; those of the smallest parameter are compared. The entries named in
    `residue` may be missing.

    Raises:
        ValueError: an entry is missing.
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
    """Return the names of the entries, and of those inside of an entry (bitsandbytes packs quantised ones to save)."""
    packed = (name for value in entries.values() if isinstance(value, Mapping) for name in value)
    return [*entries, *packed]
