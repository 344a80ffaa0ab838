"""Eigenbases of matrices that are sharded: the side that is whole on each rank is rotated, with sums over ranks.

Of a matrix cut by rows, G = [G₁; G₂; ...], each rank has whole rows: GᵢQ is its part of GQ, and GᵀG = Σ GᵢᵀGᵢ. So a
step needs nothing of other ranks. A running average of sums is the sum of running averages: each rank keeps its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from selective.preconditioner.base import Carry, Refreshed, Shape, State
from selective.preconditioner.gram import Side, Sides, gram, rotated_sides
from selective.preconditioner.refresh import CarryName, order_of, refresh, turn
from selective.preconditioner.solvers import SolverName


def sides_on_shards(sides: Sides, whole: frozenset[Side]) -> Sides:
    """`sides`, with "unsharded" spelled out."""
    if sides != "unsharded" or not whole:
        return sides
    return "columns" if "columns" in whole else "rows"


def why_not(sides: Sides, shape: Shape, max_dim: int, whole: frozenset[Side]) -> str | None:
    """Why a matrix is left alone of which only these sides are whole on each rank; None where it is not."""
    if not whole:
        return "sharded by rows and by columns, so that no side of it is whole on a rank"
    cut = [side for side in rotated_sides(sides, shape, max_dim) if side not in whole]
    if not cut:
        return None
    some = " and ".join(cut)
    return (
        f"sharded, and rotating its {some} would gather it in every step, which gather_up_to does not allow; "
        "sides='unsharded' takes the other side"
    )


def side_of(state: State) -> tuple[Side, ...]:
    """Which sides a state has bases of."""
    names: tuple[Side, ...] = ("rows", "columns")
    return tuple(side for side in names if f"{side}_basis" in state)


def parts(statistic: Literal["gradient", "ema"], states: Sequence[State], grads: Sequence[Tensor]) -> list[Tensor]:
    """This rank's part of each Gram matrix, [1, n, n]."""
    found = []
    for state, grad in zip(states, grads, strict=True):
        (side,) = side_of(state)
        found.append(state[f"{side}_gram"] if statistic == "ema" else gram(grad, side))
    return found


class FromGrams:
    """What a refresh goes by, where Gram matrices are given, whatever they are of."""

    statistic: Literal["gradient", "ema"] = "ema"

    def __init__(self, solver: SolverName, carry: CarryName, floor: float) -> None:
        self.solver: SolverName = solver
        self.carry: CarryName = carry
        self.floor = floor


def refresh_from(options: FromGrams, states: Sequence[State], grams: Sequence[Tensor]) -> list[Refreshed]:
    """New bases, in place, of matrices of any sizes: alike ones are solved together."""
    alike: dict[tuple[Side, torch.Size], list[int]] = {}
    for index, (state, one) in enumerate(zip(states, grams, strict=True)):
        alike.setdefault((side_of(state)[0], one.shape), []).append(index)
    found = [Refreshed(False)] * len(states)
    for (side, shape), indices in alike.items():
        given = [{**states[i], f"{side}_gram": grams[i]} for i in indices]
        nothing = grams[indices[0]].new_zeros(()).expand(shape)
        for i, carry in zip(indices, refresh(options, (side,), given, [nothing] * len(given)), strict=True):
            if carry is not None:
                found[i] = Refreshed(True, carry.rows if side == "rows" else carry.columns)
    return found


def carry_from(carry: CarryName, old: State, new: State, refreshed: Refreshed) -> Carry | None:
    """The map from one basis to the next; an empty one where moments stay as they are ("keep")."""
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
