"""The rules, selections and strengths with which every implementation of the step is tested."""

from __future__ import annotations

import torch

from selective.kernels import AdamRule, GivenRule, LionRule, Selection, SGDRule, Strength

# Coupled decay is 1/8, exact in binary, so that a bfloat16 gradient may cancel against it to 0 in float64, too.
RULES = {
    "adamw": AdamRule(1e-2, 0.9, 0.99, 1e-8, weight_decay=0.1),
    "adam_coupled": AdamRule(torch.tensor(1e-2), 0.9, torch.tensor(0.99), 1e-6, weight_decay=0.125, decoupled=False),
    "adam_amsgrad_maximize": AdamRule(1e-2, 0.9, 0.99, 1e-8, amsgrad=True, maximize=True),
    "sgd_plain": SGDRule(0.1, weight_decay=0.125),
    "sgd_dampening": SGDRule(0.1, 0.9, dampening=0.3, weight_decay=0.125, maximize=True),
    "sgd_nesterov": SGDRule(0.1, 0.9, nesterov=True),
    "lion": LionRule(1e-2, 0.9, 0.99, decay_factor=0.999),
    "lion_coupled": LionRule(1e-2, 0.9, 0.99, weight_decay=0.125, maximize=True),
    "scratch": GivenRule(factor=0.999, negated=True),
    "delta": GivenRule(offset=1.0),
}
SELECTIONS = {
    "everything": Selection("everything"),
    "update": Selection("agreement"),
    "update_loose": Selection("agreement", strict=False),
    "momentum": Selection("agreement", product="momentum"),
    "previous": Selection("agreement", product="previous_momentum"),
    "top_update": Selection("top_k", fraction=0.3),
    "top_momentum": Selection("top_k", score="momentum", fraction=0.7),
    "top_nesterov": Selection("top_k", score="nesterov", quantile="sampled"),
    "top_sampled": Selection("top_k", fraction=0.6, quantile="sampled"),
    "momentum_loose": Selection("agreement", product="momentum", strict=False),
    "top_none": Selection("top_k", fraction=0.001),
    "element": Selection("bernoulli", probability=0.4),
    "row": Selection("bernoulli", unit="row"),
    "tensor": Selection("bernoulli", unit="tensor"),
}
STRENGTHS = {
    "fixed": Strength("fixed", selected=2.0, rest=0.1),
    "grams": Strength("fixed", selected=1.0, rest=-1.0),
    "mean": Strength("mean_preserving", rest=0.3, cap=1.6),
    "mean_sampled": Strength("mean_preserving", cap=5.0, estimate="sampled"),
    "norm_update": Strength("norm_preserving", cap=3.0),
    "norm_momentum": Strength("norm_preserving", of="momentum", rest=0.5),
    "norm_gradient": Strength("norm_preserving", of="gradient", estimate="sampled", cap=9.0),
    "alignment": Strength("alignment", rest=0.2),
    "still": Strength("fixed", selected=1.0, rest=-0.5, still=True),
}
# A combination for each kind of launches that a step can have.
KINDS = {
    "agreement": (Selection("agreement"), Strength("fixed", 1.5, 0.5)),
    "previous": (Selection("agreement", product="previous_momentum"), Strength("norm_preserving", of="momentum")),
    "top_k": (Selection("top_k", fraction=0.4), Strength("fixed", 2.0, 0.5)),
    "top_k_mean": (Selection("top_k", fraction=0.4), Strength("mean_preserving")),
    "sampled": (Selection("top_k", quantile="sampled"), Strength("norm_preserving", estimate="sampled")),
    "element": (Selection("bernoulli"), Strength("alignment", rest=0.5)),
}


def needs_momentum(selection: Selection, strength: Strength) -> bool:
    return (
        (selection.kind == "agreement" and selection.product != "update")
        or (selection.kind == "top_k" and selection.score != "update")
        or strength.kind == "alignment"
        or (strength.kind == "norm_preserving" and strength.of == "momentum")
    )
