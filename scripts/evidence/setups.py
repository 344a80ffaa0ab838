"""The setups: a base optimizer, with a policy and a preconditioner or without. All are made by the public interface.

What the library does not have yet is a prototype (`prototypes/`), so that it can be measured before it is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from evidence.bases import BASES
from evidence.prototypes.stepper import Stepper
from evidence.prototypes.tail_average import TailAverage
from evidence.runs import Run
from selective import (
    MGUP,
    AdaDiag,
    AlphaConsistency,
    Cautious,
    CautiousDecay,
    MeanPreserving,
    Norm,
    NormControl,
    Policy,
    Preconditioner,
    RandomDecay,
    RandomMask,
    SelectiveUpdate,
    Soap,
    param_groups_for,
)
from selective.policies import Decay, Magma

DECAY = 0.1
CONTROL = "random like "
Around = Callable[[Optimizer, nn.Module, int], Stepper]


@dataclass(frozen=True)
class Setup:
    """A base by its name in `BASES`. Policy, preconditioner and norm are for the model's inner matrices alone.

    `rest` is the base of embeddings, head and vectors, if it is another one. `around` is a prototype that is put around
    the optimizer; it is given the model and the number of steps. `rates` is the grid of the sweep, by its name in
    `plan.GRIDS`.
    """

    base: str
    rates: str
    policy: Policy | None = None
    space: Preconditioner | None = None
    decay: Decay | None = None
    norm: Norm | None = None
    capture: str | None = None
    rest: str | None = None
    around: Around | None = None

    @property
    def wrapped(self) -> bool:
        return not self.policy is self.space is self.decay is self.norm is self.capture is None


POLICIES: dict[str, Policy] = {
    "Cautious": Cautious(),
    "MGUP mild": MGUP(alpha=1.5, gamma=0.5),  # the paper's advice for bases whose learning rate is tuned
    "MGUP official": MGUP(alpha=2, gamma=0.1),  # of the authors' code, for AdamW and Lion
    "AlphaConsistency": AlphaConsistency(),
}
# Other readings of AlphaAdam, whose formula is published nowhere, and one more policy.
READINGS: dict[str, Policy] = {
    "AlphaConsistency by the momentum of now": AlphaConsistency(momentum="current"),
    "AlphaConsistency by count": AlphaConsistency(strength=MeanPreserving()),
    "Magma": Magma(),
}
SOAP = Soap(solver="cholesky", precision="tf32")
IN_SOAP = Setup("AdamW 0.95", "Soap", space=SOAP)
BEST = replace(IN_SOAP, rates="norm control", policy=Cautious(), norm=NormControl())
MUON = Setup("Muon", "Muon", rest="AdamW")


def _masked(setup: Setup, called: str, policies: dict[str, Policy]) -> dict[str, Setup]:
    return {f"{name} on {called}": replace(setup, policy=policy) for name, policy in policies.items()}


def _norm_controlled(*policies: str) -> dict[str, Setup]:
    """More policies in the best composition, whose sweeps begin at its best rates."""
    setup = replace(IN_SOAP, rates="norm control in Soap", norm=NormControl())
    return {f"{name} on AdamW in Soap, norm controlled": replace(setup, policy=POLICIES[name]) for name in policies}


SETUPS: dict[str, Setup] = {
    "AdamW": Setup("AdamW", "AdamW"),
    "AdamW, the betas of Soap": Setup("AdamW 0.95", "AdamW"),
    "Lion": Setup("Lion", "Lion"),
    **_masked(Setup("AdamW", "AdamW"), "AdamW", POLICIES | READINGS),
    **_masked(Setup("Lion", "Lion"), "Lion", POLICIES),
    "AdamW in Soap": IN_SOAP,
    **_masked(IN_SOAP, "AdamW in Soap", {"Cautious": Cautious(), "MGUP mild": POLICIES["MGUP mild"]}),
    "CautiousDecay on AdamW in Soap": replace(IN_SOAP, decay=CautiousDecay()),
    "Cautious, CautiousDecay on AdamW in Soap": replace(IN_SOAP, policy=Cautious(), decay=CautiousDecay()),
    "AdamW in AdaDiag++": Setup("AdamW", "AdaDiag", space=AdaDiag(sides="two", refresh_every=50)),
    "AdamW in the momentum's basis": Setup("momentum basis", "AdamW", rest="AdamW"),
    "pytorch_optimizer SOAP": Setup("SOAP", "Soap", rest="AdamW 0.95"),
    "AdamW in Soap, tail averaged": replace(IN_SOAP, around=TailAverage),
    "Cautious on AdamW in Soap, tail averaged": replace(IN_SOAP, policy=Cautious(), around=TailAverage),
    "AdamW, norm controlled": Setup("AdamW", "norm control", norm=NormControl()),
    "AdamW in Soap, norm controlled": replace(IN_SOAP, rates="norm control", norm=NormControl()),
    "Cautious on AdamW in Soap, norm controlled": BEST,
    "Cautious on AdamW in Soap, norm controlled, tail averaged": replace(BEST, around=TailAverage),
    "Cautious on AdamW in Soap, norm controlled, refreshed every 3": replace(
        BEST, space=Soap(solver="cholesky", precision="tf32", refresh_every=3)
    ),
    "Cautious on NAdam in Soap, norm controlled": replace(BEST, base="NAdam 0.95"),
    **_norm_controlled("AlphaConsistency", "MGUP mild"),
    "Muon": MUON,
    "Muon, by our kernels": replace(MUON, capture="fused"),
    **_masked(MUON, "Muon", {name: POLICIES[name] for name in ("Cautious", "MGUP mild", "MGUP official")}),
    "Muon, whitened": Setup("whitened Muon", "Muon", rest="AdamW"),
    "Muon, Cautious before the orthogonalisation": replace(MUON, base="masked before Muon"),
    "Muon, Cautious by rows": replace(MUON, base="Muon masked by rows"),
    "Muon, norm controlled": replace(MUON, rates="norm control of Muon", norm=NormControl()),
    "Muon, whitened, norm controlled": Setup("whitened Muon", "norm control of Muon", norm=NormControl(), rest="AdamW"),
    "Muon, tail averaged": replace(MUON, around=TailAverage),
}


def control_of(setup: str) -> str:
    """The name of the matched random control of a setup with a policy or a selective decay."""
    return CONTROL + setup


def has_control(setup: str) -> bool:
    """True if the setup has a policy or a selective decay, and is no control itself."""
    return not setup.startswith(CONTROL) and " on " in setup


def unmasked(setup: str) -> str | None:
    """The name of a setup without its policy. None if it has none, or is a control."""
    bare = setup.partition(" on ")[2]
    return bare if has_control(setup) and bare in SETUPS else None


def setup_of(name: str) -> Setup:
    """The setup with this name, or the control of one. Raises KeyError if there is none."""
    if not name.startswith(CONTROL):
        return SETUPS[name]
    setup = SETUPS[name.removeprefix(CONTROL)]
    if setup.policy is None and setup.decay is None:
        raise KeyError(f"{name}: a control matches a policy, and {name.removeprefix(CONTROL)!r} has none")
    return replace(
        setup,
        policy=None if setup.policy is None else RandomMask.matching(setup.policy),
        decay=None if setup.decay is None else RandomDecay(),
    )


def optimizer_of(run: Run, model: nn.Module, steps: int) -> Stepper:
    """The optimizer of a run of so many steps. Vectors do not decay, everything else does."""
    setup = setup_of(run.setup)
    rates = run.lr if run.rest_lr is None else {"matrices": run.lr, "rest": run.rest_lr}
    if setup.rest is not None:
        optimizer = _two(setup, rates, model, run.seed)
    elif setup.wrapped:
        optimizer = SelectiveUpdate.for_model(
            model, BASES[setup.base], lr=rates, **_shared(setup), seed=run.seed, statistics=False
        )
    else:
        groups = param_groups_for(model, lr=rates, weight_decay=DECAY, ask=True)
        bare = [{**group, "params": [p for _, p in group["params"]]} for group in map(_bare, groups)]
        optimizer = BASES[setup.base](bare)
    return optimizer if setup.around is None else setup.around(optimizer, model, steps)


def _two(setup: Setup, rates: float | dict[str, float], model: nn.Module, seed: int) -> Optimizer:
    """Two bases, of the inner matrices and of everything else."""
    assert setup.rest is not None
    bases: dict[str, Any] = {"matrices": BASES[setup.base], "rest": BASES[setup.rest]}
    options = {"seed": seed, "statistics": False} if setup.wrapped else {}
    return SelectiveUpdate.for_model(model, lr=rates, **bases, **_shared(setup), **options)


def _shared(setup: Setup) -> dict[str, Any]:
    asked = {"decay": setup.decay, "capture": setup.capture}
    asked = {key: value for key, value in asked.items() if value is not None}
    return {"weight_decay": DECAY, "no_decay": ("vectors",), "policy": setup.policy, "preconditioner": setup.space,
            "norm": setup.norm, "parts": None, **asked}  # fmt: skip


def _bare(group: dict[str, Any]) -> dict[str, Any]:
    return {key: group[key] for key in ("params", "lr", "weight_decay")}
