"""The check of every step against the reference, for whoever suspects a kernel. It is off unless it is asked for.

On, each step keeps copies of its tensors, lets the kernels step, takes the same step from the copies by the parts of
`kernels/reference`, and raises at the first difference that rounding can't explain. `ranges` says what that is.
"""

from .compare import compared
from .difference import KernelDifference
from .switch import checked_steps, is_on, refuse_shards

__all__ = ["KernelDifference", "checked_steps", "compared", "is_on", "refuse_shards"]
