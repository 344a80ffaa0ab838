"""KernelCalls: kernel calls of several jobs, which are made together.

Results are those of separate calls, bit for bit: no tensor's step reads another's. On a GPU the tensors of all calls
that differ in numbers only share their launches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from selective.capture.items import DeviceItems
from selective.kernels import CheckedCalls, check_steps, selective_steps, spec

Then = Callable[[Sequence[spec.Sums] | None], None]


class KernelCalls:
    """Collects the kernel calls of a step, and makes them in one call of `selective_steps`."""

    def __init__(self) -> None:
        self._calls: list[tuple[DeviceItems, spec.StepSpec, Then]] = []
        self._graphs = True
        self._checked: CheckedCalls | None = None

    def add(self, items: DeviceItems, step_spec: spec.StepSpec, then: Then, graphs: bool = False) -> None:
        """Add a call. `check` checks it, and `run` makes it and hands `then` the sums of its items, in order.

        `graphs`: its launches may be replayed as a CUDA graph. They are if that holds for all calls.
        """
        self._calls.append((items, step_spec, then))
        self._graphs = self._graphs and graphs

    def check(self, untouched: bool = False) -> None:
        """Refuse what the kernels can't take, before anything moves.

        `untouched`: nobody could have changed a parameter since `GroupParams.detect_changes` looked at all of them, so
        that items which were kept have the same dtypes, shapes and strides. Nobody will until `run` either, so that it
        does not check them again.
        """
        checked = check_steps(self._step_calls(untouched)) if self._calls else None
        self._checked = checked if untouched else None

    def run(self) -> None:
        """Make all calls that were added."""
        if not self._calls:
            return
        sums = selective_steps(self._step_calls(False) if self._checked is None else self._checked)
        calls, self._calls, self._checked, self._graphs = self._calls, [], None, True
        for (_, _, then), own in zip(calls, sums, strict=True):
            then(own)

    def _step_calls(self, untouched: bool) -> list[spec.StepCall]:
        return [
            spec.StepCall(kept.items, how, untouched and not kept.dtensors, self._graphs)
            for kept, how, _ in self._calls
        ]

    def drop(self) -> None:
        """Forget calls that were not made, because the step failed, and let their gradients go."""
        for items, _, _ in self._calls:
            items.let_go()
        self._calls, self._checked = [], None
