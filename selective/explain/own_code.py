"""The reason why a policy's own Python code runs, as `explain()` says it."""

from __future__ import annotations

from torch import Tensor

from selective.policies import Policy
from selective.policies.kernel_terms import specs_of, why_not_in_kernel


def why_own_code(policy: Policy, params: list[Tensor]) -> str:
    """Return the reason why the kernels do not run this policy on these parameters."""
    specs = specs_of(policy)
    why = None if specs is None or specs[0].control is None else why_not_in_kernel(specs[0], params)
    return why or "the policy is your own code"
