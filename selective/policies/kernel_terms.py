"""A policy in the kernels' terms, where it has no code of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from selective.kernels import spec, why_own_code
from selective.policies import Policy
from selective.sharding.dtensor import is_dtensor

Specs = tuple[spec.Selection, spec.Strength]


@dataclass(frozen=True)
class Described:
    """A policy and what it says of itself. Policies are frozen, so that it is asked once."""

    policy: Policy
    needs: frozenset[str]
    specs: Specs | None  # None: it has code of its own

    @property
    def is_anywhere(self) -> bool:
        """Whether it runs in the kernels, or as code of its own, whatever the parameters are."""
        return self.specs is None or not _has_a_place(self.specs[0])


def specs_of(policy: Policy) -> Specs | None:
    """The policy in the kernels' terms; None for one with code of its own.

    A class that overrides `mask` and not `specs` has another mask than its `specs` say.
    """
    owner = {name: next(c for c in type(policy).__mro__ if name in c.__dict__) for name in ("mask", "specs")}
    return policy.specs() if issubclass(owner["specs"], owner["mask"]) else None


def _has_a_place(selection: spec.Selection) -> bool:
    """Whether the kernels take this selection on some parameters, and its own code runs on others."""
    return selection.kind == "function" or selection.control is not None


def why_not_in_kernel(selection: spec.Selection, tensors: Iterable[Tensor]) -> str | None:
    """Why a selection that the kernels know runs as torch code of its own on these parameters; None where they run it.

    All of a group go one way: its own code is called before anything is written.
    """
    if not _has_a_place(selection):
        return None
    for tensor in tensors:
        if selection.control is not None and is_dtensor(tensor):
            return "a matched random control looks at the whole of a parameter, and one is a DTensor"
        why = why_own_code(selection, tensor)
        if why is not None:
            return why
    return None


def specs_on(policy: Policy, tensors: Iterable[Tensor]) -> Specs | None:
    """The policy in the kernels' terms, where they can step these parameters by it; None: its own code has to."""
    specs = specs_of(policy)
    return None if specs is None or why_not_in_kernel(specs[0], tensors) is not None else specs


def has_own_code(policy: Policy, tensors: Iterable[Tensor]) -> bool:
    """Whether a step of this policy calls Python for each of these parameters, instead of running inside a kernel."""
    return specs_on(policy, tensors) is None
