"""Gives up the import name `kernels`, which belongs to Hugging Face's kernels and not to this folder.

Code that uses that package when it is there, such as transformers, asks for it in three ways: `find_spec("kernels")`,
its version by `importlib.metadata`, and `import kernels`. At the root of a clone the first and the last lead here.
"""

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec
from types import ModuleType

_EMPTY = {"__name__", "__doc__", "__package__", "__loader__", "__spec__", "__path__", "__builtins__"}
"""The attributes of the empty module. `__file__` and `__version__` are not among them: by these transformers tells an
installed package from a folder that happens to have its name."""


def stand_aside(name: str) -> None:
    """Replace this folder's module `name`, which is being imported, by the installed package of that name.

    If none is installed, the module is emptied: it has no names, no version and no submodules.
    """
    module = sys.modules[name]
    own_init = module.__file__
    del sys.modules[__name__]  # this file, which was imported as a part of that name
    spec = None if own_init is None else _installed(name, own_init)
    if spec is None or spec.loader is None:
        _make_empty(module)
        return
    sys.modules[name] = installed = module_from_spec(spec)  # the import statement takes what it finds there at the end
    spec.loader.exec_module(installed)


def _installed(name: str, own_init: str) -> ModuleSpec | None:
    """Find another package called `name`, by all finders and in the order of an import; None if there is none."""
    for finder in sys.meta_path:
        if finder is PathFinder:
            specs = [PathFinder.find_spec(name, [entry]) for entry in sys.path]
        else:  # such as those of editable installations
            find_spec = getattr(finder, "find_spec", None)
            specs = [] if find_spec is None else [find_spec(name, None)]
        for spec in specs:
            if spec is not None and _is_another_package(spec, own_init):
                return spec
    return None


def _is_another_package(spec: ModuleSpec, own_init: str) -> bool:
    """Return True if `spec` has a file that is not `own_init`. A folder without `__init__.py` has none."""
    if spec.loader is None or spec.origin is None:
        return False
    return not (os.path.exists(spec.origin) and os.path.samefile(spec.origin, own_init))


def _make_empty(module: ModuleType) -> None:
    """Remove everything from a module, and keep its folder's files from being imported as its submodules."""
    for name in set(vars(module)) - _EMPTY:
        delattr(module, name)
    module.__path__ = []
    module.__doc__ = "Empty: this folder is installed as `selective.kernels`, and no package `kernels` is installed."
