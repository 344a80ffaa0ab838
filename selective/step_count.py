"""The seed and the number of steps taken: on the host, and on GPUs in a clock of their own.

A replay of a CUDA graph runs no Python, so nothing on the host counts it.

Note [the clock]: random selections draw by (seed, step, parameter, element). On a GPU both first numbers are read from
an int64 tensor `[seed, step]`, which the step's last operation moves on. Recorded in a graph, it goes on with every
replay; from then on the device knows the count, and the host asks it where it needs to (`StepCount.read`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.kernels.lasting import lasting


class DeviceClock:
    """`now` is the int64 tensor [seed, step] on one device. It stays the same memory: graphs have recorded it."""

    def __init__(self, device: torch.device, seed: int, step: int) -> None:
        self.now = torch.tensor([seed, step], dtype=torch.int64, device=device)
        self._one_step = torch.tensor([0, 1], dtype=torch.int64, device=device)
        self.expected = seed, step  # what the host believes `now` to hold: as long as it is right, nobody waits

    def set(self, seed: int, step: int) -> None:
        self.now.copy_(torch.tensor([seed, step], dtype=torch.int64, device="cpu"))
        self.expected = seed, step

    def tick(self, recording: bool = False) -> None:
        """One step on, without waiting for the device; while recording only in the replays to come."""
        self.now.add_(self._one_step)
        if not recording:
            self.expected = self.expected[0], self.expected[1] + 1

    def read(self) -> int:
        """The step count. Waits for the device."""
        seed, step = self.now.tolist()
        self.expected = seed, step
        return step


class Clocks:
    """The clocks of one optimizer, one a device, and who is right: the host, until a step has been recorded."""

    def __init__(self) -> None:
        self._clocks: dict[torch.device, DeviceClock] = {}
        self.recorded = False

    def on(self, device: torch.device) -> Tensor | None:
        """The clock of `device` for `Draw.clock`; None where there is none."""
        clock = self._clocks.get(device)
        return None if clock is None else clock.now

    def devices(self) -> list[torch.device]:
        """Those that have a clock."""
        return list(self._clocks)

    def start(self, devices: Iterable[torch.device], seed: int, step: int, recording: bool = False) -> int:
        """Before a step on `devices`: a clock on each, set to this step. Returns its number, as the host knows it."""
        if recording:
            for device in devices:
                if device not in self._clocks:  # making one copies from the host
                    raise RuntimeError(
                        f"SelectiveUpdate: CUDA graph capture of the first step() on {device}: state and tables are "
                        f"made in it, outside of the graph's reach; take one step before capturing"
                    )
            self.recorded = self.recorded or bool(self._clocks)
            return step
        step = self.count(step)
        for device in devices:
            clock = self._clocks.get(device)
            if clock is None:
                with lasting():
                    self._clocks[device] = DeviceClock(device, seed, step)
            elif clock.expected != (seed, step):  # a checkpoint was loaded
                clock.set(seed, step)
        return step

    def tick(self, devices: Iterable[torch.device], recording: bool = False) -> None:
        """After a step on `devices`."""
        for device in devices:
            self._clocks[device].tick(recording)

    def count(self, step: int) -> int:
        """Return the number of steps taken: `step`, the host's count, unless replays may have gone on (waits)."""
        if not self.recorded or is_recording():
            return step
        return max(clock.read() for clock in self._clocks.values())

    def set(self, seed: int, step: int) -> None:
        """Set all clocks, after the host's numbers were changed: graphs go on from there."""
        for clock in self._clocks.values():
            clock.set(seed, step)


class StepCount:
    """The seed of random policies and the number of steps taken, on the host and on devices that count themselves."""

    def __init__(self, seed: int, steps: int = 0, skipped: int = 0) -> None:
        self.seed, self.steps = seed, steps
        self.skipped = skipped  # steps that on_nonfinite="skip" left out since construction, which no checkpoint has
        self.clocks = Clocks()

    def read(self) -> int:
        """Return the number of steps taken. Updates `steps`, if a GPU has counted replays: Note [the clock]."""
        self.steps = self.clocks.count(self.steps)
        return self.steps

    def start(self, devices: Iterable[torch.device], recording: bool) -> None:
        """Before a step on `devices`."""
        self.steps = self.clocks.start(devices, self.seed, self.steps, recording)

    def tick(self, devices: Iterable[torch.device], recording: bool) -> None:
        """After a step on `devices`: one more, unless it was only recorded."""
        self.clocks.tick(devices, recording)
        self.steps += not recording

    def set(self, *, seed: int | None = None, steps: int | None = None) -> None:
        """Go on from these, on all devices; what is None stays."""
        self.seed = self.seed if seed is None else seed
        self.steps = self.steps if steps is None else steps
        self.clocks.set(self.seed, self.steps)

    def snapshot(self) -> Callable[[], None]:
        """A function that sets the count back to what it is now."""
        seed, steps = self.seed, self.steps
        return lambda: self.set(seed=seed, steps=steps)


def is_recording() -> bool:
    """True if the current CUDA stream is being captured into a graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def check_recordable(
    base: Optimizer,
    groups: list[dict[str, Any]],
    on_nonfinite: str,
    rotates: bool,
    asks: bool = False,
    draws: bool = False,
) -> None:
    """Refuse to record a step that replays would not repeat, as torch's own optimizers do."""
    if asks:
        raise RuntimeError(
            "SelectiveUpdate: attempting CUDA graph capture of step() with sharded parameters, for which ranks ask "
            "each other in the step; replays of that have not been tried. Construct it with scope='local', or don't "
            "capture"
        )
    if draws:
        raise RuntimeError(
            "SelectiveUpdate: attempting CUDA graph capture of step() with decay=RandomDecay(...), which draws by the "
            "step count on the host: all replays would decay the same coordinates. Don't capture it"
        )
    if rotates:
        raise RuntimeError(
            "SelectiveUpdate: attempting CUDA graph capture of step() with a preconditioner, which decides on the host "
            "when to refresh a basis; a replay would never do it again. Construct it with preconditioner=None"
        )
    for number, group in enumerate(groups):
        if group.get("capturable") is False:
            raise RuntimeError(
                f"SelectiveUpdate: attempting CUDA graph capture of step(), but param_groups[{number}]'s capturable is "
                f"False: {type(base).__name__} counts its steps on the host, where a replay does not reach them; "
                f"construct it with capturable=True"
            )
    if on_nonfinite != "ignore":
        raise RuntimeError(
            f"SelectiveUpdate: attempting CUDA graph capture of step() with on_nonfinite={on_nonfinite!r}, which reads "
            f"the gradients on the host; construct the optimizer with on_nonfinite='ignore'"
        )
