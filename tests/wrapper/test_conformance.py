"""`SelectiveUpdate` against the public suite: AdamW with policies of each kind, bases of each kind with one policy."""

from __future__ import annotations

from typing import Any, ClassVar

import optimi
import pytest
import pytorch_optimizer
import torch
from older_torch import faults_of_older_torch
from pydantic import Field
from torchao.optim import AdamW8bit

from selective import (
    MGUP,
    Agreement,
    AlphaConsistency,
    Cautious,
    CautiousMGUP,
    Dense,
    Grams,
    Magma,
    NormControl,
    NormPreserving,
    Policy,
    RandomMask,
    SelectiveUpdate,
    SkipUpdate,
    policy_from,
)
from selective.testing import ConfigClaims, Subject, check_wrapper, conformance_checks


class HalfWhereTheyDisagree(Policy):
    """Full step where the update agrees with the gradient, a part of it elsewhere; with a running share."""

    kind: ClassVar[str] = "conformance-half"
    rest: float = Field(0.5, ge=0, le=1)

    def init_state(self, view: Any) -> Any:
        return {"share": torch.ones(()), "last": torch.zeros(view.shape)}

    def mask(self, view: Any) -> Any:
        agree = view.update * view.grad > 0
        share = 0.9 * view.state["share"] + 0.1 * view.mean(agree.float())
        mask = torch.where(agree, share, self.rest * (1 + 0.1 * view.state["last"]))
        return mask, {"share": share, "last": agree.float()}


POLICIES: dict[str, Policy] = {
    "dense": Dense(),
    "alpha": AlphaConsistency(),
    "mgup": MGUP(),
    "mgup-official": MGUP(tau=0.5, alpha=2.0, gamma=0.1, score="momentum"),
    "cautious-mgup": CautiousMGUP(),
    "cautious": Cautious(),
    "grams": Grams(),
    "magma": Magma(),
    "skip": SkipUpdate(),
    "random": RandomMask(),
    "random-matched": RandomMask.matching(MGUP()),
    "norm-of-gradient": Policy(selection=Agreement(), strength=NormPreserving(of="gradient")),
    "custom": HalfWhereTheyDisagree(),
}

BASES: dict[str, Any] = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9),
    "sgd-nesterov-decay": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.01, weight_decay=0.01, amsgrad=True),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.01),
    "adamw-plain": lambda ps: torch.optim.AdamW(ps, lr=0.01, foreach=False),
    "adamw-foreach": lambda ps: torch.optim.AdamW(ps, lr=0.01, foreach=True),
    "adamw-fused": lambda ps: torch.optim.AdamW(ps, lr=0.01, fused=True),
    "nadam": lambda ps: torch.optim.NAdam(ps, lr=0.01),
    "radam": lambda ps: torch.optim.RAdam(ps, lr=0.01),
    "adamax": lambda ps: torch.optim.Adamax(ps, lr=0.01),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=0.01),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.01),
    "adafactor": lambda ps: torch.optim.Adafactor(ps, lr=0.01),
    "muon": lambda ps: torch.optim.Muon(ps, lr=0.01),
    "lion": lambda ps: pytorch_optimizer.Lion(ps, lr=0.001),
    "optimi-adamw": lambda ps: optimi.AdamW(ps, lr=0.01),
    "torchao-8bit": lambda ps: AdamW8bit(ps, lr=0.01),
}
WITHOUT_MOMENTUM = ("rmsprop", "adagrad", "adafactor")  # the wrapper keeps one
CONFIG = ConfigClaims(policy_from, {"kind": "MGUP", "tau": 0.25}, ("tau", 1.5, "1"))


def subject(base: str, policy: str) -> Subject:
    """`SelectiveUpdate` with this policy around this base."""
    beta = 0.9 if base in WITHOUT_MOMENTUM else None
    return Subject(
        name=f"{policy} over {base}",
        base=BASES[base],
        wrap=lambda optimizer: SelectiveUpdate(optimizer, policy=POLICIES[policy], momentum_beta=beta),
        model="matrices" if base == "muon" else "mixed",
        exact_base=BASES["adamw"] if base == "torchao-8bit" else None,
        config=CONFIG,
        copies=(base in WITHOUT_MOMENTUM) + (policy == "custom"),  # the momentum, and the state of `last`,
        strict=True,
    )


# Slow: what steps by the same code as another one here, and all bases with two policies more.
TWICE = [("adamw", name) for name in ("norm-of-gradient", "skip", "cautious-mgup", "mgup-official", "grams")]
TWICE += [("adamw", "random-matched")]
ALIKE = ("adamw-plain", "adamw-foreach", "adamw-fused", "adam", "sgd", "radam", "adamax", "adagrad")
TWICE += [(base, "mgup") for base in ALIKE]
CROSS: list[Any] = [("adamw", policy) for policy in POLICIES]
CROSS += [(base, "mgup") for base in BASES if base != "adamw"]
CROSS = [pair for pair in CROSS if pair not in TWICE]
MORE = TWICE + [(base, policy) for base in BASES if base != "adamw" for policy in ("alpha", "custom")]
CROSS += [pytest.param(*pair, marks=pytest.mark.slow) for pair in MORE]

# What a base by itself gets wrong, so that nothing can be asked of the wrapper there.
FAULTS_OF_BASES = {
    # torch's flattened form refuses None, which is in the state where there is no Kahan sum.
    "optimi-adamw": {"flattened_checkpoint_round_trip", "unstepped_flattened_checkpoint"},
    # A copy of it lacks an attribute that its step reads.
    "torchao-8bit": {"copies_step_as_the_original"},
}


@pytest.fixture(autouse=True)
def _small_and_eager():
    """One thread, and torchao's step without a compiler."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.compiler.set_stance("force_eager"):
        yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("base", "policy"), CROSS, ids=lambda name: name)
def test_conformance(base, policy):
    report = check_wrapper(subject(base, policy))
    report.raise_if_failed()
    faults = {o.check for o in report.not_applicable}
    faults -= faults_of_older_torch(base)
    assert faults == FAULTS_OF_BASES.get(base, set()), str(report)
    assert len(report.outcomes) == len(conformance_checks)


@pytest.mark.parametrize("policy", [MGUP(), pytest.param(Dense(), marks=pytest.mark.slow)], ids=repr)
def test_conformance_where_norms_are_kept(policy: Policy) -> None:
    """All but the two checks that begin with parameters of zeros, which are refused in words."""
    kept = Subject(
        name="norms kept over adamw",
        base=BASES["adamw"],
        wrap=lambda optimizer: SelectiveUpdate(optimizer, policy, norm=NormControl(scale=2.0)),
        config=CONFIG,
        strict=True,
    )
    report = check_wrapper(kept)
    failed = {outcome.check: outcome.message for outcome in report.failed}
    assert failed.keys() == {"compensation_stays_within_its_cap", "nothing_aligned_stays_finite"}, str(report)
    says = "is 0, and NormControl(scale=2.0) would keep it so"
    assert all(says in message for message in failed.values()), str(report)
