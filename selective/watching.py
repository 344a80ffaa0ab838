"""Watching a run: `opt.statistics()` of every N-th step, handed to writers without making the host wait for a GPU.

Note [nobody waits]: on a GPU a sample is copied into pinned memory behind the step's own kernels, and handed out in a
later step that finds the copy done. So writers are called some steps late there, in order, and `flush()` waits for the
rest. On a CPU they are called in the step itself.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from selective.optimizer import SelectiveUpdate

OVERVIEW = ("share", "strength_selected", "strength_rest", "cosine", "norm_ratio", "capped")
FAULTS = ("kept", "skipped", "basis_skipped")  # counters of a preconditioner: docs/preconditioner-eigenbasis.md
_AT_CAP = 1 - 1e-6  # strengths are rounded to float32


@dataclass(frozen=True)
class Sample:
    """What one step selected. `step` is how many steps the optimizer had finished: 100 after the hundredth.

    `values` are those of `SelectiveUpdate.statistics()` as floats, by parameter, and beside them `norm_ratio` (of the
    update's norm after the mask to that before) and, where the policy's strength has a cap, `capped`: 1 where it was
    reached.
    """

    step: int
    values: dict[str, dict[str, float]]

    def overview(self) -> dict[str, float]:
        """The mean over the parameters of what is in `OVERVIEW`, the sum of what is in `FAULTS`; of what they have."""
        found = {}
        for name in OVERVIEW:
            known = [one[name] for one in self.values.values() if not math.isnan(one.get(name, math.nan))]
            if known:
                found[name] = sum(known) / len(known)
        for name in FAULTS:
            counted = [one[name] for one in self.values.values() if name in one]
            if counted:
                found[name] = sum(counted)
        return found

    def scalars(self, each: bool = False) -> dict[str, float]:
        """The overview; with `each` also every number of every parameter, as "share/PARAMETER"."""
        found = self.overview()
        if each:
            found |= {f"{name}/{who}": value for who, one in self.values.items() for name, value in one.items()}
        return found


Writer = Callable[[Sample], Any]


def tensorboard(writer: Any, *, each: bool = False, prefix: str = "selective") -> Writer:
    """Hands samples to anything with `add_scalar(tag, value, step)`, such as torch's or tensorboardX's SummaryWriter.

    Tags are "selective/share" and the like; with `each` also "selective/share/PARAMETER".
    """

    def write(sample: Sample) -> None:
        for name, value in sample.scalars(each).items():
            writer.add_scalar(f"{prefix}/{name}", value, sample.step)

    return write


def watch(optimizer: Any, *writers: Writer, every: int = 100, model: nn.Module | None = None) -> Watch:
    """Call `writers` with a `Sample` of every `every`-th step, until `close()`.

    optimizer: a `SelectiveUpdate`, also inside of what accelerate or Lightning put around it.
    model: names the parameters as it does; without it they are called as in `statistics()`.

    In distributed training, call it on the rank that writes.
    """
    return Watch(optimizer, writers, every, model)


class Watch:
    """A run that is being watched; made by `watch`. Also a context manager, which closes at its end."""

    def __init__(self, optimizer: Any, writers: tuple[Writer, ...], every: int, model: nn.Module | None) -> None:
        self.optimizer = selective_inside(optimizer)
        if not self.optimizer.options.statistics:
            raise ValueError("watch: the optimizer collects nothing to watch; construct it with statistics=True")
        if not writers:
            raise ValueError("watch: no writer was given; pass a function that takes a selective.watching.Sample")
        odd = [writer for writer in writers if not callable(writer)]
        if odd:
            raise ValueError(f"watch: {odd[0]!r} is no writer, which is a function of a Sample; steps go in every=")
        if type(every) is not int or every < 1:
            raise ValueError(f"watch: every is {every!r}, must be an integer of at least 1")
        self.writers, self.every = writers, every
        self._names = {} if model is None else {id(p): name for name, p in model.named_parameters()}
        self._waiting: deque[_Copy] = deque()
        self._before = self.optimizer.count.steps
        self._hooks = [
            self.optimizer.register_step_pre_hook(self._remember),
            self.optimizer.register_step_post_hook(self._look),
        ]

    def flush(self) -> None:
        """Wait for what is still being copied, and hand it out."""
        self._hand_out(wait=True)

    def close(self) -> None:
        """Flush, and watch no further steps."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.flush()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _remember(self, *_: object) -> None:
        self._before = self.optimizer.count.steps

    def _look(self, *_: object) -> None:
        self._hand_out(wait=False)
        step = self.optimizer.count.steps
        if step != self._before and step % self.every == 0:  # one that was skipped or only made state is not counted
            self._waiting.append(_Copy(step, self.optimizer.statistics(), self._renamed()))
            self._hand_out(wait=False)

    def _hand_out(self, wait: bool) -> None:
        while self._waiting and (wait or self._waiting[0].is_done()):
            sample = self._waiting.popleft().sample()
            for write in self.writers:
                write(sample)

    def _renamed(self) -> dict[str, tuple[str, float | None]]:
        """Each parameter's name in `statistics()`: what it is called here, and the cap of its strength."""
        found = {}
        for plan in self.optimizer.groups.plans:
            parts = plan.policy.parts()
            cap = None if parts is None else getattr(parts[1], "cap", None)
            for one in plan.params.parameters:
                found[one.name] = self._names.get(id(one.tensor), one.name), cap
        return found


class _Copy:
    """Statistics on their way to the host: Note [nobody waits]."""

    def __init__(
        self, step: int, found: dict[str, dict[str, Tensor]], known: dict[str, tuple[str, float | None]]
    ) -> None:
        self.step, self._known = step, known
        by_device: dict[torch.device, list[tuple[str, str, Tensor]]] = {}
        for who, values in found.items():
            for name, value in values.items():
                by_device.setdefault(value.device, []).append((who, name, value.float()))
        self._parts: list[tuple[list[tuple[str, str]], Tensor, torch.cuda.Event | None]] = []
        for device, entries in by_device.items():
            values = torch.stack([value for _, _, value in entries])
            done = None
            if device.type == "cuda":
                host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
                values = host.copy_(values, non_blocking=True)
                done = torch.cuda.Event()
                done.record(torch.cuda.current_stream(device))
            self._parts.append(([(who, name) for who, name, _ in entries], values, done))

    def is_done(self) -> bool:
        return all(done is None or done.query() for _, _, done in self._parts)

    def sample(self) -> Sample:
        """The numbers, on the host. Waits for them."""
        values: dict[str, dict[str, float]] = {}
        for keys, host, done in self._parts:
            if done is not None:
                done.synchronize()
            for (who, name), value in zip(keys, host.tolist(), strict=True):
                values.setdefault(who, {})[name] = value
        named = {}
        for who, one in values.items():
            called, cap = self._known[who]
            named[called] = _with_derived(one, cap)
        return Sample(self.step, named)


def _with_derived(values: dict[str, float], cap: float | None) -> dict[str, float]:
    """With the ratio of norms, and whether the cap was reached."""
    if values.get("norm_before", 0.0) > 0:
        values["norm_ratio"] = values["norm_after"] / values["norm_before"]
    if cap is not None and "strength_selected" in values:
        values["capped"] = float(values["strength_selected"] >= cap * _AT_CAP)
    return values


def selective_inside(optimizer: Any) -> SelectiveUpdate:
    """The `SelectiveUpdate` in what a training stack has put around it (accelerate and Lightning: `.optimizer`)."""
    found = optimizer
    while not isinstance(found, SelectiveUpdate):
        found = getattr(found, "optimizer", None)
        if found is None:
            raise TypeError(f"watch: found no SelectiveUpdate in {type(optimizer).__name__}; pass the wrapper itself")
    return found
