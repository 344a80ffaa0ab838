"""Registers all checks, by importing their modules."""

from selective.testing import (
    checks_checkpoint,
    checks_cost,
    checks_distributed,
    checks_interface,
    checks_numerics,
    checks_replicas,
    checks_stacks,
    checks_step,
)
from selective.testing.report import Check, conformance_checks, stack_checks

MODULES = (
    checks_interface, checks_step, checks_checkpoint, checks_distributed, checks_numerics, checks_cost,
    checks_stacks, checks_replicas,
)  # fmt: skip

__all__ = ["MODULES", "all_checks", "conformance_checks", "stack_checks"]


def all_checks() -> list[Check]:
    """All of `conformance_checks` and `stack_checks`, in the order of their rows."""
    return sorted([*conformance_checks, *stack_checks], key=lambda check: check.row)
