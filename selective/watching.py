"""watch: hands `opt.statistics()` of every N-th step to writers, without making the host wait for a GPU.

Note [nobody waits]: on a GPU a sample is copied into pinned memory behind the step's own kernels, and handed out in a
later step that finds the copy done. So writers are called some steps late there, but in order, and `flush()` waits for
the samples that are left. On a CPU writers are called in the step itself.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from selective.chained.optimizer import ChainedOptimizer
from selective.chained.reports import reported
from selective.optimizer import SelectiveUpdate

OVERVIEW = ("share", "strength_selected", "strength_rest", "cosine", "norm_ratio", "capped")
FAULTS = ("kept", "skipped", "basis_skipped")  # a preconditioner's counters: docs/how-it-works/rotation.md
_AT_CAP = 1 - 1e-6  # strengths are rounded to float32


@dataclass(frozen=True)
class Sample:
    """The statistics of one step.

    `step` is the number of steps that the optimizer had finished: 100 after the hundredth. `values` has, for each
    parameter by name, the numbers of `SelectiveUpdate.statistics()` as floats. It adds `norm_ratio`, the update's norm
    after the mask divided by that before, and, if the policy's strength has a cap, `capped`: 1 if it was reached, else
    0.
    """

    step: int
    values: dict[str, dict[str, float]]
    skipped_steps: int | None = None
    """The optimizer's `skipped_steps` by then; None without `on_nonfinite="skip"`."""

    def overview(self) -> dict[str, float]:
        """Means over the parameters of the numbers in `OVERVIEW`, sums of those in `FAULTS`, and `skipped_steps`.

        Parameters without a number, or with NaN in a mean, do not count. A name that no parameter has is left out.
        """
        overview = {}
        for name in OVERVIEW:
            known = [numbers[name] for numbers in self.values.values() if not math.isnan(numbers.get(name, math.nan))]
            if known:
                overview[name] = sum(known) / len(known)
        for name in FAULTS:
            counted = [numbers[name] for numbers in self.values.values() if name in numbers]
            if counted:
                overview[name] = sum(counted)
        if self.skipped_steps is not None:
            overview["skipped_steps"] = self.skipped_steps
        return overview

    def scalars(self, each: bool = False) -> dict[str, float]:
        """The overview. With `each`, also every number of every parameter, as "share/PARAMETER"."""
        scalars = self.overview()
        if each:
            for parameter, numbers in self.values.items():
                scalars |= {f"{name}/{parameter}": value for name, value in numbers.items()}
        return scalars


Writer = Callable[[Sample], Any]


def tensorboard(writer: Any, *, each: bool = False, prefix: str = "selective") -> Writer:
    """Make a writer for anything with `add_scalar(tag, value, step)`, such as a SummaryWriter of torch or tensorboardX.

    The tags are "selective/share" and the like. With `each`, there is also a "selective/share/PARAMETER" for every
    parameter.
    """

    def write(sample: Sample) -> None:
        for name, value in sample.scalars(each).items():
            writer.add_scalar(f"{prefix}/{name}", value, sample.step)

    return write


def watch(optimizer: Any, *writers: Writer, every: int = 100, model: nn.Module | None = None) -> Watch:
    """Call `writers` with a `Sample` of every `every`-th step, until `close()`.

    In distributed training, call it on the rank that writes.

    Args:
        optimizer: a `SelectiveUpdate`, a `ChainedOptimizer` with one among its members, or the object that accelerate
            or Lightning put around it.
        writers: functions that take a `Sample`.
        every: the number of steps from one sample to the next.
        model: gives the parameters its own names. Without it they are called as in `statistics()`.

    Returns:
        The `Watch`, which also works as a context manager.

    Raises:
        TypeError: there is no `SelectiveUpdate` in `optimizer`, nor a `ChainedOptimizer` with one.
        ValueError: the optimizer has `statistics=False`, `writers` or `every` can't be used, or `model` has none of the
            optimizer's parameters.
    """
    return Watch(optimizer, writers, every, model)


class Watch:
    """A run that is being watched, made by `watch`. As a context manager it closes at its end."""

    def __init__(self, optimizer: Any, writers: tuple[Writer, ...], every: int, model: nn.Module | None) -> None:
        self.optimizer = selective_inside(optimizer)
        self._wrapped = wrapped_members(self.optimizer)
        if not any(member.options.statistics for member in self._wrapped.values()):
            raise ValueError("watch: the optimizer collects nothing to watch; construct it with statistics=True")
        if not writers:
            raise ValueError("watch: no writer was given; pass a function that takes a selective.watching.Sample")
        not_callable = [writer for writer in writers if not callable(writer)]
        if not_callable:
            raise ValueError(
                f"watch: {not_callable[0]!r} is no writer, which is a function of a Sample; steps go in every="
            )
        if type(every) is not int or every < 1:
            raise ValueError(f"watch: every is {every!r}, must be an integer of at least 1")
        self.writers, self.every = writers, every
        self._names = {} if model is None else _names_in(model, self.optimizer)
        self._waiting: deque[_Copy] = deque()
        self._before = self._steps()
        self._hooks = [
            self.optimizer.register_step_pre_hook(self._remember),
            self.optimizer.register_step_post_hook(self._look),
        ]

    def flush(self) -> None:
        """Wait for the samples that are still being copied, and hand them to the writers."""
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
        self._before = self._steps()

    def _steps(self) -> int:
        """The number of steps taken. The members of a chain take their steps together."""
        return next(iter(self._wrapped.values())).count.steps

    def _look(self, *_: object) -> None:
        self._hand_out(wait=False)
        step = self._steps()
        if step != self._before and step % self.every == 0:  # skipped steps and torch's initialisation don't count
            skips = any(one.options.on_nonfinite == "skip" for one in self._wrapped.values())
            skipped = max(one.skipped_steps for one in self._wrapped.values()) if skips else None
            self._waiting.append(_Copy(step, self.optimizer.statistics(), self._renamed(), skipped))
            self._hand_out(wait=False)

    def _hand_out(self, wait: bool) -> None:
        while self._waiting and (wait or self._waiting[0].is_done()):
            sample = self._waiting.popleft().sample()
            for write in self.writers:
                write(sample)

    def _renamed(self) -> dict[str, tuple[str, float | None]]:
        """By a parameter's name in `statistics()`: its name in the samples, and the cap of its policy's strength."""
        renamed = {}
        for name, _, plan, parameter in reported(list(self._wrapped.values()), list(self._wrapped)):
            parts = plan.policy.parts()
            cap = None if parts is None else getattr(parts[1], "cap", None)
            renamed[name] = self._names.get(id(parameter.tensor), name), cap
        return renamed


class _Copy:
    """Statistics on their way to the host: Note [nobody waits]."""

    def __init__(
        self,
        step: int,
        statistics: dict[str, dict[str, Tensor]],
        known: dict[str, tuple[str, float | None]],
        skipped_steps: int | None,
    ) -> None:
        self.step, self._known, self._skipped_steps = step, known, skipped_steps
        by_device: dict[torch.device, list[tuple[str, str, Tensor]]] = {}
        for parameter, values in statistics.items():
            for name, value in values.items():
                by_device.setdefault(value.device, []).append((parameter, name, value.float()))
        self._parts: list[tuple[list[tuple[str, str]], Tensor, torch.cuda.Event | None]] = []
        for device, entries in by_device.items():
            values = torch.stack([value for _, _, value in entries])
            done = None
            if device.type == "cuda":
                host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
                values = host.copy_(values, non_blocking=True)
                done = torch.cuda.Event()
                done.record(torch.cuda.current_stream(device))
            self._parts.append(([(parameter, name) for parameter, name, _ in entries], values, done))

    def is_done(self) -> bool:
        return all(done is None or done.query() for _, _, done in self._parts)

    def sample(self) -> Sample:
        """The sample with its numbers on the host. Waits for the copy."""
        values: dict[str, dict[str, float]] = {}
        for keys, host, done in self._parts:
            if done is not None:
                done.synchronize()
            for (parameter, name), value in zip(keys, host.tolist(), strict=True):
                values.setdefault(parameter, {})[name] = value
        named = {}
        for parameter, numbers in values.items():
            called, cap = self._known[parameter]
            named[called] = _with_derived(numbers, cap)
        return Sample(self.step, named, self._skipped_steps)


def _names_in(model: nn.Module, optimizer: Optimizer) -> dict[int, str]:
    """The model's name of each parameter, by its id."""
    names = {id(p): name for name, p in model.named_parameters()}
    if not any(id(p) in names for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            f"watch: the model ({type(model).__name__}) has none of the optimizer's parameters, so that it can't name "
            f"them; pass the model that the optimizer was built from, not a copy of it"
        )
    return names


def _with_derived(values: dict[str, float], cap: float | None) -> dict[str, float]:
    """Add the ratio of the norms, and 1 or 0 for a cap that was reached or not."""
    if values.get("norm_before", 0.0) > 0:
        values["norm_ratio"] = values["norm_after"] / values["norm_before"]
    if cap is not None and "strength_selected" in values:
        values["capped"] = float(values["strength_selected"] >= cap * _AT_CAP)
    return values


def wrapped_members(optimizer: SelectiveUpdate | ChainedOptimizer) -> dict[str, SelectiveUpdate]:
    """The members of a chain that are wrapped, by name; a `SelectiveUpdate` is its own only one."""
    if isinstance(optimizer, SelectiveUpdate):
        return {"": optimizer}
    pairs = zip(optimizer.names, optimizer.members, strict=True)
    return {name: member for name, member in pairs if isinstance(member, SelectiveUpdate)}


def selective_inside(optimizer: Any) -> SelectiveUpdate | ChainedOptimizer:
    """The optimizer of ours inside of a training stack's wrappers, which accelerate and Lightning call `.optimizer`."""
    inner = optimizer
    while not (isinstance(inner, (SelectiveUpdate, ChainedOptimizer)) and wrapped_members(inner)):
        inner = getattr(inner, "optimizer", None)
        if inner is None:
            raise TypeError(f"watch: found no SelectiveUpdate in {type(optimizer).__name__}; pass the wrapper itself")
    return inner
