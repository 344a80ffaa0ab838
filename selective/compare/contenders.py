"""The contenders: a base optimizer alone and under each policy, and each policy's matched random control.

With preconditioners, all of them come again in the space of each. Optimizers that functions of the user's make
come last.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import nn

from selective import Bernoulli, Everything, Policy, Preconditioner, RandomMask, SelectiveUpdate
from selective.base.by_name import optimizer_class
from selective.compare.config import CompareConfig, ConfigError, Role
from selective.compare.optimizers import call_maker
from selective.compare.setup import Setup
from selective.compare.spaces import groups_by_kind
from selective.policies import MatchedRandomMask

# Options that a user would write for a transformer. A base that is not in this table keeps its own defaults.
OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"betas": (0.9, 0.95)} for name in ("Adam", "AdamW", "NAdam", "RAdam")},
    "SGD": {"momentum": 0.9, "nesterov": True},
}


Pair = tuple[float, float | None]
"""A learning rate and the second one, of embeddings, head and vectors, or of what a function takes for the rest."""


@dataclass(frozen=True)
class Contender:
    """One side of the comparison, without learning rate and seed. `policy` is None for the base as it is."""

    index: int
    label: str
    role: str  # "baseline", "rotation" (the base in a preconditioner's space), "policy", "control" or "optimizer"
    policy: Policy | None
    of: int | None = None  # of a control, the index of its policy; of a policy, that of its control, if it has one
    preconditioner: Preconditioner | None = None
    ground: int = 0  # index of the base in the same space
    rates: tuple[float, ...] = ()  # the learning rates of its runs
    rest_rates: tuple[float, ...] = ()  # the second learning rates, each of which is tried beside each of the first
    maker: str | None = None  # the configuration's name of the function that makes it

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """The first and second learning rate of its runs at each seed."""
        return tuple((lr, rest) for lr in self.rates for rest in self.rest_rates or (None,))

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
    rest_lr: float | None = None

    @property
    def key(self) -> str:
        rest = "" if self.rest_lr is None else f"-rest{self.rest_lr:g}"
        return f"seed{self.seed}-{self.contender.slug}-lr{self.lr:g}{rest}"


def contenders(config: CompareConfig) -> list[Contender]:
    """List the baseline, then each policy followed by its control, and the same in each preconditioner's space.

    The optimizers of the user's functions come last.
    """
    listed: list[Contender] = []
    rates = {**dict.fromkeys(("baseline", *get_args(Role)), config.lr), **config.rates}
    rest = config.rest_lr
    for space in (None, *config.preconditioners):
        ground, suffix = len(listed), "" if space is None else f" in {written(space)}"
        role = "baseline" if space is None else "rotation"
        listed.append(Contender(ground, config.base + suffix, role, None, None, space, ground, rates[role], rest))
        for policy in config.policies if space is None or config.policies_in_spaces else ():
            index, label = len(listed), written(policy) + suffix
            control = matching(policy) if config.controls else None
            of = None if control is None else index + 1
            listed.append(Contender(index, label, "policy", policy, of, space, ground, rates["policy"], rest))
            if control is not None:
                name = f"random like {label}"
                listed.append(
                    Contender(index + 1, name, "control", control, index, space, ground, rates["control"], rest)
                )
    for name in config.optimizers:
        label = _label(name, config)
        listed.append(Contender(len(listed), label, "optimizer", None, None, None, 0, rates["optimizer"], rest, name))
    return listed


def _label(name: str, config: CompareConfig) -> str:
    """The function's own name, or the whole reference if another has the same."""
    short = [name.rpartition(":")[2] for name in config.optimizers]
    own = name.rpartition(":")[2]
    label = own if short.count(own) == 1 else name
    return f"{label} (function)" if label == config.base else label


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
    return [Run(c, lr, seed, rest) for seed in config.seeds for c in field for lr, rest in c.pairs]


LONGEST_FIRST = ("optimizer", "rotation", "control", "policy", "baseline")  # what a step costs on a CPU, as a rule


def longest_first(listed: Sequence[Run]) -> list[Run]:
    """The runs, seed by seed as before, and in each seed those that are likely to take long before the others.

    Workers that take them in this order end at nearly the same time: the last run of all is a short one.
    """
    seeds = list(dict.fromkeys(run.seed for run in listed))
    return sorted(
        listed,
        key=lambda run: (
            seeds.index(run.seed),
            run.contender.maker is None and run.contender.preconditioner is None,
            LONGEST_FIRST.index(run.contender.role),
        ),
    )


def base_class(name: str) -> type[torch.optim.Optimizer]:
    """The optimizer class that `name` means, as in `selective.base.by_name`. Raises ConfigError."""
    try:
        return optimizer_class(name)
    except ValueError as error:
        raise ConfigError(f"base: {error}") from error


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: matrices with weight decay, vectors without. Frozen parameters are left out."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim >= 2]
    vectors = [p for p in trained if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """The model's name of each parameter, by the optimizer's name, which is made of group and place.

    Groups of (name, parameter) pairs would carry the names, but only torch's own constructors are sure to take them.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"param_groups[{number}][{place}]": names[parameter]
        for number, group in enumerate(optimizer.param_groups)
        for place, parameter in enumerate(group["params"])
        if parameter in names
    }


def groups_of(setup: Setup, model: nn.Module, rotated: bool, lr: float, rest_lr: float | None) -> list[dict[str, Any]]:
    """The parameter groups that every contender gets, with a rate of their own where the second one applies."""
    config = setup.config
    if not config.preconditioners and rest_lr is None:
        return parameter_groups(model, config.loop.weight_decay)
    parts: Any = getattr(setup.task, "parts", "auto")
    rates = None if rest_lr is None else (lr, rest_lr)
    return groups_by_kind(model, config.loop.weight_decay, rotated, parts, rates)


def make_base(
    setup: Setup, model: nn.Module, lr: float, rotated: bool = False, rest_lr: float | None = None, seed: int = 0
) -> torch.optim.Optimizer:
    """Build the base over the model's parameters. If `rotated`, its groups say which a preconditioner leaves alone.

    Raises ConfigError if the base's constructor refuses them.
    """
    config = setup.config
    groups = groups_of(setup, model, rotated, lr, rest_lr)
    for name, instead in (("lr", "lr (--lr)"), ("weight_decay", "loop.weight_decay (--set loop.weight_decay=...)")):
        if name in config.base_options:
            raise ConfigError(
                f"base_options: found {name!r}, which is set for every contender and group by {instead}; give it there"
            )
    if setup.base is not None:
        maker = functools.partial(setup.base, **config.base_options)
        return call_maker(config.base, maker, model, groups, lr, rest_lr, seed)
    cls = base_class(config.base)
    options = {**OPTIONS.get(cls.__name__, {}), **config.base_options}
    known = inspect.signature(cls).parameters
    if "weight_decay" not in known:
        groups = [{k: v for k, v in group.items() if k != "weight_decay"} for group in groups]
    try:
        return cls(groups, lr=lr, **options)  # pyright: ignore[reportCallIssue]
    except (TypeError, ValueError) as error:
        given = ", ".join([f"lr={lr:g}", *(f"{k}={v!r}" for k, v in options.items())])
        raise ConfigError(
            f"base {config.base}({given}) refuses: {error}; change base_options (it takes {', '.join(list(known)[1:])})"
        ) from error


def make(setup: Setup, run: Run, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer of a run: the base itself for the baseline, a wrapped base or what a function makes."""
    contender = run.contender
    policy, space = contender.policy, contender.preconditioner
    if contender.maker is not None:
        groups = groups_of(setup, model, False, run.lr, run.rest_lr)
        maker = setup.makers[contender.maker]
        made = call_maker(contender.maker, maker, model, groups, run.lr, run.rest_lr, run.seed)
        _check_owns(contender.maker, made, model)
        return made
    base = make_base(setup, model, run.lr, space is not None, run.rest_lr, run.seed)
    return base if policy is None and space is None else wrap(setup.config, base, policy, run.seed, space)


def _check_owns(name: str, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Raise ConfigError if the optimizer has no parameter of the run's model, which would stay as it is."""
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    if not any(id(p) in trained for group in optimizer.param_groups for p in group["params"]):
        raise ConfigError(
            f"optimizer {name}: none of its parameters is the model's that it was called with; each run has a model of "
            "its own: make the optimizer of the function's argument"
        )


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
    return {names.get(name, name): float(entry["share"]) for name, entry in statistics.items()}
