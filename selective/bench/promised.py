"""How many bytes a step of AdamW has to move: what the achieved bandwidth is held against."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from selective.kernels import spec
from selective.policies import Policy


@dataclass(frozen=True)
class Promise:
    """Bytes a parameter (a scalar, not a tensor).

    floor: gradient, moments and parameter read once, moments and parameter written once.
    plain: the same, and what a strength that needs a sum over the tensor reads a second time. Caches and samples can
        come under it, nothing comes under the floor.
    """

    floor: float
    plain: float


def promised_bytes(
    policy: Policy | None = None, dtype: torch.dtype = torch.float32, state_bytes: float | None = None
) -> Promise:
    """What a step of AdamW under `policy` promises to move, for each parameter.

    In float32: 28 for every policy, as the floor. Its plain way is 28 as well for selections that look at one
    coordinate, for fixed strengths, for top-K and for sampled estimates; 36 where gradient and momentum are read again
    (Cautious, AlphaConsistency, Magma), 40 where all of the update is (the norm of the update).

    Args:
        policy: None for AdamW itself.
        dtype: of parameters, gradients and moments.
        state_bytes: of one moment's element, where it is stored in another form (8 bits: 1, scales not counted).
    """
    size = dtype.itemsize
    state = size if state_bytes is None else state_bytes
    floor = 2 * size + size + 4 * state
    again = second_read(policy)
    return Promise(floor, floor + sum(size if name == "g" else state for name in again))


def second_read(policy: Policy | None) -> frozenset[str]:
    """Which of gradient, first and second moment ("g", "m", "v") the plain way reads twice."""
    parts = None if policy is None else policy.parts()
    if parts is None:
        return frozenset()
    selection, strength = parts[0].spec(), parts[1].spec()
    if selection is None or strength is None or strength.estimate == "sampled":
        return frozenset()
    if strength.kind == "alignment":
        return frozenset("gm")
    if strength.kind == "mean_preserving":  # of top-K and "everything" the share is known beforehand
        return _read_by(selection) if selection.kind in ("agreement", "function") else frozenset()
    if strength.kind == "norm_preserving" and selection.kind != "everything":
        return _read_by(selection) | {"gradient": frozenset("g"), "momentum": frozenset("gm")}.get(
            strength.of, frozenset("gmv")
        )
    return frozenset()


def _read_by(selection: spec.Selection) -> frozenset[str]:
    if selection.kind == "agreement":  # the sign of AdamW's update is that of its momentum
        return frozenset("gm")
    if selection.kind == "function" or (selection.kind == "top_k" and selection.score == "update"):
        return frozenset("gmv")
    return frozenset("gm") if selection.kind == "top_k" else frozenset()
