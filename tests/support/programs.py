"""Random programs over an optimizer, for hypothesis: its parts, and a sequence of operations on it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import optimi
import pytorch_optimizer
import torch
from hypothesis import strategies as st
from torch import Tensor
from whole_bytes import through_a_file

from selective import (
    MGUP,
    AdaDiag,
    AlphaConsistency,
    Cautious,
    CautiousMGUP,
    Dense,
    Eigenbasis,
    Fixed,
    Grams,
    Magma,
    Policy,
    RandomMask,
    SelectiveUpdate,
    SkipUpdate,
    Soap,
    TopK,
)  # fmt: skip

SHAPES = [(), (0,), (0, 3), (1, 5), (5, 1), (7,), (4, 3), (3, 4), (2, 3, 4), (6, 6), (2, 2, 2, 2)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
t, po = torch.optim, pytorch_optimizer
# name -> (make, keeps a first moment of the gradient)
BASES: dict[str, tuple[Callable[..., Any], bool]] = {
    "adamw": (lambda g: t.AdamW(g, lr=1e-2, eps=1e-4, weight_decay=0.1), True),
    "adamw-amsgrad": (lambda g: t.AdamW(g, lr=1e-2, eps=1e-4, amsgrad=True), True),
    "adamw-maximize": (lambda g: t.AdamW(g, lr=1e-2, eps=1e-4, maximize=True, foreach=True), True),
    "adam-coupled": (lambda g: t.Adam(g, lr=1e-2, eps=1e-4, weight_decay=0.1), True),
    "sgd": (lambda g: t.SGD(g, lr=1e-2), False),
    "sgd-momentum": (lambda g: t.SGD(g, lr=1e-2, momentum=0.9, weight_decay=0.05), True),
    "sgd-nesterov": (lambda g: t.SGD(g, lr=1e-2, momentum=0.9, nesterov=True), True),
    "sgd-dampening": (lambda g: t.SGD(g, lr=1e-2, momentum=0.9, dampening=0.3, maximize=True), True),
    "lion": (lambda g: po.Lion(g, lr=1e-2, weight_decay=0.1), True),
    "nadam": (lambda g: t.NAdam(g, lr=1e-2, eps=1e-4), True),
    "radam": (lambda g: t.RAdam(g, lr=1e-2, eps=1e-4), True),
    "adafactor": (lambda g: t.Adafactor(g, lr=1e-2), False),
    "rmsprop": (lambda g: t.RMSprop(g, lr=1e-3, eps=1e-4), False),
    "optimi-adamw": (lambda g: optimi.AdamW(g, lr=1e-2, eps=1e-4), True),
}
NOT_COPIED = ("lion",)  # after deepcopy or pickle, a plain one can't step either: it loses an attribute
POLICIES: list[Policy] = [
    Dense(), MGUP(), CautiousMGUP(), Cautious(), Grams(), Magma(), SkipUpdate(), RandomMask(), AlphaConsistency(),
    Policy(selection=TopK(fraction=0.3), strength=Fixed()),
]  # fmt: skip
PRECONDITIONERS: list[Any] = [
    None, None, AdaDiag(refresh_every=2), AdaDiag(sides="two", refresh_every=3), Soap(refresh_every=2),
    Eigenbasis(refresh_every=1, solver="eigh"), Eigenbasis(refresh_every=2, stagger=False),
]  # fmt: skip


@dataclass
class Made:
    """The optimizer that a program begins with. `make()` builds the same again."""

    shapes: list[tuple[int, ...]]
    dtypes: list[torch.dtype]
    transposed: list[bool]
    base: str
    policies: list[Policy]  # those of two groups
    cut: int  # the number of parameters in the first group
    preconditioner: Any
    options: dict[str, Any] = field(default_factory=dict)

    def make(self) -> SelectiveUpdate:
        params = [self.parameter(i) for i in range(len(self.shapes))]
        options = {**self.options, "preconditioner": self.preconditioner}
        if not self.capture_is_right():
            options["capture"] = "auto"
        return SelectiveUpdate(self.plain(params, selective=True), policy=self.policies[0], **options)

    def capture_is_right(self) -> bool:
        """True if the drawn capture suits the base. Another is refused at once, or when a dense group is masked."""
        try:
            SelectiveUpdate(self.plain(), policy=RandomMask(), preconditioner=self.preconditioner, **self.options)
        except ValueError as error:
            if not str(error).startswith("SelectiveUpdate: capture="):
                raise
            return False
        return True

    def plain(self, params: list[torch.nn.Parameter] | None = None, selective: bool = False) -> torch.optim.Optimizer:
        params = [self.parameter(i) for i in range(len(self.shapes))] if params is None else params
        own = {"policy": self.policies[1]} if selective else {}
        groups = [{"params": params[: self.cut]}, {"params": params[self.cut :], **own}]
        return BASES[self.base][0]([group for group in groups if group["params"]])

    def parameter(self, index: int) -> torch.nn.Parameter:
        value = values(self.shapes[index], index).to(self.dtypes[index])
        return torch.nn.Parameter(value.mT.contiguous().mT if self.transposed[index] else value)


def values(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def beginnings(draw: st.DrawFn) -> Made:
    base = draw(st.sampled_from(sorted(BASES)))
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4))
    if base == "adafactor":  # torch's own makes NaN of an empty tensor's mean, and refuses 0-d tensors
        shapes = [shape if shape and 0 not in shape else (4, 3) for shape in shapes]
    one = draw(st.sampled_from(DTYPES))
    dtypes = [draw(st.sampled_from(DTYPES)) for _ in shapes] if draw(st.booleans()) else [one] * len(shapes)
    transposed = [len(shape) >= 2 and 0 not in shape and draw(st.booleans()) for shape in shapes]
    policies = [draw(st.sampled_from(POLICIES)) for _ in range(2)]
    options: dict[str, Any] = {
        "capture": draw(st.sampled_from(["auto", "auto", "fused", "scratch", "delta"])),
        "seed": draw(st.sampled_from([0, 7, 2**63 - 1])),
        "matrix_view": draw(st.sampled_from(["matrices", "conv", "experts"])),
        "mask_space": draw(st.sampled_from(["rotated", "rotated", "original"])),
        "stochastic_rounding": draw(st.booleans()),
        "statistics": draw(st.booleans()),
    }
    if not BASES[base][1] or draw(st.integers(0, 3)) == 0:
        options["momentum_beta"] = 0.9
    cut = draw(st.integers(1, len(shapes)))
    return Made(shapes, dtypes, transposed, base, policies, cut, draw(st.sampled_from(PRECONDITIONERS)), options)


def params_of(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def give(optimizer: torch.optim.Optimizer, step: int, missing: int) -> None:
    """Set the gradients of a step. If bit i of `missing` is set, the i-th parameter gets none."""
    for index, p in enumerate(params_of(optimizer)):
        p.grad = None if missing >> index & 1 else values(tuple(p.shape), 1000 * step + index).to(p.dtype)


@dataclass
class Running:
    """An optimizer in mid-program, and the changes that let a fresh one load its checkpoint."""

    made: Made
    optimizer: SelectiveUpdate
    structure: list[Callable[[SelectiveUpdate], None]] = field(default_factory=list)

    def restructure(self, change: Callable[[SelectiveUpdate], None]) -> None:
        change(self.optimizer)
        self.structure.append(change)

    def reloaded(self) -> Running:
        """A fresh one, with parameters and checkpoint as they come out of a file. It has no gradients."""
        params, state = through_a_file(([p.detach() for p in params_of(self.optimizer)], self.optimizer.state_dict()))
        fresh = self.made.make()
        for change in self.structure:
            change(fresh)
        with torch.no_grad():
            for p, value in zip(params_of(fresh), params, strict=True):
                p.copy_(value)
        fresh.load_state_dict(state)
        return Running(self.made, fresh, list(self.structure))

    def copied(self, way: str) -> Running:
        copies = {"deepcopy": copy.deepcopy, "pickle": lambda value: pickle.loads(pickle.dumps(value))}
        return Running(self.made, copies[way](self.optimizer), list(self.structure))


def added(shape: tuple[int, ...], dtype: torch.dtype, policy: Policy) -> Callable[[SelectiveUpdate], None]:
    def change(optimizer: SelectiveUpdate) -> None:
        p = torch.nn.Parameter(values(shape, 77).to(dtype))
        optimizer.add_param_group({"params": [p], "policy": policy})

    return change


def switched(number: int, policy: Policy) -> Callable[[SelectiveUpdate], None]:
    def change(optimizer: SelectiveUpdate) -> None:
        optimizer.policy_groups[number % len(optimizer.policy_groups)].policy = policy

    return change


operations = st.one_of(
    st.tuples(st.just("step"), st.sampled_from([0, 0, 0, 1, 2, 5, 63])),
    st.tuples(st.just("step"), st.sampled_from([0, 0, 0, 1, 2, 5, 63])),
    st.tuples(st.just("reload")),
    st.tuples(st.just("copy"), st.sampled_from(["deepcopy", "pickle"])),
    st.tuples(st.just("add"), st.sampled_from([(4, 3), (6,), (2, 3, 4)]), st.sampled_from(POLICIES)),
    st.tuples(st.just("switch"), st.integers(0, 2), st.sampled_from(POLICIES)),
    st.tuples(st.just("edit"), st.sampled_from([0.5, 2.0])),
    st.tuples(st.just("schedule")),
    st.tuples(st.just("zero_grad"), st.booleans()),
    st.tuples(st.just("read")),
)
programs = st.lists(operations, min_size=2, max_size=12)
