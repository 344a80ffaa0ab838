"""Optimizers made by functions of the user's: how they are called, and which learning rates they take."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from selective import SelectiveUpdate
from selective.compare.config import ConfigError
from selective.for_model.recipes import recipe_named

Maker = Callable[..., torch.optim.Optimizer]
"""A function or class that makes an optimizer: `maker(params, lr)` or `maker(model, lr)`.

The model is passed if the first parameter is called `model`, `module` or `network`, or is annotated as an `nn.Module`;
otherwise parameter groups are, with weight decay on matrices only. Further parameters are passed if they are there:
`seed`, that of the run, and `rest_lr`, the second learning rate. If none is swept, that is `lr`, or its own default.
"""

RECIPE = "recipe:"  # in front of the name of a recipe, as a contender
_MODEL = ("model", "module", "network", "net")


def takes_model(maker: Maker) -> bool:
    """True if the maker's first parameter is the model, and not its parameters."""
    parameters = list(_signature(maker).parameters.values())
    if not parameters:
        raise ConfigError(f"{name_of_maker(maker)} takes no arguments; (params, lr) or (model, lr) is needed")
    first = parameters[0]
    annotated = first.annotation
    is_module = isinstance(annotated, type) and issubclass(annotated, nn.Module)
    written = annotated.rpartition(".")[2] if isinstance(annotated, str) else ""
    return first.name in _MODEL or is_module or written == "Module"


def takes_rest_lr(maker: Maker) -> bool:
    """True if the second learning rate reaches the maker: by name, or in the groups that it is given."""
    return "rest_lr" in _signature(maker).parameters or not takes_model(maker)


def call_maker(
    name: str,
    maker: Maker,
    model: nn.Module,
    groups: list[dict[str, Any]],
    lr: float,
    rest_lr: float | None,
    seed: int,
) -> torch.optim.Optimizer:
    """Call the maker with what it takes. Raises ConfigError, with its `name`, if it fails or returns no optimizer."""
    known = _signature(maker).parameters
    subject = model if takes_model(maker) else _groups_for(maker, groups)
    options: dict[str, Any] = {"seed": seed} if "seed" in known else {}
    if "rest_lr" in known and (rest_lr is not None or known["rest_lr"].default is inspect.Parameter.empty):
        options["rest_lr"] = lr if rest_lr is None else rest_lr
    by_name = "lr" in known or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
    try:
        made = maker(subject, lr=lr, **options) if by_name else maker(subject, lr, **options)
    except ConfigError:
        raise
    except Exception as error:  # the user's own code
        raise ConfigError(
            f"optimizer {name}: it raises {type(error).__name__} for lr={lr:g}: {error}. It is called with "
            f"{'the model' if takes_model(maker) else 'parameter groups'} and a learning rate"
        ) from error
    if not isinstance(made, torch.optim.Optimizer):
        raise ConfigError(f"optimizer {name} returned a {type(made).__name__}; a torch.optim.Optimizer is needed")
    return made


def name_of_maker(maker: Maker) -> str:
    """The name of a function or class, with the options of a `functools.partial`; empty if it has none."""
    if isinstance(maker, functools.partial):
        options = ", ".join([*map(repr, maker.args), *(f"{k}={v!r}" for k, v in maker.keywords.items())])
        return f"{name_of_maker(maker.func)}({options})"
    name = getattr(maker, "__name__", "")
    return "" if name == "<lambda>" else name


def recipe_maker(name: str) -> Maker:
    """The function that makes the optimizer of a recipe. Raises ValueError if there is none of this name."""
    recipe_named(name)

    def make(model: nn.Module, lr: float, rest_lr: float | None = None) -> torch.optim.Optimizer:
        rates = lr if rest_lr is None else {"matrices": lr, "rest": rest_lr}
        return SelectiveUpdate.for_model(model, recipe=name, lr=rates)

    return make


def _groups_for(maker: Maker, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups, without `weight_decay` for a class that has none: it may refuse the key."""
    target = maker.func if isinstance(maker, functools.partial) else maker
    if isinstance(target, type) and "weight_decay" not in _signature(target).parameters:
        return [{k: v for k, v in group.items() if k != "weight_decay"} for group in groups]
    return groups


def _signature(maker: Maker) -> inspect.Signature:
    try:
        return inspect.signature(maker)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{maker!r} can't be called to make an optimizer ({error}); write a function") from error
