"""Looks at an optimizer before it trains: what it will do, what it costs, and what should be mended first.

On the command line it is `selective doctor`. From Python it is `doctor`, on a function that makes the optimizer::

    from selective.doctor import doctor
    print(doctor(make_optimizer, model=model))
"""

from selective.doctor.examine import doctor
from selective.doctor.report import Finding, Group, Memory, Report, Steps, Trial
from selective.doctor.subject import CannotLoad

__all__ = ["CannotLoad", "Finding", "Group", "Memory", "Report", "Steps", "Trial", "doctor"]
