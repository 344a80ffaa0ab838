"""Measures the cost of a rotation: steps beside their products, refreshes by solver and when staggered, memory."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from selective import AdaDiag, Eigenbasis, Preconditioner, SelectiveUpdate
from selective.bench.clock import HostClock, clock_of
from selective.bench.contenders import ADAMW, POLICIES
from selective.bench.shapes import SHAPES
from selective.bench.workload import Stepping, Workload
from selective.preconditioner import Shape, State
from selective.preconditioner.linalg import Precision, batches, float32_products
from selective.preconditioner.refresh import CarryName
from selective.preconditioner.solvers import WARM, SolverName
from selective.rotation.rotation import BASES
from selective.state.entries import BASIS

LONGEST_SIDE = 10_000  # the longest side of a matrix that is rotated, which leaves out embeddings and heads
REFRESH_EVERY = 10
SOLVERS: tuple[SolverName, ...] = ("cholesky", "qr", "eigh")
NEVER = 10**9  # a number of steps that no benchmark takes


@dataclass
class Line:
    """One measurement, in seconds per step, with further numbers about it."""

    name: str
    seconds: float
    facts: dict[str, float] = field(default_factory=dict)


@dataclass
class Rotations:
    """All measurements on one set of shapes."""

    shapes: str
    device: str
    elements: int
    matrices: int
    rotated: int  # the elements of these matrices
    lines: list[Line] = field(default_factory=list)
    interrupted: bool = False  # some measurements are missing

    def line(self, name: str) -> Line:
        return next(line for line in self.lines if line.name == name)


class TimedCall(Stepping):
    """A function that the clocks can time in the place of an optimizer's step."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.work = work

    def prepare(self) -> None: ...

    def step(self) -> None:
        self.work()


def is_rotated(p: Tensor) -> bool:
    return p.dim() == 2 and 2 <= min(p.shape) and max(p.shape) <= LONGEST_SIDE


def measure_rotations(
    shapes: str, *, device: str, rounds: int = 5, precisions: Sequence[Precision] = ("float32",),
    tell: Callable[[str], None] | None = None,
) -> Rotations:  # fmt: skip
    """Time AdamW's steps in rotated spaces, around torch's fused AdamW, with everything but the products in float32.

    - "dense": the fused step without a rotation, by our kernel. "products X": only the `torch.mm` products of a
      one-sided rotation, there and back, in precision X. "one-sided X": a step of `AdaDiag` between two refreshes; its
      `ratio` is the time over the sum of the other two.
    - "refresh SOLVER": the average cost for each step of a refresh of running statistics every ten steps, carrying the
      moments included, in float32; "refresh SOLVER tf32" has products in tf32. `step` is the time of a step without a
      refresh, `at_once` that of a step with one. `bases` is the share of `Eigenbasis.refresh`: new bases, and the maps
      from the old ones to them. A name that ends in "rotate" or "keep" carries moments in that way: the difference is
      the cost of the squared maps.
    - "staggered": the median step when refreshes take turns; `worst` is the longest step over the median.
    - `bytes` and `documented`: the memory that bases keep between steps, as measured and as the documentation says.

    After Ctrl-C, the measurements that were done by then are returned.
    """
    rig = _Rig(shapes, device, rounds, tell)
    try:
        _measure(rig, precisions)
    except KeyboardInterrupt:
        rig.result.interrupted = True
    return rig.result


def _measure(rig: _Rig, precisions: Sequence[Precision]) -> None:
    dense = rig.steady(None)
    rig.add("dense", dense)
    for precision in precisions:
        products = rig.products(precision)
        rig.add(f"products {precision}", products)
        space = AdaDiag(sides="one", precision=precision, refresh_every=NEVER)
        rotated = rig.steady(space)
        rig.add(f"one-sided {precision}", rotated, ratio=rotated / (dense + products), **rig.memory)
    for solver in SOLVERS:
        rig.refreshes(solver, "float32")
        if solver in WARM and "tf32" in precisions:  # moments are carried in it
            rig.refreshes(solver, "tf32")
    carries: tuple[CarryName, ...] = ("rotate", "keep")
    for carry in carries:
        for precision in precisions:
            if precision != "bfloat16":
                rig.refreshes("cholesky", precision, carry)
    space = Eigenbasis(sides="one", refresh_every=REFRESH_EVERY, stagger=True, precision="float32")
    plain, with_refresh = rig.series(space)
    every = plain + with_refresh
    middle = statistics.median(every)
    rig.add("staggered", middle, worst=max(every) / middle)


class _Rig:
    def __init__(self, shapes: str, device: str, rounds: int, tell: Callable[[str], None] | None) -> None:
        if shapes not in SHAPES:
            raise ValueError(f"shapes is {shapes!r}, must be one of {', '.join(SHAPES)}")
        self.clock: HostClock = clock_of(device)
        self.workload = Workload(SHAPES[shapes], device)
        self.rounds, self.tell = rounds, tell
        self.inside = [p for p in self.workload.params if is_rotated(p)]
        rotated = sum(p.numel() for p in self.inside)
        self.result = Rotations(shapes, device, self.workload.elements, len(self.inside), rotated)
        self.memory: dict[str, float] = {}
        self.bases = 0.0  # seconds that new bases for all matrices take

    def add(self, name: str, seconds: float, **facts: float) -> None:
        self.result.lines.append(Line(name, seconds, facts))
        if self.tell is not None:
            self.tell(f"{self.result.shapes}: {name} {1e3 * seconds:.2f} ms")

    def stepping(self, space: Preconditioner | None) -> Stepping:
        """torch's fused AdamW, dense, in this space. Embeddings, heads and vectors are not rotated."""
        self.workload.refill()
        inside = {id(p) for p in self.inside}
        outside = [p for p in self.workload.params if id(p) not in inside]
        groups: list[dict[str, Any]] = [{"params": self.inside}, {"params": outside, "preconditioner": None}]
        base: Optimizer = torch.optim.AdamW([g for g in groups if g["params"]], fused=True, **ADAMW)
        policy = POLICIES["Everything × Fixed"]
        optimizer = SelectiveUpdate(base, policy=policy, preconditioner=space, statistics=False)
        return Stepping(optimizer, self.workload)

    def steady(self, space: Preconditioner | None) -> float:
        """The median time of a step after the first basis."""
        stepping = self.stepping(space)
        stepping.warm_up(3)
        self._note_memory(stepping, space)
        times = []
        for _ in range(self.rounds):
            self.workload.fresh_gradients()
            stepping.prepare()
            times.append(self.clock.seconds(stepping, min(self.clock.most_steps, 5)))
        self._drop(stepping)
        return statistics.median(times)

    def series(self, space: Eigenbasis) -> tuple[list[float], list[float]]:
        """The times of single steps without and with a refresh, after the first round of bases."""
        stepping = self.stepping(space)
        begin = 2 * REFRESH_EVERY
        stepping.warm_up(begin)
        self._note_memory(stepping, space)
        plain: list[float] = []
        with_refresh: list[float] = []
        for step in range(begin, begin + self.rounds * REFRESH_EVERY):
            self.workload.fresh_gradients()
            stepping.prepare()
            count = len(self.inside)
            due = any(space.is_due(step, place, count) for place in range(count))
            (with_refresh if due else plain).append(self.clock.seconds(stepping, 1))
        if not space.stagger:
            self.bases = self._refresh_alone(stepping, space)
        self._drop(stepping)
        return plain, with_refresh

    def refreshes(self, solver: SolverName, precision: Precision, carry: CarryName = "squared") -> None:
        space = Eigenbasis(
            sides="one", solver=solver, refresh_every=REFRESH_EVERY, stagger=False, precision=precision, carry=carry
        )
        plain, with_refresh = self.series(space)
        at_once, step = statistics.median(with_refresh), statistics.median(plain)
        facts = {"step": step, "at_once": at_once, "bases": self.bases / REFRESH_EVERY, **self.memory}
        words = ["refresh", solver]
        words += [] if precision == "float32" else [precision]
        words += [] if carry == "squared" else [carry]
        self.add(" ".join(words), (at_once - step) / REFRESH_EVERY, **facts)

    def _refresh_alone(self, stepping: Stepping, space: Eigenbasis) -> float:
        """The median time to make new bases from copies of the state, in batches of the size that a step uses."""
        by_shape: dict[Shape, list[State]] = {}
        for p in self.inside:
            entries = stepping.optimizer.state[p].items()
            state = {k.removeprefix(BASIS): v.clone() for k, v in entries if k.startswith(BASIS)}
            by_shape.setdefault((1, p.shape[0], p.shape[1]), []).append(state)

        def run() -> None:
            for shape, states in by_shape.items():
                nothing = torch.zeros((), device=self.inside[0].device).expand(shape)
                for batch in batches(len(states), math.prod(shape), BASES):
                    space.refresh(states[batch], [nothing] * len(states[batch]))

        work = TimedCall(run)
        work.step()
        return statistics.median(self.clock.seconds(work, 1) for _ in range(self.rounds))

    def products(self, precision: Precision) -> float:
        """The median time of `torch.mm` of each matrix with a basis of its smaller side, there and back."""
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        operands = [_product(p, dtype) for p in self.inside]

        def run() -> None:
            with float32_products("tf32" if precision == "tf32" else "ieee"):
                for left, right, out in operands:
                    torch.mm(left, right, out=out)
                    torch.mm(left, right, out=out)

        work = TimedCall(run)
        work.step()
        times = [self.clock.seconds(work, 1) for _ in range(self.rounds)]
        operands.clear()
        self.clock.settle()
        return statistics.median(times)

    def _note_memory(self, stepping: Stepping, space: Preconditioner | None) -> None:
        """Note the bytes of the bases, and those documented: k² float32 numbers a matrix, or 2 k² with statistics."""
        if not isinstance(space, Eigenbasis):
            return
        times = 2 if space.statistic == "ema" else 1
        state = stepping.optimizer.state
        tensors = (v for p in self.inside for k, v in state[p].items() if k.startswith(BASIS))
        documented = sum(4 * times * min(p.shape) ** 2 for p in self.inside)
        self.memory = {"bytes": sum(value.nbytes for value in tensors), "documented": documented}

    def _drop(self, stepping: Stepping) -> None:
        del stepping.optimizer
        self.clock.settle()


def _product(p: Parameter, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = p.shape
    basis = torch.randn(min(p.shape), min(p.shape), device=p.device, dtype=dtype)
    grad = torch.randn(p.shape, device=p.device, dtype=dtype)
    left, right = (basis, grad) if rows < columns else (grad, basis)
    return left, right, torch.empty_like(grad)
