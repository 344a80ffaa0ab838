"""Eigenbases of sharded matrices: the side that is whole on each rank is rotated, and a refresh adds up over ranks.

If a matrix is sharded by rows, G = [G₁; G₂; ...], each rank has whole rows. GᵢQ is its part of GQ, and GᵀG = Σ GᵢᵀGᵢ.
So a step needs no communication. The running average of a sum is the sum of running averages, so that each rank keeps
that of its own part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from selective.preconditioner.data import Carry, Refreshed, Shape, State
from selective.preconditioner.gram import Side, Sides, gram, rotated_sides
from selective.preconditioner.proportion import Limits
from selective.preconditioner.refresh import CarryName, order_of, refresh, turn
from selective.preconditioner.solvers import SolverName


def sides_on_shards(sides: Sides, whole: frozenset[Side]) -> Sides:
    """Return `sides`, with "unsharded" replaced by the name of the side; of both, the columns."""
    if sides != "unsharded" or not whole:
        return sides
    return "columns" if "columns" in whole else "rows"


def why_not(sides: Sides, shape: Shape, limits: Limits, whole: frozenset[Side]) -> str | None:
    """Return the reason why a matrix with these `whole` sides cannot be rotated without gathering; None if it can."""
    if not whole:
        return "sharded by rows and by columns, so that no side of it is whole on a rank"
    cut = [side for side in rotated_sides(sides, shape, limits) if side not in whole]
    if not cut:
        return None
    names = " and ".join(cut)
    return (
        f"sharded, and rotating its {names} would gather it in every step, which gather_up_to does not allow; "
        "sides='unsharded' takes the other side"
    )


def side_of(state: State) -> tuple[Side, ...]:
    """Return the sides of which a state has bases."""
    names: tuple[Side, ...] = ("rows", "columns")
    return tuple(side for side in names if f"{side}_basis" in state)


def parts(statistic: Literal["gradient", "ema"], states: Sequence[State], grads: Sequence[Tensor]) -> list[Tensor]:
    """Return this rank's part of each Gram matrix, [1, n, n]."""
    grams = []
    for state, grad in zip(states, grads, strict=True):
        (side,) = side_of(state)
        grams.append(state[f"{side}_gram"] if statistic == "ema" else gram(grad, side))
    return grams


class FromGrams:
    """The options of a refresh from given Gram matrices, whatever they were made of."""

    statistic: Literal["gradient", "ema"] = "ema"

    def __init__(self, solver: SolverName, carry: CarryName, floor: float) -> None:
        self.solver: SolverName = solver
        self.carry: CarryName = carry
        self.floor = floor


def refresh_from(options: FromGrams, states: Sequence[State], grams: Sequence[Tensor]) -> list[Refreshed]:
    """Write new bases into `states`. Matrices may have any sizes; those of one size and side are solved together."""
    buckets: dict[tuple[Side, torch.Size], list[int]] = {}
    for index, (state, matrix) in enumerate(zip(states, grams, strict=True)):
        buckets.setdefault((side_of(state)[0], matrix.shape), []).append(index)
    refreshed = [Refreshed(False)] * len(states)
    for (side, shape), indices in buckets.items():
        with_grams = [{**states[i], f"{side}_gram": grams[i]} for i in indices]
        unread = grams[indices[0]].new_zeros(()).expand(shape)
        carries = refresh(options, (side,), with_grams, [unread] * len(with_grams))
        for i, carry in zip(indices, carries, strict=True):
            if carry is not None:
                refreshed[i] = Refreshed(True, carry.rows if side == "rows" else carry.columns)
    return refreshed


def carry_from(carry: CarryName, old: State, new: State, refreshed: Refreshed) -> Carry | None:
    """Return the map from one basis to the next: empty if moments are not carried ("keep"), None if nothing is new."""
    if not refreshed.new:
        return None
    if carry == "keep":
        return Carry()
    (side,) = side_of(new)
    basis = new[f"{side}_basis"]
    map_ = turn(basis, old[f"{side}_basis"], None)
    order = None
    if carry == "rotate":
        order = order_of(refreshed.order, torch.ones(len(basis), dtype=torch.bool, device=basis.device), basis)
    if side == "rows":
        return Carry(left=map_, rows=order)
    return Carry(right=map_.mT, columns=order)
