"""Objects by name: `module:name`, or `path/to/file.py:name` for a file that is no installed module."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from selective.compare.config import ConfigError
from selective.compare.task import check_is_task


def load_object(reference: str, what: str) -> Any:
    """The object that `reference` names. `what` is named in the ConfigError if there is none."""
    place, colon, attribute = reference.rpartition(":")
    if not colon:
        raise ConfigError(f"{what}: {reference!r} names no object; write module:name, or path/to/file.py:name")
    found: Any = load_module(place, what)
    for part in attribute.split("."):
        if not hasattr(found, part):
            known = [name for name in vars(found) if not name.startswith("_")] if hasattr(found, "__dict__") else []
            raise ConfigError(f"{what}: {place} has no {attribute!r}; there is {', '.join(known)}")
        found = getattr(found, part)
    return found


def load_module(place: str, what: str) -> ModuleType:
    """The module, by its name or by the path of its file. Raises ConfigError if it can't be imported."""
    try:
        return _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except FileNotFoundError as error:
        raise ConfigError(f"{what}: there is no file {error.filename or place}") from error
    except ImportError as error:
        raise ConfigError(
            f"{what}: {place} cannot be imported ({error}). Write a file as path/to/file.py:name; a module in the "
            "current folder is found with PYTHONPATH=."
        ) from error
    except Exception as error:  # a module of the user's may raise anything while it is imported
        raise ConfigError(f"{what}: {place} raises {type(error).__name__} when it is imported: {error}") from error


def _from_file(path: Path) -> ModuleType:
    """The file as a module of its own name in `sys.modules`. Modules beside it can be imported, as by a script."""
    whole = path.resolve()
    if not whole.is_file():
        raise FileNotFoundError(2, "no such file", str(path))
    name = f"selective_{whole.stem}_{hashlib.sha256(str(whole).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, whole)
    assert spec is not None
    assert spec.loader is not None
    if str(whole.parent) not in sys.path:
        sys.path.append(str(whole.parent))  # last, so that it hides nothing that is installed
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def load_task(reference: str) -> Any:
    """The task that `reference` names. A class, or a function that returns a task, is called without arguments.

    A module whose functions are those of a task is one as well, named without `:name`.
    """
    what = f"task {reference}"
    if ":" in reference:
        task = load_object(reference, what)
    else:
        task = load_module(reference, what)
    if inspect.isclass(task) or (callable(task) and not hasattr(task, "loss")):
        try:
            task = task()
        except ConfigError:
            raise
        except Exception as error:  # the user's own code
            raise ConfigError(f"{what} raises {type(error).__name__} when it is called: {error}") from error
    check_is_task(task, what)
    return task
