"""Triton's interpreter, with its language patched once a launch instead of once a call of a device function.

Before the interpreter runs anything it replaces the members of `triton.language` by its own. It does that for a launch,
and again in each call of a device function, though they are replaced already: more than half of the time of our
interpreted tests. What a kernel computes is the same. A version of Triton that is built otherwise is left as it is.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any


class _Nothing:
    """The scope of a patch that was not needed."""

    def restore(self) -> None: ...


def install() -> bool:
    """Patch the interpreter, once. True if it is built as this expects."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return False
    patch = getattr(interpreter, "_patch_lang", None)
    executor = getattr(interpreter, "GridExecutor", None)
    if patch is None or executor is None or not hasattr(interpreter, "tl"):
        return False
    if getattr(patch, "once_a_launch", False):
        return True
    launch, tl = executor.__call__, interpreter.tl
    patched: list[set[int]] = []  # for the launch that is running: the modules whose members are replaced

    @functools.cache
    def languages(fn: Any) -> set[int]:
        modules = (value for value in fn.__globals__.values() if isinstance(value, ModuleType))
        return {id(module) for module in modules if module is tl or module is tl.core}

    def patch_once(fn: Any) -> Any:
        if not patched:
            return patch(fn)
        needed = languages(fn)
        if needed and needed <= patched[-1]:
            return _Nothing()
        patched[-1] |= needed
        return patch(fn)

    def launch_once(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.append(set())
        try:
            return launch(self, *args, **kwargs)
        finally:
            patched.pop()

    patch_once.once_a_launch = True  # type: ignore[attr-defined]
    interpreter._patch_lang = patch_once
    executor.__call__ = launch_once
    return True
