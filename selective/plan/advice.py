"""Warnings about parameter groups that can be stepped, but hardly do what was meant."""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterator, Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

import torch
from torch.optim import Optimizer

from selective.base.hyperparameters import plain_number
from selective.plan.options import Options
from selective.plan.policy_groups import KEYS, PolicyGroup
from selective.policies import Policy
from selective.policies.kernel_terms import Specs

_FOR_ALL_GROUPS = {option.name for option in fields(Options)} - {"rounding"} | {"seed", "stochastic_rounding"}
_NEAR = 0.8  # difflib's ratio: "polcy" is near "policy" (0.91); "no_decay" (0.77) and "lr_decay" are not near "decay"
_CAUTIOUS_KEYS = ("caution", "cautious")  # timm's and HeavyBall's name, pytorch_optimizer's


def warn_of_stray_keys(
    group: Mapping[str, Any], number: int, policy_group: PolicyGroup, known: Container[str], warned: set[str]
) -> None:
    """Warn of keys of a base's group that were probably meant for us, each of them once.

    `known` are the base's own options, which are no mistake whatever their names. `warned` are the keys that were
    warned of before; new ones are added.
    """
    for key in [key for key in group if key not in known and key not in warned and key != "params"]:
        way = _way(str(key), number, policy_group)
        if way is not None:
            warned.add(key)
            warnings.warn(f"SelectiveUpdate: {key!r} in param_groups[{number}] has no effect; {way}", stacklevel=2)


def _way(key: str, number: int, policy_group: PolicyGroup) -> str | None:
    """The place where a group's key belongs; None for a key that is none of ours."""
    for name, where in _hyper_parameters(number, policy_group):
        if key in (name, name.rpartition(".")[2]):
            return f"set {where}[{name!r}]"
    if key in _FOR_ALL_GROUPS:
        return f"pass {key} to SelectiveUpdate: it holds for all groups"
    near = get_close_matches(key, [name for name in KEYS if name != key], n=1, cutoff=_NEAR)
    return f"did you mean {near[0]!r}?" if near else None


def _hyper_parameters(number: int, policy_group: PolicyGroup) -> Iterator[tuple[str, str]]:
    yield from ((name, f"opt.policy_groups[{number}]") for name in policy_group)
    yield from ((name, f"opt.preconditioner_groups[{number}]") for name in policy_group.preconditioning)
    yield from ((name, f"opt.decay_groups[{number}]") for name in policy_group.decaying)


def warn_of_needless_mask(
    base: Optimizer, group: Mapping[str, Any], number: int, policy: Policy, specs: Specs | None
) -> None:
    """Warn if a policy selects by agreement what the base has selected already, or all that there is."""
    if specs is None or specs[0].kind != "agreement" or specs[0].control is not None:
        return
    name, where = type(base).__name__, f"(param_groups[{number}])"
    cautious = next((key for key in _CAUTIOUS_KEYS if group.get(key)), None)
    if cautious is not None:
        warnings.warn(
            f"SelectiveUpdate: {policy!r} masks what {name} has masked already, because its {cautious} is "
            f"{group[cautious]!r} {where}; what is left is scaled up twice. Build {name} with {cautious}=False",
            stacklevel=2,
        )
    elif specs[0].product == "update" and _steps_along_the_gradient(base, group):
        warnings.warn(
            f"SelectiveUpdate: {policy!r} selects every coordinate of {name} without momentum {where}, whose update "
            f"has the gradient's sign everywhere. Give {name} a momentum, or take a policy that ranks, such as MGUP()",
            stacklevel=2,
        )


def _steps_along_the_gradient(base: Optimizer, group: Mapping[str, Any]) -> bool:
    """True if the update is the gradient times positive numbers, in one of torch's own base optimizers."""
    kind = type(base)
    if kind in (torch.optim.SGD, torch.optim.RMSprop):
        return bool(plain_number(group["momentum"]) == 0)
    if kind in (torch.optim.Adam, torch.optim.AdamW):
        return bool(plain_number(group["betas"][0]) == 0)
    return kind in (torch.optim.Adagrad, torch.optim.Adadelta)
