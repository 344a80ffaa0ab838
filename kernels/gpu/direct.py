"""Direct launches: what Triton has compiled once is launched again without Triton's dispatcher.

`kernel[grid](...)` binds and specialises the arguments, and compares every global constant of the kernel with what it
was, at each launch: 60 to 130 microseconds on the host. It returns the compiled kernel, whose own `[grid](...)` takes a
few.

Note [what Triton compiles for]: a compiled kernel is launched again only for arguments for which Triton would take the
same one. It depends on the device, the constants, the options, some settings of the process; of a tensor on its dtype
and on whether its address is a multiple of 16; of an integer on its width, on whether it is 1, and on whether it is a
multiple of 16. Versions of Triton may differ in that, so that only those whose source was read are launched directly.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton import JITFunction, knobs

SWITCH = "SELECTIVE_DIRECT_LAUNCHES"  # an environment variable: 0 has every launch go through Triton's dispatcher
FIRST, LAST = (3, 6), (3, 9)  # the versions of Triton whose source was read


def are_possible() -> bool:
    """True if this Triton is one whose compiled kernels can be launched directly, and nobody has switched that off."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return os.environ.get(SWITCH, "1") != "0" and FIRST <= version <= LAST and torch.version.cuda is not None


class DirectLaunches:
    """The compiled kernels, by everything that they were compiled for. `enabled`: False launches through Triton."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self._compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}  # with the constants in their order
        self._settings: tuple[Any, ...] | None = None
        self.dispatched = 0  # launches that went through Triton's dispatcher
        self._kept: dict[int, Any] = {}  # kernels and functions by their id, so that no other one can have it

    def launch(
        self,
        kernel: Any,
        programs: int,
        arguments: Sequence[Any],
        options: dict[str, Any],
        constants: dict[str, Any],
    ) -> None:
        """Launch a kernel of this many programs.

        `arguments` are its parameters up to the first constant, in order; `constants` are the others, by name. Options
        of the compiler may be in `options` or in `constants`.
        """
        key = self._key(kernel, arguments, options, constants) if self.enabled else None
        known = None if key is None else self._compiled.get(key)
        if known is not None:
            compiled, in_order = known
            compiled[(programs, 1, 1)](*arguments, *in_order)
            return
        self.dispatched += 1
        compiled = kernel[(programs,)](*arguments, **options, **constants)
        in_order = None if key is None else _constants_of(kernel, compiled, len(arguments), constants)
        if key is not None and in_order is not None:
            self._kept.update((id(x), x) for x in (kernel, *constants.values()))
            self._compiled[key] = compiled, in_order

    def _key(
        self, kernel: Any, arguments: Sequence[Any], options: dict[str, Any], constants: dict[str, Any]
    ) -> tuple[Any, ...] | None:
        """Everything that Triton compiles for; None for a launch that has to go through Triton.

        That is one in the interpreter, and one for which somebody has set hooks that the dispatcher calls. A tensor on
        a CPU is refused by the compiled kernel itself.
        """
        if self._settings is None or not isinstance(kernel, JITFunction) or kernel.pre_run_hooks:
            return None
        key: list[Any] = [id(kernel), self._device(), self._settings]
        for x in arguments:
            if isinstance(x, Tensor):
                key.append(x.dtype)
                key.append(x.data_ptr() & 15 == 0)
            else:
                key += _kind_of(x)
        key += options.items()
        for name, x in constants.items():
            key.append(name)
            # a function is known by its identity: its hash and equality are those of its source, which take long
            key.append(id(x) if callable(x) else x)
        return tuple(key)

    def look_at_settings(self) -> None:
        """Read the settings of the process that Triton compiles for: once before some launches, as it takes a while.

        With a hook that the dispatcher calls for each launch, all go through it.
        """
        runtime, compilation = knobs.runtime, knobs.compilation
        casts = getattr(compilation, "fpsan_homomorphic_casts", None)  # since Triton 3.9
        hooked = runtime.add_stages_inspection_hook is not None
        self._settings = None if hooked else (runtime.debug, compilation.instrumentation_mode, casts)

    @property
    def settings(self) -> tuple[Any, ...] | None:
        """The settings that were read last; None if launches have to go through the dispatcher."""
        return self._settings if self.enabled else None

    @staticmethod
    def has_launch_hooks() -> bool:
        """True if somebody has set hooks that Triton calls for each launch, direct ones included."""
        hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        return any(getattr(hook, "calls", hook) for hook in hooks)

    def _device(self) -> int:
        return torch.cuda.current_device()


def _kind_of(x: int | float) -> tuple[Any, ...]:
    """All that a kernel is compiled for, of a number."""
    if isinstance(x, int):
        return type(x), x == 1, x & 15 == 0, -(1 << 31) <= x < 1 << 31, x < 1 << 63
    return (type(x),)


def _constants_of(kernel: Any, compiled: Any, count: int, constants: dict[str, Any]) -> tuple[Any, ...] | None:
    """The constants in the order in which a compiled kernel takes them after its `count` arguments.

    None if what Triton returned is no kernel that can be launched so, or if a constant is not given.
    """
    names = [parameter.name for parameter in kernel.params]
    are_constant = [parameter.is_constexpr for parameter in kernel.params]
    if type(compiled).__name__ != "CompiledKernel" or not hasattr(type(compiled), "__getitem__"):
        return None
    if any(are_constant[:count]) or not all(are_constant[count:]) or not set(names[count:]) <= constants.keys():
        return None
    return tuple(constants[name] for name in names[count:])
