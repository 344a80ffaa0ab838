"""Stacks: the entries of many bases, which lie one after the other in memory, so that one operation reaches them all.

Note [stacks]: bases and Gram matrices of all parameters of one shape are one tensor [count * batch, n, n], and a
counter is one tensor [count] for all parameters of a group. An entry of a parameter's state is a tensor over its part
of that memory. It is not a view in torch's sense: its storage begins at the entry and has the entry's bytes. So what
saves one entry does not save the whole stack with it, and a copy of an entry is an entry of its own.

Whoever writes into an entry writes into the stack. Whoever replaces an entry, or gives it other memory, leaves the
stack behind. That is found by the identity of entries and by their addresses, and then the stacks are made anew. Each
is made by itself, and the tensors that it replaces are freed before the next: at most one stack of `STACKED` elements
is there twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import dlpack

from selective.kernels.lasting import lasting
from selective.preconditioner import Shape, State
from selective.preconditioner.linalg import batches, copy_to

STACKED = 2**27
"""Elements of the matrices, or of their largest entries, that are stacked together: 512 MiB."""

Table = MutableMapping[str, Tensor]  # the entries of one parameter


def over_memory_of(view: Tensor) -> Tensor:
    """Return a tensor over the memory of `view`, whose storage begins with it and has its bytes alone.

    The memory is kept until the last tensor over it is gone.
    """
    return dlpack.from_dlpack(dlpack.to_dlpack(view))  # pyright: ignore[reportPrivateImportUsage]


class Form(NamedTuple):
    """The properties that are common to parameters whose entries are stacked together."""

    shape: Shape  # of this rank's part of the matrices
    whole: Shape  # of the matrices
    size: int  # see `size_of`
    cut: int = 0  # another number for what is cut over ranks in another way


def size_of(whole: Shape, state: Iterable[Tensor]) -> int:
    """Return the elements of a parameter's matrices, or of its largest entry if that has more: the same on all ranks.

    By it parameters are divided that are stacked or rotated together. Ranks add up the sums of such a part together. So
    the division follows from these parameters alone, and not from others, which another rank may not have.
    """
    return max([math.prod(whole), *(entry.numel() for entry in state)])


@dataclass
class Bucket:
    """Parameters of one form, whose entries are stacked in this order.

    `state` has the stacks by name: [count * d, ...] of entries [d, ...], and [count] of single numbers.
    """

    indices: list[int]  # of the parameters
    start: int  # the place of the first one among all that are stacked
    form: Form
    state: State = field(default_factory=dict)

    @property
    def shape(self) -> Shape:
        return self.form.shape

    @property
    def part(self) -> slice:
        """The places of these parameters among all that are stacked."""
        return slice(self.start, self.start + len(self.indices))

    def run(self, first: int, stop: int) -> Bucket:
        """Return the bucket of the parameters from `first` to before `stop`, on parts of the same stacks."""
        count = len(self.indices)
        if (first, stop) == (0, count):
            return self
        state = {name: x[len(x) // count * first : len(x) // count * stop] for name, x in self.state.items()}
        return Bucket(self.indices[first:stop], self.start + first, self.form, state)


class Stacks:
    """The stacked entries of the parameters of one group, on one device.

    `tables` have the entries of each parameter. Those whose names begin with `prefix` are the preconditioner's state.
    `steps` and `not_finite` name two counters. The stacks of single numbers span all buckets, in the order of `order`.
    `on_ranks` is True if the parameters are DTensors.
    """

    def __init__(
        self,
        tables: Sequence[Table],
        forms: Sequence[Form],
        prefix: str,
        steps: str,
        not_finite: str,
        on_ranks: bool = False,
    ) -> None:
        self.buckets, self.on_ranks = _buckets(forms), on_ranks
        self.order = [i for bucket in self.buckets for i in bucket.indices]
        self.wholes = [forms[i].whole for i in self.order]
        self.names = [[n for n in table if n.startswith(prefix) or n in (steps, not_finite)] for table in tables]
        ordered, numbers = [tables[i] for i in self.order], dict[str, Tensor]()
        with lasting():
            for name in self.names[0]:
                if tables[0][name].dim() == 0:
                    numbers[name] = _stacked(name, ordered)
            for bucket in self.buckets:
                for name in self.names[bucket.indices[0]]:
                    if name not in numbers:
                        bucket.state[name.removeprefix(prefix)] = _stacked(name, ordered[bucket.part])
        self.steps, self.not_finite = numbers.pop(steps), numbers.pop(not_finite)
        self.numbers = {name.removeprefix(prefix): number for name, number in numbers.items()}
        for bucket in self.buckets:
            bucket.state.update({name: number[bucket.part] for name, number in self.numbers.items()})
        self.entries = self._entries(tables)
        self.addresses = [entry.data_ptr() for entry in self.entries]

    def steps_taken(self) -> list[int]:
        """Return the number of steps of each parameter, by index; they are counted on the host."""
        steps = [0] * len(self.order)
        for index, count in zip(self.order, self.steps.tolist(), strict=True):
            steps[index] = count
        return steps

    def _entries(self, tables: Sequence[Table]) -> list[Tensor]:
        return [table[name] for table, names in zip(tables, self.names, strict=True) for name in names]

    def are_of(self, tables: Sequence[Table]) -> bool:
        """True if no entry of these tables was replaced."""
        if any(name not in table for table, names in zip(tables, self.names, strict=True) for name in names):
            return False
        entries = self._entries(tables)
        return len(entries) == len(self.entries) and all(map(is_, entries, self.entries))

    def are_in_place(self) -> bool:
        """True if each entry has the memory that it had when it was stacked."""
        return [*map(Tensor.data_ptr, self.entries)] == self.addresses


def _buckets(forms: Sequence[Form]) -> list[Bucket]:
    """Divide parameters into buckets of at most `STACKED` elements, by `size_of`."""
    by_form: dict[Form, list[int]] = {}
    for index, form in enumerate(forms):
        by_form.setdefault(form, []).append(index)
    buckets: list[Bucket] = []
    start = 0
    for form, indices in by_form.items():
        for part in batches(len(indices), form.size, STACKED):
            buckets.append(Bucket(indices[part], start, form))
            start += len(indices[part])
    return buckets


def _stacked(name: str, tables: Sequence[Table]) -> Tensor:
    """Move the entries `name` of all tables into one stack, and return it; the tables get tensors over its memory."""
    entries = [table[name] for table in tables]
    first = entries[0]
    rows = first.shape[0] if first.dim() else 1
    stack = torch.empty((rows * len(entries), *first.shape[1:]), dtype=first.dtype, device=first.device)
    parts = stack.split(rows) if first.dim() else stack.unbind()
    copy_to(parts, entries)
    for table, part in zip(tables, parts, strict=True):
        table[name] = over_memory_of(part)
    return stack
