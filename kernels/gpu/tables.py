"""The tables that the kernels look up: addresses, sizes and numbers of many tensors, kept on the device between steps.

A table is uploaded when its content has changed, from pinned memory, so that the host never waits. In every step the
tensors' identities and addresses are compared, to see whether it has.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..spec import GivenRule, Item, Rule
from .device import config

# Sources of the uploads that CUDA graphs repeat at every replay. Graphs may live as long as the process.
_RECORDED: list[Tensor] = []


def upload(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as a tensor on the device, without waiting for it."""
    host = values.to(dtype) if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype, device="cpu")
    if device.type == "cpu":  # the interpreter
        return host.clone()
    pinned = host.pin_memory()
    if torch.cuda.is_current_stream_capturing():
        _RECORDED.append(pinned)
    return pinned.to(device, non_blocking=True)


def refill(target: Tensor, values: Any) -> Tensor:
    """Write numbers over a tensor on the device, which keeps its address. Returns the source of the copy.

    While a CUDA graph is captured, the copy becomes part of it and reads the source at every replay: keep it alive.
    """
    if isinstance(values, Tensor):
        host = values
    else:
        host = torch.tensor(values, dtype=target.dtype, device="cpu").reshape(target.shape)
    if target.device.type != "cpu":
        host = host.pin_memory()
    target.copy_(host, non_blocking=True)
    return host


def state_columns(item: Item, rule: Rule) -> list[Tensor | None]:
    """The four state columns of the pointer table: the tensors that the rule reads, in its order, then None."""
    columns = [item.state.get(name) for name in rule.state_names]
    return columns + [None] * (4 - len(columns))


def is_in_place(item: Item, rule: Rule) -> bool:
    """True if an update is given that starts from the parameter's own memory and outlives a write to it."""
    if not isinstance(rule, GivenRule):
        return False
    at, given = item.param.data_ptr(), item.state["update"].data_ptr()
    apart = given + item.state["update"].nbytes <= at or at + item.param.nbytes <= given
    return apart and item.state["start"].data_ptr() == at


def is_dense(tensor: Tensor) -> bool:
    """True if a tensor fills its memory without gaps and overlaps, in some order of its dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def work(counts: Sequence[int], device: torch.device) -> tuple[Tensor, list[int]]:
    """(tensor, part) for each of a launch's programs, int32 [programs, 2], and each tensor's first program.

    `counts` has the number of programs of each tensor.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _work.__wrapped__(tuple(counts), device)  # a graph's replays fill it, so nothing else may share it
    return _work(tuple(counts), device)


@functools.lru_cache(maxsize=64)  # because captures that make their items anew in every step ask for the same again
def _work(counts: tuple[int, ...], device: torch.device) -> tuple[Tensor, list[int]]:
    sizes = torch.tensor(counts, dtype=torch.int64, device="cpu")
    ends = sizes.cumsum(0)
    tensors = torch.repeat_interleave(torch.arange(len(counts), device="cpu"), sizes)
    parts = torch.arange(int(sizes.sum()), device="cpu") - (ends - sizes)[tensors]
    both = torch.stack([tensors, parts], 1).to(torch.int32)
    return upload(both, torch.int32, device), (ends - sizes).tolist()


class Uploads:
    """The tables of one device that are uploaded when their content has changed, by name."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.uploaded: dict[str, Any] = {}  # the content of each table that was uploaded last
        self.kept: list[Tensor] = []  # sources of copies that became part of a CUDA graph
        self.recorded: dict[str, Tensor] = {}  # the same by the name of the table that `fill` filled from them

    def fill(self, name: str, table: Tensor, values: Any, key: Any = None) -> None:
        """Upload a whole table, unless its content is the same already: `key`, or else `values`, is compared by ==."""
        key = values if key is None else key
        if self.uploaded.get(name) == key:
            return
        source = self.keep(refill(table, values), name)
        self.uploaded[name] = key
        if name in self.recorded and self.recorded[name] is not source:
            self.recorded[name].copy_(source)  # a graph uploads from there: it gets numbers that were scheduled since

    def keep(self, source: Tensor, name: str | None = None) -> Tensor:
        """Keep the source of a copy alive if it became part of a CUDA graph. Returns the source."""
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self.kept.append(source)
            if name is not None:
                self.recorded[name] = source
        return source


class Tables:
    """The tables of one batch, which have a row for each of its tensors."""

    def __init__(self, tensors: int, device: torch.device) -> None:
        self.tensors, self.uploads = tensors, Uploads(device)

        def empty(width: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(tensors, width, dtype=dtype, device=device)

        self.pointers = empty(config.COLUMNS.value, torch.int64)
        self.numbers = empty(config.NUMBERS.value, torch.float32)
        self.ranks = empty(config.RANKS.value, torch.int64)
        self.facts = empty(config.FACTS.value, torch.int64)
        self.keys = empty(config.KEYS.value, torch.int32)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_two(x: int) -> int:
    """The smallest power of two that is x or more."""
    return 1 << max(math.ceil(math.log2(max(x, 1))), 0)
