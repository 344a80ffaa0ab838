"""Starts a script of this package in a fresh Python process, which imports from where this process does."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def command_of(script: Path, *arguments: str) -> list[str]:
    """The command line that runs the script as `__main__`, without its folder on the path of imports."""
    run = "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    return [sys.executable, "-c", run, str(script), *arguments]


def environment_of() -> dict[str, str]:
    """This process's environment, with its path of imports. Python may keep the files that it compiles."""
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**inherited, "PYTHONPATH": path}
