"""All checks, registered: importing their modules does it."""

from selective.testing import (
    checks_checkpoint,
    checks_distributed,
    checks_interface,
    checks_numerics,
    checks_step,
)
from selective.testing.report import conformance_checks

MODULES = (checks_interface, checks_step, checks_checkpoint, checks_distributed, checks_numerics)

__all__ = ["MODULES", "conformance_checks"]
