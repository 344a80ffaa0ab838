"""The contenders: a base optimizer alone and under each policy, and each policy's matched random control.

With preconditioners, all of them come once more in the space of each.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from selective import Bernoulli, Everything, Policy, Preconditioner, RandomMask, SelectiveUpdate
from selective.base.by_name import optimizer_class
from selective.compare.config import CompareConfig, ConfigError
from selective.compare.spaces import groups_by_kind
from selective.policies import MatchedRandomMask

# Options that a user would write for a transformer. A base that is not in this table keeps its own defaults.
OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"betas": (0.9, 0.95)} for name in ("Adam", "AdamW", "NAdam", "RAdam")},
    "SGD": {"momentum": 0.9, "nesterov": True},
}


@dataclass(frozen=True)
class Contender:
    """One side of the comparison, without learning rate and seed. `policy` is None for the base as it is."""

    index: int
    label: str
    role: str  # "baseline", "rotation" (the base in a preconditioner's space), "policy" or "control"
    policy: Policy | None
    of: int | None = None  # of a control, the index of its policy; of a policy, that of its control, if it has one
    preconditioner: Preconditioner | None = None
    ground: int = 0  # index of the base in the same space
    rates: tuple[float, ...] = ()  # the learning rates of its runs

    @property
    def slug(self) -> str:
        """A name for files, from the policy's kind only, so that it does not depend on how the policy was written."""
        return f"{self.index:02d}-{re.sub('[^A-Za-z0-9]+', '-', self.label.partition('(')[0]).strip('-')}"


@dataclass(frozen=True)
class Run:
    """One training run: a contender at a learning rate and a seed."""

    contender: Contender
    lr: float
    seed: int

    @property
    def key(self) -> str:
        return f"seed{self.seed}-{self.contender.slug}-lr{self.lr:g}"


def contenders(config: CompareConfig) -> list[Contender]:
    """List the baseline, then each policy followed by its control, and the same in each preconditioner's space."""
    listed: list[Contender] = []
    rates = {"baseline": config.lr, "policy": config.lr, "control": config.lr, "rotation": config.lr, **config.rates}
    for space in (None, *config.preconditioners):
        ground, suffix = len(listed), "" if space is None else f" in {written(space)}"
        role = "baseline" if space is None else "rotation"
        listed.append(Contender(ground, config.base + suffix, role, None, None, space, ground, rates[role]))
        for policy in config.policies if space is None or config.policies_in_spaces else ():
            index, label = len(listed), written(policy) + suffix
            control = matching(policy) if config.controls else None
            of = None if control is None else index + 1
            listed.append(Contender(index, label, "policy", policy, of, space, ground, rates["policy"]))
            if control is not None:
                name = f"random like {label}"
                listed.append(Contender(index + 1, name, "control", control, index, space, ground, rates["control"]))
    return listed


def written(policy: Policy | Preconditioner) -> str:
    """The kind and the fields that differ from their defaults: `MGUP(tau=0.3)`. Unlike repr the same after JSON."""
    fields = type(policy).model_fields
    values = {name: getattr(policy, name) for name in fields}
    changed = [f"{name}={value!r}" for name, value in values.items() if value != fields[name].default]
    return f"{policy.__repr_name__()}({', '.join(changed)})"


def matching(policy: Policy) -> Policy | None:
    """The control of a policy; None if the policy selects everything or at random already."""
    parts = policy.parts()
    if isinstance(policy, MatchedRandomMask) or (parts is not None and isinstance(parts[0], Everything | Bernoulli)):
        return None
    try:
        return RandomMask.matching(policy)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{policy!r} has no matched control ({error}); compare it without: --no-controls") from error


def runs(config: CompareConfig) -> list[Run]:
    """List all runs, seed by seed: an interrupted comparison has every contender for the seeds that it finished."""
    field = contenders(config)
    return [Run(contender, lr, seed) for seed in config.seeds for contender in field for lr in contender.rates]


def base_class(name: str) -> type[torch.optim.Optimizer]:
    """The optimizer class that `name` means, as in `selective.base.by_name`. Raises ConfigError."""
    try:
        return optimizer_class(name)
    except ValueError as error:
        raise ConfigError(f"base: {error}") from error


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: matrices with weight decay, vectors without."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """The model's name of each parameter, by the optimizer's name, which is made of group and place.

    Groups of (name, parameter) pairs would carry the names, but only torch's own constructors are sure to take them.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"param_groups[{number}][{place}]": names[parameter]
        for number, group in enumerate(optimizer.param_groups)
        for place, parameter in enumerate(group["params"])
    }


def make_base(config: CompareConfig, model: nn.Module, lr: float, rotated: bool = False) -> torch.optim.Optimizer:
    """Build the base over the model's parameters. If `rotated`, its groups say which a preconditioner leaves alone.

    Raises ConfigError if the base's constructor refuses them.
    """
    cls = base_class(config.base)
    options = {**OPTIONS.get(cls.__name__, {}), **config.base_options}
    known = inspect.signature(cls).parameters
    for name, instead in (("lr", "lr (--lr)"), ("weight_decay", "loop.weight_decay (--set loop.weight_decay=...)")):
        if name in config.base_options:
            raise ConfigError(
                f"base_options: found {name!r}, which is set for every contender and group by {instead}; give it there"
            )
    groups = parameter_groups(model, config.loop.weight_decay)
    if config.preconditioners:
        groups = groups_by_kind(model, config.loop.weight_decay, rotated)
    if "weight_decay" not in known:
        groups = [{k: v for k, v in group.items() if k != "weight_decay"} for group in groups]
    try:
        return cls(groups, lr=lr, **options)  # pyright: ignore[reportCallIssue]
    except (TypeError, ValueError) as error:
        given = ", ".join([f"lr={lr:g}", *(f"{k}={v!r}" for k, v in options.items())])
        raise ConfigError(
            f"base {config.base}({given}) refuses: {error}; change base_options (it takes {', '.join(list(known)[1:])})"
        ) from error


def make(config: CompareConfig, run: Run, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer of a run: the base itself for the baseline, a wrapped base for the others."""
    policy, space = run.contender.policy, run.contender.preconditioner
    base = make_base(config, model, run.lr, space is not None)
    return base if policy is None and space is None else wrap(config, base, policy, run.seed, space)


def wrap(
    config: CompareConfig, base: torch.optim.Optimizer, policy: Policy | None, seed: int,
    space: Preconditioner | None = None,
) -> SelectiveUpdate:  # fmt: skip
    """Wrap the base under a policy, in the space of a preconditioner. Random policies draw from `seed`.

    Raises ConfigError if the wrapper refuses them.
    """
    try:
        return SelectiveUpdate(base, policy=policy, preconditioner=space, seed=seed, momentum_beta=config.momentum_beta)
    except (TypeError, ValueError) as error:
        tried = " in ".join(written(x) for x in (policy, space) if x is not None)
        raise ConfigError(f"{tried} on {config.base}: {error}") from error


def shares(optimizer: torch.optim.Optimizer, names: Mapping[str, str]) -> dict[str, float]:
    """The share selected, by parameter name. Waits for the device.

    Empty for a plain base, for `Dense()`, and in a step in which a preconditioner does not move its parameters.
    """
    if not isinstance(optimizer, SelectiveUpdate):
        return {}
    statistics = optimizer.statistics()
    if any("share" not in entry for entry in statistics.values()):
        return {}
    return {names[name]: float(entry["share"]) for name, entry in statistics.items()}
