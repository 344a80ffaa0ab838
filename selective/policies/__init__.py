"""Policies: which coordinates of an update are selected, and how strongly they are stepped."""

from selective.policies.alpha import AlphaConsistency
from selective.policies.cautious import Cautious, Grams
from selective.policies.decay import CautiousDecay, Decay, RandomDecay, decay_from
from selective.policies.dense import Dense
from selective.policies.magma import Magma, SkipUpdate
from selective.policies.mgup import MGUP, CautiousMGUP
from selective.policies.policy import Combined, Policy, policy_from
from selective.policies.random import MatchedRandomMask, RandomMask
from selective.policies.selections import Agreement, Bernoulli, Everything, Selection, TopK
from selective.policies.strengths import Alignment, Fixed, MeanPreserving, NormPreserving, Strength

__all__ = [
    "MGUP", "Agreement", "Alignment", "AlphaConsistency", "Bernoulli", "Cautious", "CautiousDecay", "CautiousMGUP",
    "Combined", "Decay", "Dense", "Everything", "Fixed", "Grams", "Magma", "MatchedRandomMask", "MeanPreserving",
    "NormPreserving", "Policy", "RandomDecay", "RandomMask", "Selection", "SkipUpdate", "Strength", "TopK",
    "decay_from", "policy_from",
]  # fmt: skip
