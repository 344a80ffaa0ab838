"""The base optimizers by name. Each is made of parameter groups that have their own learning rates and decays."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from evidence.prototypes.masked_muon import MaskedMuon
from evidence.prototypes.momentum_basis import MomentumBasis
from evidence.prototypes.whitened_muon import WhitenedMuon

Groups = list[dict[str, Any]]


def _adamw(groups: Groups, beta: float = 0.9) -> Optimizer:
    return torch.optim.AdamW(groups, betas=(beta, 0.95), fused=groups[0]["params"][0].is_cuda)


def _nadam(groups: Groups) -> Optimizer:
    """Nesterov's momentum: with this decay it grows to 0.95 in the first steps, where torch's default stays at half."""
    return torch.optim.NAdam(groups, betas=(0.95, 0.95), momentum_decay=1.0, decoupled_weight_decay=True)


def _lion(groups: Groups) -> Optimizer:
    from pytorch_optimizer import Lion

    return Lion(groups, betas=(0.95, 0.98))


def _muon(groups: Groups) -> Optimizer:
    return torch.optim.Muon(groups)


def _masked_rows(groups: Groups) -> Optimizer:
    return MaskedMuon(groups, where="rows")


def _soap(groups: Groups) -> Optimizer:
    from pytorch_optimizer import SOAP

    return SOAP(groups, betas=(0.95, 0.95), precondition_frequency=10)


BASES: dict[str, Callable[[Groups], Optimizer]] = {
    "AdamW": _adamw,
    "AdamW 0.95": partial(_adamw, beta=0.95),
    "NAdam 0.95": _nadam,
    "Lion": _lion,
    "Muon": _muon,
    "SOAP": _soap,
    "momentum basis": MomentumBasis,
    "whitened Muon": WhitenedMuon,
    "masked before Muon": MaskedMuon,
    "Muon masked by rows": _masked_rows,
}
