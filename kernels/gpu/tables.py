"""What the kernels look up: addresses, sizes and numbers of many tensors, kept on the device between steps.

A table is uploaded when what it says has changed, from pinned memory, so that the host never waits. Whether it has is
seen by the tensors' identities and addresses in every step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..spec import AdamRule, GivenRule, Item, LionRule, Rule, SGDRule
from .device import config

STATE: dict[type, tuple[str, ...]] = {
    AdamRule: ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    SGDRule: ("momentum_buffer",),
    LionRule: ("exp_avg",),
    GivenRule: ("update", "start", "momentum", "previous_momentum"),
}


_RECORDED: list[Tensor] = []  # what the graphs of this process upload from at every replay: they may live as long


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
    """Write numbers over a tensor on the device, which keeps its address; returns what it was copied from.

    While a CUDA graph is captured, the copy becomes part of it and reads that source at every replay: keep it alive.
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
    """The tensors of an item's state that the rule reads, in the order of the pointer table's columns; four of them."""
    names: Iterable[str] = STATE[type(rule)]
    if isinstance(rule, AdamRule) and not rule.amsgrad:
        names = ("exp_avg", "exp_avg_sq")
    if isinstance(rule, SGDRule) and rule.momentum == 0:
        names = ()
    found = [item.state.get(name) for name in names]
    return found + [None] * (4 - len(found))


def is_in_place(item: Item, rule: Rule) -> bool:
    """Whether a given update starts from the parameter's own memory, and outlives a write to it."""
    if not isinstance(rule, GivenRule):
        return False
    at, given = item.param.data_ptr(), item.state["update"].data_ptr()
    apart = given + item.state["update"].nbytes <= at or at + item.param.nbytes <= given
    return apart and item.state["start"].data_ptr() == at


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor fills its memory without gaps and overlaps, in some order of its dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def work(counts: Sequence[int], device: torch.device) -> tuple[Tensor, list[int]]:
    """(tensor, part) for each of a launch's programs, int32 [programs, 2]; and where each tensor's programs begin."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _work.__wrapped__(tuple(counts), device)  # filled by a graph's replays only: nobody else's
    return _work(tuple(counts), device)


@functools.lru_cache(maxsize=64)  # captures that make their items anew in every step ask for the same again
def _work(counts: tuple[int, ...], device: torch.device) -> tuple[Tensor, list[int]]:
    sizes = torch.tensor(counts, dtype=torch.int64, device="cpu")
    ends = sizes.cumsum(0)
    tensors = torch.repeat_interleave(torch.arange(len(counts), device="cpu"), sizes)
    parts = torch.arange(int(sizes.sum()), device="cpu") - (ends - sizes)[tensors]
    both = torch.stack([tensors, parts], 1).to(torch.int32)
    return upload(both, torch.int32, device), (ends - sizes).tolist()


class Tables:
    """The tables of one batch: tensors of one device that one compiled kernel can step together."""

    def __init__(self, tensors: int, device: torch.device) -> None:
        self.device, self.tensors = device, tensors

        def empty(width: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(tensors, width, dtype=dtype, device=device)

        self.pointers = empty(config.COLUMNS.value, torch.int64)
        self.numbers = empty(config.NUMBERS.value, torch.float32)
        self.ranks = empty(config.RANKS.value, torch.int64)
        self.facts = empty(config.FACTS.value, torch.int64)
        self.keys = empty(config.KEYS.value, torch.int32)
        self.hyper = torch.zeros(20, dtype=torch.float64, device=device)
        self.clock = torch.zeros(2, dtype=torch.int64, device=device)
        self.said: dict[str, Any] = {}  # what was uploaded last, by table
        self.kept: list[Tensor] = []  # sources of copies that became part of a CUDA graph
        self.recorded: dict[str, Tensor] = {}  # ... by the table that `say` filled from them

    def say(self, name: str, table: Tensor, values: Any, key: Any = None) -> None:
        """Upload a whole table, unless it says so already: `key`, or else `values`, is compared with ==."""
        key = values if key is None else key
        if self.said.get(name) == key:
            return
        source = self.keep(refill(table, values), name)
        self.said[name] = key
        if name in self.recorded and self.recorded[name] is not source:
            self.recorded[name].copy_(source)  # what a graph uploads at every replay: numbers that were scheduled since

    def keep(self, source: Tensor, name: str | None = None) -> Tensor:
        """Keep what a copy that became part of a CUDA graph will be read from again; returns it."""
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self.kept.append(source)
            if name is not None:
                self.recorded[name] = source
        return source


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(x: int) -> int:
    """The smallest power of two that is x or more."""
    return 1 << max(math.ceil(math.log2(max(x, 1))), 0)
