"""Translates a policy into the kernels' terms, and says when its own code has to run instead."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property

from torch import Tensor

from selective.kernels import spec, why_own_code
from selective.policies import Dense, Policy
from selective.policies.function import OfFunction
from selective.sharding.dtensor import is_dtensor

Specs = tuple[spec.Selection, spec.Strength]


@dataclass(frozen=True)
class Described:
    """A policy with its needs and its kernel terms. Policies are frozen, so these are read once."""

    policy: Policy
    needs: frozenset[str]
    specs: Specs | None  # None: the policy has code of its own
    state_classes: tuple[type, ...]  # the classes that make a parameter's state: another one makes it anew

    @cached_property
    def same_for_all_parameters(self) -> bool:
        """True if the choice between kernels and own code is the same for every parameter."""
        return self.specs is None or not _depends_on_the_parameter(self.specs[0])


def state_classes_of(policy: Policy) -> tuple[type, ...]:
    """The classes of a policy, its strength, and a policy inside of it: what these make is its state."""
    parts = policy.parts()
    strength = () if parts is None else (type(parts[1]),)
    inner = getattr(policy, "policy", None)
    own = OfFunction if isinstance(policy, OfFunction) else type(policy)  # the class of a function can't be pickled
    return (own, *strength, *(state_classes_of(inner) if isinstance(inner, Policy) else ()))


def specs_of(policy: Policy) -> Specs | None:
    """The policy in the kernels' terms; None for a policy with code of its own.

    A class that overrides `mask` but not `specs` has code of its own: its inherited `specs` describe another mask.
    """
    owner = {name: next(c for c in type(policy).__mro__ if name in c.__dict__) for name in ("mask", "specs")}
    return policy.specs() if issubclass(owner["specs"], owner["mask"]) else None


@cache
def everything_as_it_is() -> Specs:
    """Return the selection and the strength that leave an update as it is."""
    specs = specs_of(Dense())
    assert specs is not None
    return specs


def _depends_on_the_parameter(selection: spec.Selection) -> bool:
    """True if the kernels take this selection on some parameters only, and its own code runs on the others.

    A user's function runs on a GPU only, and a matched control looks at whole tensors, so not at a DTensor's part.
    """
    return selection.kind == "function" or selection.control is not None


def why_not_in_kernel(selection: spec.Selection, tensors: Iterable[Tensor]) -> str | None:
    """The reason why the kernels can't run a selection that they know on these parameters; None if they can.

    Its own torch code runs then. All parameters of a group go one way, because own code is called before anything is
    written.
    """
    if not _depends_on_the_parameter(selection):
        return None
    for tensor in tensors:
        if selection.control is not None and is_dtensor(tensor):
            return "a matched random control looks at the whole of a parameter, and one is a DTensor"
        why = why_own_code(selection, tensor)
        if why is not None:
            return why
    return None


def specs_on(policy: Policy, tensors: Iterable[Tensor]) -> Specs | None:
    """The policy in the kernels' terms; None if its own code has to run on these parameters."""
    specs = specs_of(policy)
    return None if specs is None or why_not_in_kernel(specs[0], tensors) is not None else specs


def has_own_code(policy: Policy, tensors: Iterable[Tensor]) -> bool:
    """True if a step of this policy calls Python code for each of these parameters instead of a kernel."""
    return specs_on(policy, tensors) is None
