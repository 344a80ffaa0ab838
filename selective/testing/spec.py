"""Callables named in text, `module:name` or `module:name(key=value)`, and the subject that a pair of them makes."""

from __future__ import annotations

import ast
import importlib
import os
import sys
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch.optim import Optimizer

from selective.testing.harness import train
from selective.testing.model import ConformanceModel
from selective.testing.report import in_short, place
from selective.testing.subject import Subject, itself

EXAMPLE = 'module:name, or with keyword arguments "module:name(key=value)", such as mypackage:MyWrapper'
_REQUIRED = ("step", "zero_grad", "state_dict", "load_state_dict", "param_groups")


class SpecError(Exception):
    """Raised if the named callable can't be used. The message is one sentence for the person who named it."""


@dataclass(frozen=True)
class Spec:
    """A callable named by `text`. Calling the spec calls it with one argument and the text's keyword arguments.

    The callable is imported on the first call, so that a spec can be pickled whatever it names.
    """

    text: str
    option: str = "--wrapper"
    module: str = field(init=False, repr=False)
    name: str = field(init=False, repr=False)
    arguments: dict[str, Any] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        module, colon, rest = self.text.partition(":")
        try:
            node = ast.parse(rest.strip(), mode="eval").body
            call = node if isinstance(node, ast.Call) else None
            arguments = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords} if call else {}
        except (SyntaxError, ValueError) as error:
            raise self.error(f"expected {EXAMPLE}, the values literals of Python") from error
        name = ast.unparse(call.func if call else node)
        named = colon and module and all(part.isidentifier() for part in name.split("."))
        if not named or (call and (call.args or "None" in arguments)):  # `**more` has no name
            why = "; arguments are given by name" if call and call.args else ""
            raise self.error(f"expected {EXAMPLE}{why}")
        for key, value in (("module", module), ("name", name), ("arguments", arguments)):
            object.__setattr__(self, key, value)

    @property
    def label(self) -> str:
        """The part of the text that tells it from others of its module: the name, and the arguments, if any."""
        return self.text.partition(":")[2].strip() if self.arguments else self.name.rpartition(".")[2]

    def error(self, what: str) -> SpecError:
        return SpecError(f"{self.option} {self.text!r}: {what}.")

    def load(self) -> Any:
        """Import the callable. Raises SpecError if there is none."""
        return _load(self)

    def __call__(self, argument: Any) -> Any:
        return self.load()(argument, **self.arguments)


@cache
def _load(spec: Spec) -> Any:
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # at the end, so that no file here hides an installed module
    importlib.invalidate_caches()
    try:
        target: Any = importlib.import_module(spec.module)
    except ModuleNotFoundError as error:
        if error.name is not None and (spec.module + ".").startswith(error.name + "."):
            raise spec.error(f"there is no module {error.name!r} in {here}, or installed") from error
        raise spec.error(f"importing {spec.module} raised {in_short(error)}{place(error)}") from error
    except (Exception, SystemExit) as error:  # a stranger's module may raise anything
        raise spec.error(f"importing {spec.module} raised {in_short(error)}{place(error)}") from error
    for part in spec.name.split("."):
        if not hasattr(target, part):
            names = [name for name, value in vars(target).items() if callable(value) and not name.startswith("_")]
            listed = f"; it has {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" if names else ""
            raise spec.error(f"{spec.module} has no {part!r}{listed}")
        target = getattr(target, part)
    if not callable(target):
        raise spec.error(f"it is of type {type(target).__name__}, and can't be called with an optimizer")
    return target


@dataclass(frozen=True)
class Inside:
    """Returns a wrapper's base, which `attribute` holds: of the wrapper, or of a member of it."""

    attribute: str
    member: int | None = None  # the place among the wrapper's `members`

    def __call__(self, wrapper: Any) -> Optimizer:
        return getattr(wrapper if self.member is None else wrapper.members[self.member], self.attribute)


def _base_getter(wrapper: Any, base: Optimizer) -> Any:
    """A function from a wrapper to its base; None if no attribute of the wrapper, or of its `members`, holds it."""
    if wrapper is base:
        return itself
    members = getattr(wrapper, "members", ())
    holders = [(None, wrapper), *(enumerate(members) if isinstance(members, (list, tuple)) else ())]
    for member, holder in holders:
        for name, value in getattr(holder, "__dict__", {}).items():
            if value is base:
                return Inside(name, member)
    return None


def subject_of(wrapper: Spec, base: Spec, **claims: Any) -> Subject:
    """Build the subject of a wrapper and a base, and take a plain step with it. Raises SpecError if that fails."""
    wrapper.load()
    model = ConformanceModel(claims.get("model", "mixed"))
    inner = _called(base, list(model.parameters()), f"{base.name}(parameters)")
    if not isinstance(inner, Optimizer):
        raise base.error(
            f"{base.name}(parameters) returned an object of type {type(inner).__name__}, not a torch.optim.Optimizer"
        )
    outer = _called(wrapper, inner, f"{wrapper.name}(base), with {type(inner).__name__} as the base,")
    missing = [name for name in _REQUIRED if not hasattr(outer, name)]
    if missing:
        what = f"{wrapper.name}(base) returned an object of type {type(outer).__name__}, which is no optimizer"
        raise wrapper.error(f"{what}: it has no {', '.join(missing)}")
    try:
        train(model, outer, [0])
    except (Exception, SystemExit) as error:  # a stranger's step may raise anything
        what = f"its first plain step over {type(inner).__name__} raised {in_short(error)}{place(error)}"
        raise wrapper.error(f"{what}, so that there is nothing to check") from error
    name = f"{wrapper.label} over {base.label}"
    return Subject(name=name, base=base, wrap=wrapper, get_base=_base_getter(outer, inner), **claims)


def _called(spec: Spec, argument: Any, call: str) -> Any:
    try:
        return spec(argument)
    except SpecError:
        raise
    except (Exception, SystemExit) as error:  # a stranger's constructor may raise anything
        raise spec.error(f"{call} raised {in_short(error)}{place(error)}") from error
