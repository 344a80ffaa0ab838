"""The command `selective doctor`: it reads the options and writes to the terminal."""

from __future__ import annotations

import contextlib
import sys

from selective.doctor.examine import doctor
from selective.doctor.report import NOT_LOADED
from selective.doctor.subject import CannotLoad


def run(factory: str, model: str | None, lr: float, device: str | None, as_json: bool) -> int:
    """Print the report on an optimizer. Returns the exit code: 0 fine, 1 something to mend, 2 it can't be made.

    What the user's own code prints goes to the error output, so that the output has nothing but the report.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            report = doctor(factory, model=model, lr=lr, device=device)
    except CannotLoad as error:
        print(f"selective doctor: {error}", file=sys.stderr)
        return NOT_LOADED
    print(report.model_dump_json(indent=2) if as_json else report)
    return report.exit_code
