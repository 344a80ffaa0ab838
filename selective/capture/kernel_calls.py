"""KernelCalls: kernel calls of several jobs, which are made together.

Results are those of separate calls, bit for bit: no tensor's step reads another's. On a GPU the tensors of all calls
that differ in numbers only share their launches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from selective.capture.items import DeviceItems
from selective.kernels import selective_steps, spec

Then = Callable[[Sequence[spec.Sums] | None], None]


class KernelCalls:
    """Collects the kernel calls of a step, and makes them in one call of `selective_steps`."""

    def __init__(self) -> None:
        self._calls: list[tuple[DeviceItems, spec.StepSpec, Then]] = []
        self._graphs = True

    def add(self, items: DeviceItems, step_spec: spec.StepSpec, then: Then, graphs: bool = False) -> None:
        """Add a call. `run` makes it, and hands `then` the sums of its items, in order.

        `graphs`: its launches may be replayed as a CUDA graph. They are if that holds for all calls.
        """
        self._calls.append((items, step_spec, then))
        self._graphs = self._graphs and graphs

    def run(self, untouched: bool = False) -> None:
        """Make all calls that were added.

        `untouched`: nobody could have changed a parameter since `GroupParams.detect_changes` looked at all of them, so
        that items which were kept have the same dtypes, shapes and strides.
        """
        if not self._calls:
            return
        sums = selective_steps(
            [
                spec.StepCall(kept.items, how, untouched and not kept.dtensors, self._graphs)
                for kept, how, _ in self._calls
            ]
        )
        calls, self._calls, self._graphs = self._calls, [], True
        for (_, _, then), own in zip(calls, sums, strict=True):
            then(own)

    def drop(self) -> None:
        """Forget calls that were not made, because the step failed, and let their gradients go."""
        for items, _, _ in self._calls:
            items.let_go()
        self._calls = []
