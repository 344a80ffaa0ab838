"""The bytes that a step of AdamW has to move, with which the achieved bandwidth is compared."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from selective.kernels import spec
from selective.policies import Policy


@dataclass(frozen=True)
class Promise:
    """The bytes that a step moves for each parameter (a scalar, not a tensor).

    floor: gradient, moments and parameter are read once, and moments and parameter are written once.
    plain: the floor, and the bytes that a strength that needs a sum over the tensor reads a second time. Caches and
        samples can avoid those; nothing can do with less than the floor.
    """

    floor: float
    plain: float


def promised_bytes(
    policy: Policy | None = None, dtype: torch.dtype = torch.float32, state_bytes: float | None = None
) -> Promise:
    """The bytes that a step of AdamW under `policy` promises to move, for each parameter.

    In float32 the floor is 28 for every policy. Plain is 28, too, for selections that look at one coordinate at a time,
    fixed strengths, top-K and sampled estimates. It is 36 if gradient and momentum are read again (Cautious,
    AlphaConsistency, Magma). For the norm of the update it is 36, too: the moments are stored in the pass that sums it
    up, and read again. Moments of other dtypes are not, because the update can't be formed from rounded ones: then the
    whole update is read again. Exact top-K then reads more than is promised: what its scores are made of.

    Args:
        policy: the policy; None for AdamW itself.
        dtype: the dtype of parameters, gradients and moments.
        state_bytes: the bytes of one element of a moment that is stored in another form (1 for 8 bits, without scales).
    """
    size = dtype.itemsize
    state = size if state_bytes is None else state_bytes
    floor = 2 * size + size + 4 * state
    again = second_read(policy)
    if again and state == size == 4 and _sums_update(policy):
        again = frozenset("mv")
    return Promise(floor, floor + sum(size if name == "g" else state for name in again))


def second_read(policy: Policy | None) -> frozenset[str]:
    """The tensors that the plain way reads twice: of gradient, first and second moment ("g", "m", "v")."""
    parts = None if policy is None else policy.parts()
    if parts is None:
        return frozenset()
    selection, strength = parts[0].spec(), parts[1].spec()
    if selection is None or strength is None or strength.estimate == "sampled":
        return frozenset()
    if strength.kind == "alignment":
        return _columns_of(strength.reads)
    if strength.kind == "mean_preserving":  # the share of top-K and "everything" is known beforehand
        return _read_by(selection) if selection.kind in ("agreement", "function") else frozenset()
    if strength.kind == "norm_preserving" and selection.kind != "everything":
        return _read_by(selection) | _columns_of(strength.reads)
    return frozenset()


def _sums_update(policy: Policy | None) -> bool:
    """True if the strength is made of the norm of the update."""
    parts = None if policy is None else policy.parts()
    strength = None if parts is None else parts[1].spec()
    return strength is not None and strength.kind == "norm_preserving" and strength.of == "update"


def _read_by(selection: spec.Selection) -> frozenset[str]:
    if selection.kind == "agreement":  # the sign of AdamW's update is that of its momentum
        return frozenset("gm")
    return _columns_of(selection.reads)


def _columns_of(reads: frozenset[str]) -> frozenset[str]:
    """The columns of memory that these tensors are formed from before the moments move."""
    formed_from = {"grad": "g", "momentum": "gm", "previous_momentum": "m", "update": "gmv"}
    return frozenset("".join(formed_from[name] for name in reads))
