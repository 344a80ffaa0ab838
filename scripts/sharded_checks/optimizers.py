"""The bases and policies that are checked, by name."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch.optim import Optimizer

from selective import Policy, RandomMask, SkipUpdate, TopK
from selective.bench.contenders import POLICIES as TIMED
from selective.policies import NormPreserving

Make = Callable[[Any], Optimizer]  # takes parameters or groups of them

POLICIES: dict[str, Policy] = {
    **TIMED,
    "SkipUpdate": SkipUpdate(),
    "control of MGUP": RandomMask.matching(TIMED["MGUP"]),
    "TopK by momentum × NormPreserving": Policy(selection=TopK(score="momentum"), strength=NormPreserving()),
}


def _adamw(params: Any) -> Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)


def _sgd(params: Any) -> Optimizer:
    return torch.optim.SGD(params, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.01)


def _lion(params: Any) -> Optimizer:
    # its lists of tensors can't hold DTensors of several meshes
    return import_module("pytorch_optimizer").Lion(params, lr=1e-3, weight_decay=0.1, foreach=False)


BASES: dict[str, Make] = {"AdamW": _adamw, "SGD": _sgd, "Lion": _lion}


def lacking(base: str) -> str | None:
    """Return in words why this base can't be made here; None if it can."""
    if base == "Lion" and find_spec("pytorch_optimizer") is None:
        return "pytorch_optimizer is not installed"
    return None
