"""Checks of one entry of ours, wherever it comes from: a checkpoint, or a write to `SelectiveUpdate.state`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from selective.base.mismatch import CheckpointMismatch
from selective.state.entries import (
    BASIS,
    BASIS_SHAPE,
    BASIS_SKIPPED,
    BASIS_STEPS,
    DECAY,
    MOMENTUM,
    NORM,
    POLICY,
    POLICY_STATE,
    PRECONDITIONER,
    PREFIX,
    RESIDUE,
    SEED,
    STEP,
    Refusal,
)

MOST_STEPS = 2**62  # far beyond any run, and still far from where a count in 64 bits goes over
OF_A_BASIS = (PRECONDITIONER, BASIS_STEPS, BASIS_SHAPE, BASIS_SKIPPED)
_KNOWN = {STEP, SEED, POLICY, DECAY, NORM, MOMENTUM, RESIDUE, *OF_A_BASIS}


def check_known(key: str, where: str, refuse: Refusal = CheckpointMismatch) -> None:
    """Refuse a name of ours that we don't know."""
    if key not in _KNOWN and not key.startswith((POLICY_STATE, BASIS)):
        raise refuse(
            f"{where} has an entry {key!r}, which this version does not know: names under {PREFIX!r} belong to "
            f"SelectiveUpdate"
        )


def check_plain(value: Any, where: str, refuse: Refusal = CheckpointMismatch) -> None:
    """Refuse anything but a dense tensor with values."""
    if not isinstance(value, Tensor):
        raise refuse(f"{where} is a {type(value).__name__}, must be a tensor")
    if value.layout != torch.strided or value.device.type == "meta":
        raise refuse(f"{where} is a {value.layout} tensor on {value.device}, must be one with values")


def number_of(key: str, value: Any, where: str, refuse: Refusal = CheckpointMismatch) -> int:
    """The step count or the seed that an entry holds; an error where it holds none."""
    return number_below(MOST_STEPS if key == STEP else 2**63, value, where, refuse)


def number_below(end: int, value: Any, where: str, refuse: Refusal = CheckpointMismatch) -> int:
    """One integer in [0, end): a plain one, or that of a tensor with one element."""
    if type(value) is not int:
        check_plain(value, where, refuse)
    number = value if isinstance(value, int) else value.item() if value.numel() == 1 else None
    if not isinstance(number, (int, float)) or not 0 <= number < end or int(number) != number:  # NaN is in no range
        raise refuse(f"{where} is {value}, must be one integer in [0, 2**{end.bit_length() - 1})")
    return int(number)
