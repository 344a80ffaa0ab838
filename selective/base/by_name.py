"""optimizer_class: finds the class of a base optimizer by its name, in torch and in packages that are installed."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from difflib import get_close_matches
from importlib.util import find_spec

from torch.optim import Optimizer

from selective.configured import plain_name

# Looked through in this order, so that torch's own class is taken where several packages have one of this name.
PLACES = ("torch.optim", "pytorch_optimizer", "timm.optim", "optimi", "heavyball", "schedulefree", "lion_pytorch")
# Packages that take seconds to import and have few classes of their own: imported only if one of these is asked for.
SLOW_PLACES: dict[str, tuple[str, ...]] = {
    "torchao.optim": ("Adam8bit", "Adam4bit", "AdamFp8", "AdamW8bit", "AdamW4bit", "AdamWFp8"),
    "bitsandbytes.optim": (
        "AdEMAMix8bit", "LAMB8bit", "LARS8bit", "Lion8bit", "RMSprop8bit", "SGD8bit", "Adagrad8bit",
        "PagedAdEMAMix", "PagedAdEMAMix8bit", "PagedAdam", "PagedAdam8bit", "PagedAdamW", "PagedAdamW8bit",
        "PagedLion", "PagedLion8bit",
    ),
}  # fmt: skip


def optimizer_class(name: str) -> type[Optimizer]:
    """The optimizer class that `name` means.

    Args:
        name: a class of torch.optim or of an installed package ("adamw", "Lion"), in any case; torch's class is taken
            where several have one of this name. Or `module:Class`, where the module is imported first.

    Raises:
        ValueError: there is none. The message says where it was looked for, and suggests a name that is alike.
    """
    module, colon, attribute = name.rpartition(":")
    if colon:
        return _class_in(module, attribute, name)
    looked: list[str] = []
    known: dict[str, str] = {}  # plain name: name as it is written
    for place in _places(name):
        classes, problem = _classes(place)
        alike = {each for key, each in classes.items() if key == name}
        alike = alike or {each for key, each in classes.items() if plain_name(key) == plain_name(name)}
        if len(alike) == 1:
            return alike.pop()
        if alike:
            raise ValueError(f"{name!r} can be {', '.join(sorted(each.__name__ for each in alike))} of {place}")
        known = {**{plain_name(key): key for key in classes}, **known}
        looked.append(f"{place} ({problem or 'not there'})")
    known = {**{plain_name(key): key for names in SLOW_PLACES.values() for key in names}, **known}
    near = get_close_matches(plain_name(name), known, n=1)
    meant = f" (did you mean {known[near[0]]!r}?)" if near else ""
    if "." in name:
        meant = f" (did you mean {':'.join(name.rsplit('.', 1))!r}?)"
    raise ValueError(_unknown(name, meant, looked))


def _unknown(name: str, meant: str, looked: list[str]) -> str:
    return (
        f"no optimizer {name!r}{meant}; looked in {', '.join(looked)}. Name a class of torch.optim, or write the "
        "import path as module:Class. A module in the current folder is found with PYTHONPATH=."
    )


def _places(name: str) -> Iterator[str]:
    """Yield the modules to look through: those that are installed, and the slow ones only if they have this name."""
    for place in PLACES:
        if place in ("torch.optim", "pytorch_optimizer") or find_spec(place.partition(".")[0]) is not None:
            yield place
    for place, names in SLOW_PLACES.items():
        if plain_name(name) in {plain_name(each) for each in names}:
            yield place


def _classes(place: str) -> tuple[dict[str, type[Optimizer]], str | None]:
    """The optimizer classes of a module by name, and why it has none if it can't be imported."""
    try:
        names = vars(importlib.import_module(place))
    except ModuleNotFoundError as error:
        return {}, f"cannot be imported: {error}"
    except Exception as error:  # broad: another package's import may raise anything, and the message says what it was
        return {}, f"its import fails: {type(error).__name__}: {error}"
    return {name: each for name, each in names.items() if _is_optimizer(each)}, None


def _is_optimizer(candidate: object) -> bool:
    return isinstance(candidate, type) and issubclass(candidate, Optimizer) and candidate is not Optimizer


def _class_in(module: str, attribute: str, name: str) -> type[Optimizer]:
    """The class of `module:Class`: with exactly this name, or else in another case."""
    classes, problem = _classes(module)
    if problem is not None:
        raise ValueError(_unknown(name, "", [f"{module} ({problem})"]))
    alike = [each for key, each in classes.items() if plain_name(key) == plain_name(attribute)]
    if attribute in classes or len(alike) == 1:
        return classes.get(attribute) or alike[0]
    near = get_close_matches(attribute, classes, n=1)
    meant = f" (did you mean {module + ':' + near[0]!r}?)" if near else ""
    there = hasattr(importlib.import_module(module), attribute)
    raise ValueError(_unknown(name, meant, [f"{module} ({'not an optimizer class' if there else 'not there'})"]))
