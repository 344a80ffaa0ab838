"""Makes a base optimizer over groups, from a name, a class or a factory."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any, cast

from torch.optim import Optimizer

from selective.base.by_name import optimizer_class

BaseOptimizer = str | type[Optimizer] | Callable[..., Optimizer]
"""A class by its name ("adamw", "module:Class"), a class, or a function that makes an optimizer of parameter groups."""


def maker(base: Any) -> Callable[..., Optimizer]:
    """The class or the factory that `base` means. Raises TypeError if it is neither, ValueError for an unknown name."""
    if isinstance(base, str):
        try:
            return optimizer_class(base)
        except ValueError as error:
            raise ValueError(f"for_model: {error}") from error
    if isinstance(base, Optimizer):
        raise TypeError(
            f"for_model: base is a {type(base).__name__} that exists already; pass its name or its class, and the "
            f"options to for_model. To wrap an optimizer that you have built, call SelectiveUpdate(optimizer, ...)"
        )
    if not callable(base) or (isinstance(base, type) and not issubclass(base, Optimizer)):
        raise TypeError(
            f"for_model: base is {base!r}; write a name ('adamw'), an optimizer class, or a function that takes "
            f"parameter groups and returns an optimizer"
        )
    return cast("Callable[..., Optimizer]", base)


def options_of(make: Callable[..., Optimizer]) -> list[str]:
    """The names of the options that a class or a factory takes; without the parameters, which come first.

    Those that a `functools.partial` has set already are not among them.
    """
    try:
        parameters = list(inspect.signature(make).parameters.values())
    except ValueError:  # of some built-in callables
        return []
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    already = make.keywords if isinstance(make, partial) else {}
    names = [p.name for p in parameters if p.kind in by_name and p.name not in already]
    return names[1:] if parameters and parameters[0].kind != inspect.Parameter.KEYWORD_ONLY else names


def check_options(makers: Sequence[Callable[..., Optimizer]], options: Collection[str], ours: Collection[str]) -> None:
    """Raise TypeError for an option that no optimizer takes, with names that are alike."""
    known = {name: None for make in makers for name in options_of(make)}
    for name in options:
        if name not in known:
            near = get_close_matches(name, [*known, *ours], n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            take = "takes" if len(makers) == 1 else "take"
            raise TypeError(
                f"for_model: nobody takes {name!r}{hint}. {' and '.join(map(_called, makers))} {take} "
                f"{', '.join(known) or 'no options'}; SelectiveUpdate takes {', '.join(ours)}. What a base hides "
                f"behind **kwargs goes through functools.partial(Class, {name}=...)"
            )


def make_base(make: Callable[..., Optimizer], groups: list[dict[str, Any]], options: Mapping[str, Any]) -> Optimizer:
    """Make the optimizer over these groups, which have pairs of name and parameter, and give it the names.

    An option goes in if the class or the factory takes it. The names are set afterwards, as torch does it, because
    only torch's own constructors are sure to take pairs.

    Raises:
        TypeError, ValueError: the constructor refuses the parameters or the options. TypeError also if a factory
            returns no optimizer.
    """
    taken = options_of(make)
    plain = [{**group, "params": [p for _, p in group["params"]]} for group in groups]
    for key in ("lr", "weight_decay"):
        if isinstance(make, type) and key not in taken:
            given = next((group[key] for group in plain if group.get(key)), None)
            if given is not None:
                raise ValueError(f"for_model: {_called(make)} has no {key}, and got {given!r}; leave it out")
            plain = [{name: value for name, value in group.items() if name != key} for group in plain]
    chosen = {name: value for name, value in options.items() if name in taken}
    if "lr" in taken and "lr" in plain[0]:
        chosen["lr"] = plain[0]["lr"]  # some classes and functions have no default
    try:
        optimizer = make(plain, **chosen)
    except (TypeError, ValueError) as error:
        way = f"; for matrices only: matrices={_called(make)!r}, rest='adamw'" if _takes_2d(make, plain, chosen) else ""
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"for_model: {_called(make)} refuses: {error}{way}") from error
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"for_model: {_called(make)} returned {optimizer!r}, which is no torch.optim.Optimizer")
    _set_names(optimizer, groups)
    return optimizer


def _takes_2d(make: Callable[..., Optimizer], groups: list[dict[str, Any]], options: Mapping[str, Any]) -> bool:
    """True if an optimizer that refused all parameters takes those with two dimensions alone, as Muon does."""
    flat = [{**group, "params": [p for p in group["params"] if p.dim() == 2]} for group in groups]
    flat = [group for group in flat if group["params"]]
    try:
        return bool(flat) and isinstance(make(flat, **options), Optimizer)
    except Exception:  # whatever another package raises
        return False


def _set_names(optimizer: Optimizer, groups: list[dict[str, Any]]) -> None:
    """Give the groups their parameters' names, where the constructor has left the groups as they were."""
    if len(optimizer.param_groups) != len(groups):
        return
    for built, group in zip(optimizer.param_groups, groups, strict=True):
        if [id(p) for p in built["params"]] == [id(p) for _, p in group["params"]]:
            built["param_names"] = [name for name, _ in group["params"]]


def _called(make: Callable[..., Optimizer]) -> str:
    return getattr(make, "__name__", None) or repr(make)
