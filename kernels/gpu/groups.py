"""The table of the groups: each one's hyper-parameters and clock, for all batches on a device."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from ..spec import StepSpec
from .configure import hyper_parameters, rule_numbers
from .device import numbers
from .tables import Uploads


class GroupTable:
    """A row for each group (each call that is stepped together with others), in the order of the `StepSpec`s.

    `hyper` is float64 [groups, HYPER]; `clocks` is int64 [groups], the address of each group's [seed, step], which is
    the wrapper's clock or a row of `own_clocks`. What has changed since the last step is uploaded.
    """

    def __init__(self, groups: int, device: torch.device, here: Collection[int] | None = None) -> None:
        """`here`: the groups that have tensors on this device; the rows of others are not filled. None: all."""
        self.device, self.uploads = device, Uploads(device)
        self.here = frozenset(range(groups) if here is None else here)
        self.hyper = torch.zeros(groups, numbers.HYPER.value, dtype=torch.float64, device=device)
        self.clocks = torch.zeros(groups, dtype=torch.int64, device=device)
        self.own_clocks = torch.zeros(groups, 2, dtype=torch.int64, device=device)
        self._known_clocks: list[Tensor | None] = []
        self._all_have_clocks = False  # True if each group's wrapper has a clock on this device
        self._sources: list[tuple[Any, ...] | None] = []  # what the rows were made of; None: of a tensor, too
        self._made_of: list[object] = []  # the rules, selections and strengths that these were read off

    def update(self, specs: Sequence[StepSpec]) -> None:
        """Bring the table up to date for this step."""
        self.upload_numbers(specs)
        self._upload_clocks(specs)

    def upload_numbers(self, specs: Sequence[StepSpec]) -> None:
        """Upload the hyper-parameters, in one copy, if one of them has changed.

        Those that are tensors on the device are copied there in every step. The host does not wait for them.
        """
        made_of: list[object] = []
        for spec in specs:
            made_of += spec.rule, spec.selection, spec.strength
        if len(made_of) == len(self._made_of) and all(map(is_, made_of, self._made_of)):
            return
        sources: list[tuple[Any, ...] | None] = [
            _source_of(spec) if group in self.here else () for group, spec in enumerate(specs)
        ]
        self._made_of = []
        if sources == self._sources and None not in sources:
            self._made_of = made_of
            return
        self._sources = []  # until all is done: if it fails, the next step looks at everything again
        rows: list[list[float | None]] = []  # None: a number that is on the device
        copies: list[tuple[int, int, Tensor]] = []
        for group, spec in enumerate(specs):
            rows.append([])
            if group not in self.here:
                rows[-1] = [0.0] * numbers.HYPER.value
                continue
            for column, value in enumerate(hyper_parameters(spec)):
                if isinstance(value, Tensor) and value.device.type != "cpu":
                    copies.append((group, column, value.detach()))
                    rows[-1].append(None)
                else:
                    rows[-1].append(float(value))
        self.uploads.fill("hyper", self.hyper, [[0.0 if x is None else x for x in row] for row in rows], rows)
        for group, column, value in copies:
            self.hyper[group, column].copy_(value.reshape(()), non_blocking=True)
        self._sources, self._made_of = sources, [] if None in sources else made_of

    def _upload_clocks(self, specs: Sequence[StepSpec]) -> None:
        """Upload the addresses of the clocks; and seed and step of groups whose wrapper has no clock on this device."""
        clocks = [spec.draw.clock for spec in specs]
        if self._all_have_clocks and all(map(is_, clocks, self._known_clocks)):
            return
        self._all_have_clocks, self._known_clocks = False, clocks
        addresses, own, first = [], [], self.own_clocks.data_ptr()
        for group, spec in enumerate(specs):
            clock, here = spec.draw.clock, (0, 0)
            if clock is None or clock.device != self.device:
                clock, here = None, (_signed64(spec.draw.seed), spec.draw.step)
            addresses.append(first + 16 * group if clock is None else clock.data_ptr())
            own.append(here)
        self.uploads.fill("clocks", self.clocks, addresses)
        self.uploads.fill("own clocks", self.own_clocks, own)
        self._all_have_clocks = all(clock is not None and clock.device == self.device for clock in clocks)


def _source_of(spec: StepSpec) -> tuple[Any, ...] | None:
    """The values that a group's numbers are made of; None if one of them is a tensor, whose value may have changed."""
    values = rule_numbers(spec.rule)
    for value in values:
        if type(value) is not float and isinstance(value, Tensor):
            return None
    return *values, spec.selection, spec.strength


def _signed64(x: int) -> int:
    """The int64 with the same 64 bits."""
    return x - (1 << 64) if x >= 1 << 63 else x
