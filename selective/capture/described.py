"""A policy in the kernels' terms, where it has no code of its own."""

from __future__ import annotations

from dataclasses import dataclass

from selective.kernels import spec
from selective.policies import Policy

Specs = tuple[spec.Selection, spec.Strength]


@dataclass(frozen=True)
class Described:
    """A policy and what it says of itself. Policies are frozen, so that it is asked once."""

    policy: Policy
    needs: frozenset[str]
    specs: Specs | None  # None: it has code of its own


def specs_of(policy: Policy) -> Specs | None:
    """The policy in the kernels' terms; None for one with code of its own."""
    if type(policy).mask is not Policy.mask:
        return None
    parts = policy.parts()
    if parts is None:
        return None
    selection, strength = parts[0].spec(), parts[1].spec()
    return None if selection is None or strength is None else (selection, strength)


def has_own_code(policy: Policy) -> bool:
    """Whether a step of this policy has to call Python for each tensor, instead of running inside a kernel."""
    return specs_of(policy) is None


def kernel_specs(policy: Policy) -> Specs:
    """The policy in the kernels' terms. Only for policies without code of their own."""
    specs = specs_of(policy)
    assert specs is not None
    return specs
