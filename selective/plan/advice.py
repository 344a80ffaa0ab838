"""Warnings about parameter groups that can be stepped, but hardly do what was meant."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

import torch
from torch.optim import Optimizer

from selective.base.hyperparameters import plain_number
from selective.messages.user_line import warn
from selective.plan.group_plan import GroupPlan
from selective.plan.options import Options
from selective.plan.oversized import warn_of_oversized
from selective.plan.policy_groups import KEYS, PolicyGroup
from selective.policies import Policy
from selective.policies.kernel_terms import Specs

_FOR_ALL_GROUPS = {option.name for option in fields(Options)} - {"rounding"} | {"seed", "stochastic_rounding"}
_NEAR = 0.8  # difflib's ratio: "polcy" is near "policy" (0.91); "no_decay" (0.77) and "lr_decay" are not near "decay"
_NEAR_FIELD = 0.85  # "alpa" is near "alpha" (0.89), "stage" (0.83) not near "stagger", as which people number layers
_NEAR_OPTION = 0.9  # "weight_decy" is near "weight_decay" (0.96); "max_momentum" (0.8) is not near "momentum"
_CAUTIOUS_KEYS = ("caution", "cautious")  # timm's and HeavyBall's name, pytorch_optimizer's


def warn_of_rotations(plans: Sequence[GroupPlan]) -> None:
    """Warn of sides that are out of proportion, and of sharded matrices that are left as they are.

    Several matrices in one are not rotated where they are a DTensor: a part of it is not some rows of one of them.
    """
    warn_of_oversized(plans)
    for plan in plans:
        joined = [] if plan.rotation is None else plan.rotation.joined_shards
        if joined:
            more = f" and {len(joined) - 1:,} more" if len(joined) > 1 else ""
            warn(
                f"SelectiveUpdate: {joined[0]!r}{more} of param_groups[{plan.number}] are not rotated: matrix_view="
                f"{plan.preconditioning.matrix_view!r} makes several matrices of a DTensor, of which only one can be "
                f"rotated. Put them into a group with matrix_view='matrices', or with preconditioner None"
            )


def warn_of_stray_keys(
    group: Mapping[str, Any], number: int, policy_group: PolicyGroup, known: Collection[str], warned: set[str]
) -> None:
    """Warn of keys of a base's group that were probably meant for us, or misspelt for the base, each of them once.

    `known` are the base's own options, which are no mistake whatever their names. `warned` are the keys that were
    warned of before; new ones are added.
    """
    for key in [key for key in group if key not in known and key not in warned and key != "params"]:
        way = _way(str(key), number, policy_group, known)
        if way is not None:
            warned.add(key)
            warn(f"SelectiveUpdate: {key!r} in param_groups[{number}] has no effect; {way}")


def _way(key: str, number: int, policy_group: PolicyGroup, known: Collection[str]) -> str | None:
    """The place where a group's key belongs; None for a key that is probably the user's own."""
    fields_ = list(_hyper_parameters(number, policy_group))
    for name, where in fields_:
        if key in (name, name.rpartition(".")[2]):
            return f"set {where}[{name!r}]"
    if key in _FOR_ALL_GROUPS:
        return f"pass {key} to SelectiveUpdate: it holds for all groups"
    near = get_close_matches(key, [name for name in KEYS if name != key], n=1, cutoff=_NEAR)
    if not near:
        near = get_close_matches(key, [name for name in known if isinstance(name, str)], n=1, cutoff=_NEAR_OPTION)
    if near:
        return f"did you mean {near[0]!r}?"
    misspelt = ((name, where) for name, where in fields_ if _is_misspelt(key, name.rpartition(".")[2]))
    return next((f"did you mean {name!r}? Set {where}[{name!r}]" for name, where in misspelt), None)


def _is_misspelt(key: str, name: str) -> bool:
    if len(name) < 4:
        return False
    return sorted(key) == sorted(name) or bool(get_close_matches(key, [name], n=1, cutoff=_NEAR_FIELD))


def _hyper_parameters(number: int, policy_group: PolicyGroup) -> Iterator[tuple[str, str]]:
    yield from ((name, f"opt.policy_groups[{number}]") for name in policy_group)
    yield from ((name, f"opt.preconditioner_groups[{number}]") for name in policy_group.preconditioning)
    yield from ((name, f"opt.decay_groups[{number}]") for name in policy_group.decaying)
    yield from ((name, f"opt.norm_groups[{number}]") for name in policy_group.norming)


def warn_of_needless_mask(
    base: Optimizer, group: Mapping[str, Any], number: int, policy: Policy, specs: Specs | None
) -> None:
    """Warn if a policy selects by agreement what the base has selected already, or all that there is."""
    if specs is None or specs[0].kind != "agreement" or specs[0].control is not None:
        return
    name, where = type(base).__name__, f"(param_groups[{number}])"
    cautious = next((key for key in _CAUTIOUS_KEYS if group.get(key)), None)
    if cautious is not None:
        warn(
            f"SelectiveUpdate: {policy!r} masks what {name} has masked already, because its {cautious} is "
            f"{group[cautious]!r} {where}; what is left is scaled up twice. Build {name} with {cautious}=False",
        )
    elif specs[0].product == "update" and _steps_along_the_gradient(base, group):
        remedy = f"Give {name} a momentum" if {"momentum", "betas"} & set(group) else "Take a base with momentum"
        warn(
            f"SelectiveUpdate: {policy!r} selects every coordinate of {name} without momentum {where}, whose update "
            f"has the gradient's sign everywhere. {remedy}, or a policy that ranks, such as MGUP()",
        )


def _steps_along_the_gradient(base: Optimizer, group: Mapping[str, Any]) -> bool:
    """True if the update is the gradient times positive numbers, in one of torch's own base optimizers."""
    kind = type(base)
    if kind in (torch.optim.SGD, torch.optim.RMSprop):
        return bool(plain_number(group["momentum"]) == 0)
    if kind in (torch.optim.Adam, torch.optim.AdamW, torch.optim.RAdam, torch.optim.Adamax):
        return bool(plain_number(group["betas"][0]) == 0)
    return kind in (torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.Adafactor)


def warn_of_no_decay(base: Optimizer, plans: Sequence[GroupPlan]) -> None:
    """Warn if a selective decay takes over a λ of the base that is 0 in all of its groups."""
    taking_over = [plan for plan in plans if plan.decay is not None and plan.decay.weight_decay is None]
    factors = [plan.group.get("weight_decay", 0.0) for plan in taking_over]
    if factors and not any(isinstance(factor, torch.Tensor) or factor != 0 for factor in factors):
        decay, name = taking_over[0].decay, type(base).__name__
        warn(
            f"SelectiveUpdate: {decay!r} decays nothing, because it takes over the weight_decay of {name}, which is 0 "
            f"in all of its parameter groups. Give {name} a weight_decay, or leave the decay out",
        )
