"""The optimizer that is looked at: made by the user's function, with the warnings that came up while it was made."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from selective import ChainedOptimizer, SelectiveUpdate
from selective.compare.config import ConfigError
from selective.compare.optimizers import name_of_maker, takes_model
from selective.compare.references import load_object
from selective.doctor.place import place_of, said, short_path

Factory = Callable[..., Any] | Optimizer | tuple[Any, ...] | str
Model = nn.Module | Callable[[], nn.Module] | str
_DEPTH = 3  # of lists and dictionaries in what a function returns


class CannotLoad(Exception):
    """Raised if there is no optimizer to look at. The message is one line: what failed, and where."""


@dataclass
class Subject:
    """An optimizer, its model if that is known, and what was warned of."""

    optimizer: Optimizer
    model: nn.Module | None
    warnings: list[tuple[str, str]] = field(default_factory=list)  # text, and the place

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters of all groups."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def names(self, *, tied: bool = False) -> dict[Tensor, str]:
        """Return a name for each parameter: the model's, the one that stands in its group, or its place.

        Of several names in the model it is the first, or all of them with `tied`: "embed.weight = head.weight".
        """
        names: dict[Tensor, str] = {}
        for number, group in enumerate(self.optimizer.param_groups):
            own = group.get("param_names", [f"param_groups[{number}][{i}]" for i in range(len(group["params"]))])
            names.update(zip(group["params"], own, strict=False))
        if self.model is not None:
            in_model = list(self.model.named_parameters(remove_duplicate=False))
            of_each: dict[Tensor, list[str]] = {}
            for name, p in in_model:
                of_each.setdefault(p, []).append(name)
            names.update((p, " = ".join(several if tied else several[:1])) for p, several in of_each.items())
        return names


def load_subject(factory: Factory, model: Model | None, lr: float, device: str | None) -> Subject:
    """Make the optimizer. Raises CannotLoad if it can't be made, or if there is not exactly one."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer, own_model = _load(factory, model, lr, device)
    found = [(str(one.message), f"{short_path(one.filename)}, line {one.lineno}") for one in caught]
    return Subject(optimizer, own_model, list(dict.fromkeys(found)))


def _load(factory: Factory, model: Model | None, lr: float, device: str | None) -> tuple[Optimizer, nn.Module | None]:
    own_model = None if model is None else _made_model(model, device)
    name = factory if isinstance(factory, str) else (name_of_maker(factory) if callable(factory) else "")
    name = name or "the factory"
    made: Any = _loaded(factory, f"factory {factory}") if isinstance(factory, str) else factory
    if callable(made) and not isinstance(made, (Optimizer, nn.Module)):
        made = _called(made, name, own_model, lr)
    contents = list(_contents(made, _DEPTH))
    optimizers = list({id(each): each for each in contents if isinstance(each, Optimizer)}.values())
    if not optimizers:
        raise CannotLoad(
            f"{name} returned a {type(made).__name__}; an optimizer is needed, or a model and an optimizer"
        )
    if len(optimizers) > 1:
        kinds = ", ".join(type(each).__name__ for each in optimizers)
        raise CannotLoad(f"{name} returned {len(optimizers)} optimizers ({kinds}); make one: ChainedOptimizer([...])")
    modules = [each for each in contents if isinstance(each, nn.Module)]
    return _inner(optimizers[0]), modules[0] if modules else own_model


def _inner(optimizer: Optimizer) -> Optimizer:
    """Return the wrapper of ours inside of somebody else's, such as accelerate's; otherwise the optimizer itself."""
    inside = vars(optimizer).get("optimizer")
    return inside if isinstance(inside, (SelectiveUpdate, ChainedOptimizer)) else optimizer


def _loaded(reference: str, what: str) -> Any:
    try:
        return load_object(reference, what)
    except ConfigError as error:
        place = "" if error.__cause__ is None else place_of(error.__cause__)
        raise CannotLoad(f"{_one_line(str(error))}{f' ({place})' if place else ''}") from error
    except SystemExit as error:
        raise CannotLoad(
            f"{what}: {reference.rpartition(':')[0]} ends the program when it is imported ({place_of(error)}); put "
            f"what runs a training under: if __name__ == '__main__'"
        ) from error


def _made_model(model: Model, device: str | None) -> nn.Module:
    """Return the model, made by the user's function if it is one, on the device."""
    name = model if isinstance(model, str) else getattr(model, "__name__", type(model).__name__)
    made: Any = _loaded(model, f"model {model}") if isinstance(model, str) else model
    if callable(made) and not isinstance(made, nn.Module):
        made = _run(f"model {name}", made)
    if not isinstance(made, nn.Module):
        raise CannotLoad(f"model {name} is a {type(made).__name__}; an nn.Module is needed")
    if device is None:
        return made
    return _run(f"moving the model to {device}", made.to, device)


def _called(factory: Callable[..., Any], name: str, model: nn.Module | None, lr: float) -> Any:
    """Return what the factory returns. It is called with what it takes: a model or parameters, and a learning rate."""
    known = _parameters_of(factory)
    required = [p.name for p in known if p.default is inspect.Parameter.empty]
    wants_subject = bool(known) and (known[0].name in required or (takes_model(factory) and model is not None))
    arguments: list[Any] = []
    if wants_subject and known[0].name != "lr":
        what = "the model" if takes_model(factory) else "parameters"
        if model is None:
            raise CannotLoad(f"{name} takes {what}; say which model with --model module:name, in Python with model=")
        arguments.append(model if takes_model(factory) else [p for p in model.parameters() if p.requires_grad])
        required = [each for each in required if each != known[0].name]
    options = {"lr": lr} if "lr" in required else {}
    unknown = [each for each in required if each != "lr"]
    if unknown:
        raise CannotLoad(
            f"{name} needs {', '.join(map(repr, unknown))}, which nobody knows here; name a function of nothing, or of "
            f"the model"
        )
    return _run(name, factory, *arguments, **options)


def _parameters_of(factory: Callable[..., Any]) -> list[inspect.Parameter]:
    """Return the factory's parameters that have a name."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    try:
        return [p for p in inspect.signature(factory).parameters.values() if p.kind not in kinds]
    except (TypeError, ValueError):  # some callables of other languages have no signature
        return []


def _run(what: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call the user's function. Raises CannotLoad with the place if it fails."""
    try:
        return function(*arguments, **options)
    except (Exception, SystemExit) as error:
        raise CannotLoad(f"{what} raises {said(error)}") from error


def _contents(value: Any, depth: int) -> Iterator[Any]:
    """Iterate over what is in tuples, lists and dictionaries, such as Lightning's `configure_optimizers` returns."""
    if isinstance(value, Mapping) and depth:
        value = list(value.values())
    if isinstance(value, (tuple, list)) and depth:
        for each in value:
            yield from _contents(each, depth - 1)
    else:
        yield value


def _one_line(text: str) -> str:
    return " ".join(text.split())


def has_values(p: Tensor) -> bool:
    """True if the parameter has a shape and memory, so that it can be stepped."""
    return not nn.parameter.is_lazy(p) and p.device != torch.device("meta")
