"""KernelCalls: kernel calls of several jobs, made together where the same rule and mask hold for their tensors.

`selective_step` takes one rule, selection, strength and source of random numbers for all of its tensors. So the tensors
of two groups share a call if all of these are equal. Results are those of separate calls, bit for bit: no tensor's step
reads another's.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from selective.capture.items import DeviceItems
from selective.kernels import selective_step, spec

Then = Callable[[Sequence[spec.Sums] | None], None]


@dataclass
class Call:
    """One job's call of `selective_step` on one device: its items, the other arguments, and who gets the sums."""

    items: DeviceItems
    arguments: dict[str, Any]
    then: Then


class KernelCalls:
    """Collects the kernel calls of a step, and makes them with as few calls of `selective_step` as possible.

    Lists of several jobs' items are kept from step to step, as those of one job are: the GPU path keeps tables beside
    them. They are not copied or pickled. On a GPU, a job's list is first stepped by itself, which makes tables of its
    own: a step that is recorded in a CUDA graph needs them, because it is not shared.
    """

    def __init__(self) -> None:
        self._calls: list[Call] = []
        self._joined: dict[tuple[int, ...], tuple[list[DeviceItems], spec.ItemList]] = {}

    def add(self, items: DeviceItems, arguments: dict[str, Any], then: Then) -> None:
        """Add a call. `run` makes it, and hands `then` the sums of its items, in order."""
        self._calls.append(Call(items, arguments, then))

    def run(self) -> None:
        """Make all calls that were added."""
        buckets: dict[Hashable, list[Call]] = {}
        for call in self._calls:
            key = call.items.device, *(_key(value) for value in call.arguments.values())
            alone = (id(call),) if _lacks_tables(call.items) else ()
            buckets.setdefault((*key, *alone), []).append(call)
        self._calls = []
        before, self._joined = self._joined, {}
        for bucket in buckets.values():
            if len(bucket) == 1:
                bucket[0].then(selective_step(bucket[0].items.items, **bucket[0].arguments))
            else:
                self._make(bucket, before)

    def drop(self) -> None:
        """Forget calls that were not made, because the step failed before them."""
        self._calls = []

    def forget(self) -> None:
        """Forget the joined lists, so that state which was replaced is not kept in memory until the next step."""
        self._joined = {}

    def _make(self, bucket: list[Call], before: dict[tuple[int, ...], Any]) -> None:
        key = tuple(id(call.items) for call in bucket)
        lists = [call.items for call in bucket]
        if key not in before:  # the lists are kept with it, so that no other list can have their ids
            before[key] = lists, spec.ItemList(item for each in lists for item in each.items)
        self._joined[key] = before[key]
        sums, start = selective_step(before[key][1], **bucket[0].arguments), 0
        for call in bucket:
            end = start + len(call.items.items)
            call.then(None if sums is None else _part(sums, start, end))
            start = end


def _lacks_tables(items: DeviceItems) -> bool:
    return items.device.type == "cuda" and "plan" not in items.items.cache


def _key(value: Any) -> Hashable:
    """A key that is equal for equal arguments. Tensors count by identity: to compare them may wait for a GPU."""
    if isinstance(value, Tensor):
        return "tensor", id(value)
    if hasattr(value, "__dataclass_fields__"):
        return type(value), *(_key(getattr(value, field.name)) for field in fields(value) if field.compare)
    return value


def _part(sums: Sequence[spec.Sums], start: int, end: int) -> Sequence[spec.Sums]:
    if isinstance(sums, spec.SumsTable):
        return spec.SumsTable(sums.values[start:end], sums.numels[start:end])
    return sums[start:end]
