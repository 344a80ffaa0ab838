"""A policy in the kernels' terms, where it has no code of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from selective.kernels import spec, why_no_function
from selective.policies import Policy

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
        return self.specs is None or self.specs[0].kind != "function"


def specs_of(policy: Policy) -> Specs | None:
    """The policy in the kernels' terms; None for one with code of its own."""
    if type(policy).mask is not Policy.mask:
        return None
    parts = policy.parts()
    if parts is None:
        return None
    selection, strength = parts[0].spec(), parts[1].spec()
    return None if selection is None or strength is None else (selection, strength)


def why_twin(tensors: Iterable[Tensor]) -> str | None:
    """Why a selection with a kernel runs its torch twin on these parameters; None where the kernel runs.

    All of a group go one way: its own code is called before anything is written.
    """
    return next((why for why in map(why_no_function, tensors) if why is not None), None)


def specs_on(policy: Policy, tensors: Iterable[Tensor]) -> Specs | None:
    """The policy in the kernels' terms, where they can step these parameters by it; None: its own code has to."""
    specs = specs_of(policy)
    if specs is not None and specs[0].kind == "function" and why_twin(tensors) is not None:
        return None
    return specs


def has_own_code(policy: Policy, tensors: Iterable[Tensor]) -> bool:
    """Whether a step of this policy calls Python for each of these parameters, instead of running inside a kernel."""
    return specs_on(policy, tensors) is None
