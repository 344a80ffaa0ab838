"""Eigenbasis: rotate gradients into the eigenvectors of their Gram matrices, on one side or on both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from selective.preconditioner import schedule, shards
from selective.preconditioner.base import Carry, Preconditioner, Refreshed, Shape, State
from selective.preconditioner.gram import Side, Sides, observe, rotated_sides
from selective.preconditioner.linalg import Precision, batches, in_precision, per_matrix, stack, stacked_at_once, zero
from selective.preconditioner.refresh import COUNTS, CarryName, refresh
from selective.preconditioner.solvers import SolverName


class Eigenbasis(Preconditioner):
    """Gradients G become PᵀG, GQ or PᵀGQ; P and Q are eigenvectors of Gram matrices of the rows and columns.

    Sources: SOAP, arXiv 2409.11321; AdaDiag, arXiv 2502.07488. `Soap` and `AdaDiag` are this with the papers' settings.
    Matrices with less than two rows or columns have no space to rotate and are left to the base. Each default is
    explained beside its field. Until a parameter's first basis, P and Q are the identity.

    State of a matrix, float32: n² elements for each rotated side of length n, twice that with `statistic="ema"`.
    A refresh costs O(n³), more or less by the `solver`; a step one product of the gradient's size for each side, and
    the same again on the way back.

    Faults: a Gram matrix with NaN or infinities reaches no solver, and leaves statistics and basis as they are
    (`skipped`). A solver that raises, or whose result is not orthogonal, is tried again in float64 (`float64`), then
    eigh in float64 on the CPU (`cpu`); then the old basis stays, bit for bit, with a warning (`kept`). `report()` has
    these counts.

    Only `refresh` waits for the device: once in 512 MiB of matrices, and inside torch's eigh and svd.
    """

    sides: Sides = "two"
    """Which sides are rotated: the gradient's "rows" (P), "columns" (Q), both ("two"), the smaller "one" (by the shape
    alone; columns where they are equal), or the one that is whole on each rank ("unsharded": columns, unless those are
    sharded). Both, because that has measured better than one; one side costs half in time, less in memory."""
    statistic: Literal["gradient", "ema"] = "ema"
    """What is diagonalised: the Gram matrices of the "gradient" of the step of the refresh, or their running averages
    ("ema") up to the step before. Running averages, because one gradient is a noisy and often low-rank guess at the
    covariance, and measured worse."""
    beta: float = Field(default=0.95, ge=0, lt=1)
    """Of the running averages: A ← β A + (1 − β) GGᵀ after each step. SOAP's 0.95, a memory of 20 steps."""
    refresh_every: int = Field(default=10, ge=1)
    """Steps from one refresh to the next. SOAP's 10; with "eigh" or "svd" 50 to 500 keep the cost small."""
    start_step: int = Field(default=0, ge=0)
    """Steps before the first basis. 0: as soon as possible, which with "ema" is after the first gradient."""
    skip_first_step: bool = False
    """Rotated parameters do not move in the first step, so that nothing is done in an unrotated space (SOAP). Off,
    because a step in the unrotated space is a good step of the base."""
    stagger: bool = True
    """Parameters take turns, evenly over `refresh_every` steps, first bases over the first ten: no step pays for
    all. They are counted, not weighed: one that is much larger than the others makes its step longer."""
    solver: SolverName = "cholesky"
    """How. "eigh" and "svd" (of the gradient itself where it is the statistic) start from scratch and are exact. "qr"
    and "cholesky" go on from the old basis by one step of subspace iteration, which is right for averages that move
    slowly; the first basis is eigh's. "cholesky" spans what "qr" does with more arithmetic, but of the kind that GPUs
    are fast at; on a CPU "eigh" takes no longer than either."""
    carry: CarryName = "squared"
    """What follows into the new basis. "squared": first moments by the maps from basis to basis, exactly but for
    rounding (`precision`), and second moments by the squares of these maps. So no second moment is too small for its
    first moment, and no step is larger than the base's own could be, on sparse gradients too. "rotate": first moments
    by the maps; second moments stay with their column, which "qr" and "cholesky" may move, sorting by eigenvalue. That
    is what SOAP does, and it diverges on one-hot inputs. "keep": nothing follows, and no column is moved."""
    max_dim: int = Field(default=10_000, ge=2)
    """A longer side is not rotated (the smaller side of "one": then none is). SOAP's; 10,000 are 400 MB a basis."""
    precision: Precision = "float32"
    """Of the products with gradients and updates in each step: "float32", or on a GPU 4 to 8 times faster "tf32" or
    "bfloat16" (factors and results rounded to 8 bits). With either of these, moments are carried in TF32. Statistics
    and factorisations are never below float32, whatever torch's flags say. Exact unless asked, as everything here."""
    floor: float = Field(default=16.0, ge=0)
    """With the "gradient" statistic, in the step of a refresh: rotated elements below floor · eps · σ₁ are set to 0.
    There the gradient is diagonal up to rounding (its rows orthogonal, with one side), and Adam's normalisation would
    blow the rounding up to full steps. Measured, 16 to 512 rows: without it, products in float32 and float64 lead to
    steps that differ by 30 to 95%, with 8 by up to 20%, with 16 by up to 6%. 0 turns it off."""

    gather_up_to: int = Field(default=2**26, ge=0)
    """Of a sharded matrix (DTensor), where a side is rotated that is not whole on each rank: it is gathered in every
    step if it has so many elements at most, and is left to the base if it has more. 0: never. With sides="unsharded"
    nothing is. 2**26 are 256 MiB that are sent two or three times a step, and a matrix of 8,192 rows and columns."""

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

    def sides_of(self, shape: Shape) -> tuple[Side, ...]:
        """Which sides of matrices of this shape are rotated."""
        return rotated_sides(self.sides, shape, self.max_dim)

    def takes(self, shape: Shape) -> bool:
        return bool(self.sides_of(shape))

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
        if sides and self.statistic == "gradient":  # what is set to 0 until the next observe(); also without a floor,
            state["noise"] = torch.zeros(batch, dtype=torch.float32, device=like.device)  # which may be set in training
        # On the CPU, because the host has to know which bases are the first, and should not wait for the device.
        state["refreshes"] = torch.zeros((), dtype=torch.int64, device="cpu")
        for name in COUNTS:
            state[name] = torch.zeros((), dtype=torch.int64, device=like.device)
        return state

    def is_due(self, steps: int, place: int, count: int) -> bool:
        start = max(self.start_step, 1) if self.statistic == "ema" else self.start_step
        every, stagger = self.refresh_every, self.stagger
        return schedule.is_due(steps, place, count, start=start, every=every, stagger=stagger)

    def is_overdue(self, state: State, steps: int) -> bool:
        # A first gradient of zeros (LoRA's A, an expert that nothing was routed to) or one that is not finite leaves no
        # basis; with 200 steps to the next turn that is long. In steps that double, for some never get one.
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
        return shards.why_not(sides, shape, self.max_dim, whole) or self.model_copy(update={"sides": sides})

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
        return [shards.carry_from(self.carry, *one) for one in zip(old, new, refreshed, strict=True)]

    def on_load(self, replaced: Preconditioner) -> str | None:
        if self.carry != "rotate" or getattr(replaced, "carry", "rotate") == "rotate":
            return None
        return (
            "has carry='rotate', as everything before carry='squared' had, and goes on with it bit for bit. With it "
            "second moments don't follow into a new basis, and sparse gradients can make a run diverge. To switch, "
            "write opt.preconditioner_groups[{number}]['carry'] = 'squared'"
        )

    def report(self, states: Sequence[State]) -> list[dict[str, Tensor]]:
        """How many refreshes gave a new basis, and how many matrices took each of the ways round it (see `Faults`)."""
        return [
            {name: state[name].to(state[COUNTS[0]].device, copy=True) for name in ("refreshes", *COUNTS)}
            for state in states
        ]

    def _project(self, states: Sequence[State], xs: Sequence[Tensor], *, into: bool) -> list[Tensor]:
        if not states:
            return []
        sides = shards.side_of(states[0])  # what was made for it: of a shard, the shape does not tell
        if not sides or not xs[0].numel():
            return [x.clone() for x in xs]
        batch = len(xs[0])
        ways = [(f"{side}_basis", side == "rows", into is (side == "rows")) for side in sides]
        largest = max(xs[0].numel(), *(states[0][name].numel() for name, _, _ in ways))
        results: list[Tensor] = []
        with in_precision(self.precision):
            for some in batches(len(xs), largest, stacked_at_once(self.precision)):
                x = stack(xs[some], self.precision)
                for name, left, transposed in ways:
                    basis = stack([state[name] for state in states[some]], self.precision)
                    basis = basis.mT if transposed else basis
                    x = torch.bmm(basis, x) if left else torch.bmm(x, basis)
                results += x.split(batch) if len(x) > batch else [x]
        return results
