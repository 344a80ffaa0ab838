"""Eigenbasis: rotates gradients into the eigenvectors of their Gram matrices, on one side or on both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from inspect import get_annotations
from itertools import takewhile
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from selective.preconditioner import schedule, shards
from selective.preconditioner.base import Carry, LargeSide, Preconditioner, Refreshed, Shape, State
from selective.preconditioner.gram import Side, Sides, observe, rotated_sides, sides_asked_for
from selective.preconditioner.linalg import Precision, batches, in_precision, per_matrix, stack, stacked_at_once, zero
from selective.preconditioner.proportion import RATIO, Limits
from selective.preconditioner.refresh import COUNTS, CarryName, refresh
from selective.preconditioner.solvers import SolverName


class Eigenbasis(Preconditioner):
    """Rotate gradients G to PᵀG, GQ or PᵀGQ, where P and Q are eigenvectors of Gram matrices of the rows and columns.

    Sources: SOAP, arXiv 2409.11321; AdaDiag, arXiv 2502.07488. `Soap` and `AdaDiag` are this class with the papers'
    settings, and say how they differ from the papers. Matrices with less than two rows or columns are not rotated, and
    neither are sides that are too long (`max_dim`) or out of proportion (`max_state_ratio`). Each default is explained
    beside its field. Before a parameter's first refresh, P and Q are the identity.

    The state of a matrix is float32, and has n² elements for each rotated side of length n, or twice that with
    `statistic="ema"`. A refresh takes O(n³) operations, with a factor that depends on the `solver`. A step takes a
    product with an n × n matrix for each side, for the gradient and again for the update.

    Faults: a Gram matrix with NaN or infinity reaches no solver, and its statistics and basis stay as they are
    (`skipped`). If a solver raises, or its result is not orthogonal, it is tried again in float64 (`float64`), and then
    eigh in float64 on the CPU (`cpu`). If that fails too, the old basis stays, bit for bit, with a warning (`kept`).
    `report()` has these counts.

    Only `refresh` waits for the device: once in 512 MiB of matrices (1 GiB on a GPU of 64 GiB or more), and inside
    torch's eigh and svd.

    Raises:
        ValueError: a field is out of its range, or `skip_first_step` has no effect with the other fields.
    """

    sides: Sides = "two"
    """The sides that are rotated: the gradient's "rows" (P), its "columns" (Q), both ("two"), the smaller "one" (by the
    shape alone; of a square matrix the columns), or the one that is whole on each rank ("unsharded": the columns,
    unless they are sharded). Both is the default because it has measured better than one. One side takes half the time
    and less memory."""
    statistic: Literal["gradient", "ema"] = "ema"
    """The matrices that are diagonalised: Gram matrices of the "gradient" in the step of the refresh, or their running
    averages ("ema") up to the step before. Running averages are the default because one gradient is a noisy estimate of
    the covariance, often of low rank, and has measured worse."""
    beta: float = Field(default=0.95, ge=0, lt=1)
    """Of the running averages: A ← β A + (1 − β) GGᵀ after each step. The default is SOAP's 0.95, a memory of 20
    steps."""
    refresh_every: int = Field(default=10, ge=1)
    """Steps from one refresh to the next. The default is SOAP's 10. With "eigh" or "svd", 50 to 500 keep the cost
    small."""
    start_step: int = Field(default=0, ge=0)
    """Steps before the first refresh. 0 is as soon as possible, which with "ema" is after the first gradient."""
    skip_first_step: bool = False
    """True: rotated parameters do not move in the first step, so that no step is taken in an unrotated space, as in
    SOAP. It is off by default because a step in the unrotated space is a good step of the base."""
    stagger: schedule.Stagger = False
    """False: all parameters are refreshed in the same step. That takes the least time in sum, because many matrices
    together fill a GPU, and the host waits for the device once. True: refreshes are spread evenly over `refresh_every`
    steps, and the first ones over ten steps, so that no step pays for all. Parameters are counted and not weighed by
    size: a much larger one makes its step longer. "shapes": all matrices of one shape in a group are refreshed in the
    same step, and shapes take turns."""
    solver: SolverName = "cholesky"
    """The method. "eigh" and "svd" start from scratch and are exact; with the statistic "gradient", "svd" is that of
    the gradient itself. "qr" and "cholesky" take one step of subspace iteration from the old basis, which is enough for
    averages that move slowly; the first basis is made by eigh. "cholesky" spans the same spaces as "qr" with more
    arithmetic, but of a kind that is fast on GPUs. On a CPU "eigh" takes no longer than either."""
    carry: CarryName = "squared"
    """The way in which the base's moments are carried into the new basis. "squared": first moments by the maps from
    basis to basis, exactly except for rounding (`precision`), and second moments by the squares of these maps. So no
    second moment is too small for its first moment, and no step is larger than the base's own could be, also on sparse
    gradients. "rotate": first moments by the maps, while second moments stay with their columns, which "qr" and
    "cholesky" sort by eigenvalue. This is SOAP's way, and it diverges on one-hot inputs. "keep": moments are not
    carried, and columns are not sorted."""
    max_dim: int = Field(default=10_000, ge=2)
    """A longer side is not rotated; with "one", no side is if the smaller one is longer. The default is SOAP's, with
    which a basis has at most 400 MB."""
    max_state_ratio: float | None = Field(default=RATIO, gt=0)
    """A side is not rotated if its state has more elements than this many times the matrix: n² elements for a side of
    length n, or 2n² with "ema". None is no limit. The default rotates every matrix of an ordinary transformer on both
    sides. It leaves out the long side of adapters, of thin and of flat matrices: for an adapter of 8 × 4,096 that side
    keeps 134 MB, 1,024 times the adapter, and the other side 512 bytes. A warning says so if a higher limit rotates
    such a side. Sharded matrices are judged as wholes. It is part of a run: checkpoints have it, and those from before
    there was a limit go on without one."""
    precision: Precision = "tf32"
    """The precision of the products with gradients and updates in each step: "float32", or "tf32" or "bfloat16"
    (factors and results are rounded to 8 bits), which are 4 to 8 times faster on a GPU. With these two, moments are
    carried in TF32. Statistics and factorisations are in float32 or better, whatever torch's flags say. The default is
    "tf32", which is float32 on most CPUs. With the statistic "gradient" it is "float32", because `floor` is the size
    of float32's rounding noise."""
    floor: float = Field(default=16.0, ge=0)
    """With the statistic "gradient", in the step of a refresh: elements of the rotated gradient below floor · eps · σ₁
    are set to 0. There the gradient is diagonal up to rounding (or has orthogonal rows, if one side is rotated), and
    Adam's normalisation would turn rounding noise into full steps. For 16 to 512 rows, steps from products in float32
    and in float64 differed by 30 to 95% without a floor, by up to 20% with 8, and by up to 6% with 16. 0 turns it
    off."""

    gather_up_to: int = Field(default=2**26, ge=0)
    """The most elements of a sharded matrix (DTensor) that is gathered in every step, because a side is rotated that is
    not whole on each rank. Larger ones are left to the base. With 0, or with sides="unsharded", no matrix is gathered.
    2**26 is a matrix of 8,192 rows and columns, 256 MiB that are sent two or three times a step."""

    @model_validator(mode="after")
    def _one_gradient_is_rotated_in_float32(self) -> Eigenbasis:
        if self._has_other_precision() and "precision" not in self.model_fields_set:
            object.__setattr__(self, "precision", "float32")  # it was not written, and is not printed
        return self

    @model_validator(mode="after")
    def _first_step_has_a_reason(self) -> Eigenbasis:
        if self.skip_first_step and self.statistic == "gradient":
            raise ValueError(
                "skip_first_step=True waits for a first average, and with statistic='gradient' the first step has its "
                "basis already: leave skip_first_step out, or take statistic='ema'"
            )
        if self.skip_first_step and self.start_step > 1:
            raise ValueError(
                f"skip_first_step=True gains nothing with start_step={self.start_step}, as the steps until then are "
                "not rotated: leave one of the two out"
            )
        return self

    def as_if_written(self) -> None:
        super().as_if_written()
        if self._has_other_precision():
            change = self.model_fields_set.discard if self.precision == "float32" else self.model_fields_set.add
            change("precision")

    def _has_other_precision(self) -> bool:
        """True if the default of `precision` is float32: with one gradient as statistic, unless a class has its own."""
        classes = takewhile(lambda c: c is not Eigenbasis, type(self).__mro__)
        return self.statistic == "gradient" and not any("precision" in get_annotations(c) for c in classes)

    _saved_without: ClassVar[dict[str, Any]] = {"max_state_ratio": None}

    def sides_of(self, shape: Shape) -> tuple[Side, ...]:
        """Return the sides that are rotated of matrices of this shape (batch, rows, columns)."""
        return rotated_sides(self.sides, shape, self._limits())

    def takes(self, shape: Shape) -> bool:
        return bool(self.sides_of(shape))

    def left_out(self, shape: Shape) -> list[LargeSide]:
        sides = (self._limits().left_out(side, shape) for side in sides_asked_for(self.sides, shape))
        return [side for side in sides if side is not None]

    def oversized(self, shape: Shape) -> list[LargeSide]:
        sides = (self._limits().oversized(side, shape) for side in self.sides_of(shape))
        return [side for side in sides if side is not None]

    def _limits(self) -> Limits:
        return Limits(self.max_dim, self.max_state_ratio, kept=2 if self.statistic == "ema" else 1)

    def init_state(self, like: Tensor) -> State:
        batch, rows, columns = like.shape
        sides = self.sides_of((batch, rows, columns))
        lengths = {"rows": rows, "columns": columns}
        state: State = {}
        for side in sides:
            n = lengths[side]
            state[f"{side}_basis"] = torch.eye(n, dtype=torch.float32, device=like.device).repeat(batch, 1, 1)
            if self.statistic == "ema":
                state[f"{side}_gram"] = torch.zeros(batch, n, n, dtype=torch.float32, device=like.device)
        if sides and self.statistic == "gradient":
            # elements of a rotated gradient below it are set to 0; made without a floor too, which a user may set later
            state["noise"] = torch.zeros(batch, dtype=torch.float32, device=like.device)
        # On the CPU, because the host has to know if a basis is the first one, without waiting for the device.
        state["refreshes"] = torch.zeros((), dtype=torch.int64, device="cpu")
        for name in COUNTS:
            state[name] = torch.zeros((), dtype=torch.int64, device=like.device)
        return state

    def is_due(self, steps: int, place: int, count: int) -> bool:
        start = max(self.start_step, 1) if self.statistic == "ema" else self.start_step
        every, stagger = self.refresh_every, bool(self.stagger)
        return schedule.is_due(steps, place, count, start=start, every=every, stagger=stagger)

    def turns_of(self) -> Literal["parameters", "shapes"]:
        return "shapes" if self.stagger == "shapes" else "parameters"

    def is_overdue(self, state: State, steps: int) -> bool:
        # A first gradient of zeros (LoRA's A, an expert without tokens) or one that is not finite gives no basis, and
        # the next refresh may be 200 steps away. It is tried again after 1, 2, 4, 8, ... steps: some gradients stay
        # zeros.
        late = self.statistic == "gradient" and steps > self.start_step and steps & (steps - 1) == 0
        return late and not int(state["refreshes"])

    def observes(self) -> bool:
        return self.statistic == "ema"

    def stands_still(self, steps: int) -> bool:
        return self.skip_first_step and steps == 0

    def refreshes_from_gradients(self) -> bool:
        return self.statistic == "gradient"

    def moves_moments(self) -> bool:
        return self.carry != "keep" or type(self).refresh is not Eigenbasis.refresh

    def refresh_writes(self, name: str) -> bool:
        return not name.endswith("_gram") or type(self).refresh is not Eigenbasis.refresh

    def refresh(self, states: Sequence[State], grads: Sequence[Tensor]) -> list[Carry | None]:
        if not states:
            return []
        return refresh(self, shards.side_of(states[0]), states, grads)

    def observe(self, states: Sequence[State], grads: Sequence[Tensor]) -> None:
        if not states:
            return
        noise = [state["noise"] for state in states if "noise" in state]
        if noise:
            zero(noise)
        if self.statistic == "ema":
            observe(shards.side_of(states[0]), states, grads, self.beta)

    def project_in(self, states: Sequence[State], xs: Sequence[Tensor]) -> list[Tensor]:
        return self._project(states, xs, into=True)

    def itemsize(self) -> int:
        return 2 if self.precision == "bfloat16" else 4

    def denoise(self, states: Sequence[State], rotated: Sequence[Tensor]) -> list[Tensor]:
        for state, x in zip(states, rotated, strict=True):
            if self.floor and "noise" in state:
                x.masked_fill_(x.abs() < per_matrix(state["noise"]), 0)
        return list(rotated)

    def project_out(self, states: Sequence[State], xs: Sequence[Tensor]) -> list[Tensor]:
        return self._project(states, xs, into=False)

    def carries_in(self) -> Literal["float32", "tf32"]:
        return "float32" if self.precision == "float32" else "tf32"

    def on_shards(self, shape: Shape, whole: frozenset[Side]) -> Preconditioner | str:
        sides = shards.sides_on_shards(self.sides, whole)
        return shards.why_not(sides, shape, self._limits(), whole) or self.model_copy(update={"sides": sides})

    def gathers(self, shape: Shape) -> bool:
        return self.sides != "unsharded" and math.prod(shape) <= self.gather_up_to

    def is_part(self, name: str) -> bool:
        return name.endswith("_gram")

    def refresh_parts(self, states: Sequence[State], grads: Sequence[Tensor]) -> list[Tensor]:
        return shards.parts(self.statistic, states, grads)

    def refresh_from(self, states: Sequence[State], sums: Sequence[Tensor]) -> list[Refreshed]:
        return shards.refresh_from(shards.FromGrams(self.solver, self.carry, self.floor), states, sums)

    def carries_from(
        self, old: Sequence[State], new: Sequence[State], refreshed: Sequence[Refreshed]
    ) -> list[Carry | None]:
        return [shards.carry_from(self.carry, *triple) for triple in zip(old, new, refreshed, strict=True)]

    def with_limits_of(self, saved: Preconditioner) -> Preconditioner:
        limit = getattr(saved, "max_state_ratio", None)
        return self if limit == self.max_state_ratio else self.model_copy(update={"max_state_ratio": limit})

    def on_load(self, replaced: Preconditioner) -> str | None:
        if self.carry != "rotate" or getattr(replaced, "carry", "rotate") == "rotate":
            return None
        return (
            "has carry='rotate', as everything before carry='squared' had, and goes on with it bit for bit. With it "
            "second moments don't follow into a new basis, and sparse gradients can make a run diverge. To switch, "
            "write opt.preconditioner_groups[{number}]['carry'] = 'squared'"
        )

    def report(self, states: Sequence[State]) -> list[dict[str, Tensor]]:
        """Return the counts of refreshes that gave a new basis, and of matrices with each of the faults above."""
        return [
            {name: state[name].to(state[COUNTS[0]].device, copy=True) for name in ("refreshes", *COUNTS)}
            for state in states
        ]

    def _project(self, states: Sequence[State], xs: Sequence[Tensor], *, into: bool) -> list[Tensor]:
        if not states:
            return []
        sides = shards.side_of(states[0])  # by the state, because the shape of a shard does not tell its sides
        if not sides or not xs[0].numel():
            return [x.clone() for x in xs]
        batch = len(xs[0])
        products = [(f"{side}_basis", side == "rows", into is (side == "rows")) for side in sides]
        largest = max(xs[0].numel(), *(states[0][name].numel() for name, _, _ in products))
        results: list[Tensor] = []
        with in_precision(self.precision):
            for part in batches(len(xs), largest, stacked_at_once(self.precision)):
                x = stack(xs[part], self.precision)
                for name, left, transposed in products:
                    basis = stack([state[name] for state in states[part]], self.precision)
                    basis = basis.mT if transposed else basis
                    x = torch.bmm(basis, x) if left else torch.bmm(x, basis)
                results += x.split(batch) if len(x) > batch else [x]
        return results
