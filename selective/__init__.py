"""selective: one line makes any momentum optimizer selective.

opt = SelectiveUpdate(torch.optim.AdamW(model.parameters(), lr=3e-4), policy=MGUP())
"""

from selective.capture.own_code import PolicyError
from selective.chained.optimizer import ChainedOptimizer
from selective.for_model.recipes import RECIPES, Recipe
from selective.norms import Norm, NormControl, norm_from
from selective.optimizer import SelectiveUpdate
from selective.param_groups.by_kind import param_groups_for
from selective.policies import (
    MGUP,
    Agreement,
    Alignment,
    AlphaConsistency,
    Bernoulli,
    Cautious,
    CautiousDecay,
    CautiousMGUP,
    Decay,
    Dense,
    Everything,
    Fixed,
    Grams,
    Magma,
    MeanPreserving,
    NormPreserving,
    Policy,
    RandomDecay,
    RandomMask,
    Selection,
    SkipUpdate,
    Strength,
    TopK,
    decay_from,
    policy_from,
)
from selective.policies.view import StepView
from selective.preconditioner import AdaDiag, Eigenbasis, Preconditioner, Soap, preconditioner_from
from selective.rotation.basis import PreconditionerError
from selective.state.entries import base_part
from selective.version import __version__ as __version__
from selective.watching import watch

__all__ = [
    "MGUP",
    "RECIPES",
    "AdaDiag",
    "Agreement",
    "Alignment",
    "AlphaConsistency",
    "Bernoulli",
    "Cautious",
    "CautiousDecay",
    "CautiousMGUP",
    "ChainedOptimizer",
    "Decay",
    "Dense",
    "Eigenbasis",
    "Everything",
    "Fixed",
    "Grams",
    "Magma",
    "MeanPreserving",
    "Norm",
    "NormControl",
    "NormPreserving",
    "Policy",
    "PolicyError",
    "Preconditioner",
    "PreconditionerError",
    "RandomDecay",
    "RandomMask",
    "Recipe",
    "Selection",
    "SelectiveUpdate",
    "SkipUpdate",
    "Soap",
    "StepView",
    "Strength",
    "TopK",
    "base_part",
    "decay_from",
    "norm_from",
    "param_groups_for",
    "policy_from",
    "preconditioner_from",
    "watch",
]
