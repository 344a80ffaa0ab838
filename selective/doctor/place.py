"""The line of the user's own code at which an error was raised."""

from __future__ import annotations

import os
import sysconfig
import traceback
from pathlib import Path

_NOT_THE_USER = ("selective", "torch")  # top-level packages
_INSTALLED = tuple(os.path.realpath(sysconfig.get_path(name)) + os.sep for name in ("stdlib", "purelib", "platlib"))
_FOLDERS = ("site-packages", "dist-packages")  # of other environments that are on the path
_MOST_CHARACTERS = 300  # of an error's message


def said(error: BaseException) -> str:
    """Return an error in one line: its class, the first line of its message, and the place."""
    lines = str(error).strip().splitlines()
    message = f": {lines[0][:_MOST_CHARACTERS]}" if lines else ""
    place = place_of(error)
    return f"{type(error).__name__}{message}{f' ({place})' if place else ''}"


def place_of(error: BaseException) -> str:
    """Return the deepest line of the traceback that is the user's, as "train.py, line 3, in make"; empty without one.

    Lines of installed packages and of the standard library are not the user's.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f"{short_path(error.filename)}, line {error.lineno}"
    if error.__cause__ is not None and (place := place_of(error.__cause__)):
        return place  # where the error began that this one explains
    for frame, number in reversed(list(traceback.walk_tb(error.__traceback__))):
        if _is_of_user(frame.f_code.co_filename, frame.f_globals.get("__name__", "")):
            name = frame.f_code.co_name
            inside = "" if name.startswith("<") else f", in {name}"
            return f"{short_path(frame.f_code.co_filename)}, line {number}{inside}"
    return ""


def short_path(file: str) -> str:
    """Return the path relative to the current folder if the file is inside it, otherwise as it is."""
    try:
        return str(Path(file).resolve().relative_to(Path.cwd()))
    except ValueError:
        return file


def _is_of_user(file: str, module: str) -> bool:
    if module.partition(".")[0] in _NOT_THE_USER or file.startswith("<"):
        return False
    if any(folder in Path(file).parts for folder in _FOLDERS):
        return False
    return not os.path.realpath(file).startswith(_INSTALLED)
