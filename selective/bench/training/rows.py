"""The rows of `selective bench --training`: optimizers over groups, each with the way in which it is checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch.optim import Optimizer

from selective import (
    MGUP,
    Cautious,
    ChainedOptimizer,
    Dense,
    Eigenbasis,
    NormControl,
    Policy,
    Preconditioner,
    RandomMask,
    SelectiveUpdate,
    Soap,
)
from selective.bench.contenders import ADAMW, POLICIES, Contender, MakeOptimizer, NotPossible, adamw, wrapped
from selective.bench.peers import peer_contenders
from selective.bench.training.groups import Group, PolicyOn, divided, plain
from selective.capture.choose import CaptureName

FUSED = "torch fused"  # the row with which all others are compared
ALWAYS = (FUSED, "torch foreach")
NEVER = 10**9  # a number of steps that no benchmark takes
REFRESH_EVERY = 10
MUON: dict[str, Any] = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1}
# Two bfloat16 implementations of Muon's orthogonalisation differ by a few per cent of an update: each of its products
# is rounded to 8 bits, and small singular values are amplified. Another rule, or another mask, differs by half or more.
MUON_ALLOWED = 0.1
SPACES: dict[str, Preconditioner] = {
    "Soap(cholesky, tf32)": Soap(solver="cholesky", precision="tf32"),
    "Soap(qr, float32)": Soap(solver="qr", precision="float32"),
    "Eigenbasis()": Eigenbasis(),
}
FIRST = ("CautiousMGUP", "MGUP", "MGUP (sampled)", "Cautious", "AlphaConsistency", "Grams")  # before the other policies
CONTROLS = ("Cautious", "MGUP")


@dataclass(frozen=True)
class Row:
    """One optimizer over groups.

    contender: makes it of groups, and says how it is checked.
    policy_on: the groups that have the policy.
    with_statistics: the same optimizer with `statistics=True`, of which the host's time is measured.
    policy, space: the mask and the rotation of a rotated row, whose check needs them.
    period: the number of steps after which the cost repeats.
    """

    contender: Contender
    policy_on: PolicyOn = "all"
    with_statistics: Contender | None = None
    policy: Policy | None = None
    space: Preconditioner | None = None
    period: int = 1

    @property
    def name(self) -> str:
        return self.contender.name + (", on matrices" if self.policy_on == "matrices" else "")


def training_rows(
    device: str = "cpu", groupings: Sequence[PolicyOn] = ("all", "matrices"), peers: bool = True
) -> list[Row]:
    """All rows, those of which most is asked first: a time limit cuts off the end."""
    base = adamw(fused=True) if device == "cuda" else adamw()
    rows = [Row(_over_plain(Contender(f"torch {name}", adamw(**form), adamw(foreach=False)))) for name, form in
            (("fused", {"fused": True}), ("foreach", {"foreach": True}))]  # fmt: skip
    for policy_on in groupings:
        rows += [_of_policy(name, POLICIES[name], base, policy_on) for name in FIRST]
        rows += [_of_policy(f"control of {name}", RandomMask.matching(POLICIES[name]), base, policy_on)
                 for name in CONTROLS]  # fmt: skip
    rows += _rotated(base) + _norms(base) + _muon(base)
    if peers:
        rows += _peers()
    for policy_on in groupings:
        rows += [_of_policy(name, policy, base, policy_on) for name, policy in POLICIES.items() if name not in FIRST]
    return rows


def _over_plain(contender: Contender) -> Contender:
    """The same contender, over groups without the wrapper's keys."""

    def over(make: MakeOptimizer) -> MakeOptimizer:
        return lambda groups: make(plain(groups))

    reference = contender.make_reference
    return replace(contender, make_optimizer=over(contender.make_optimizer),
                   make_reference=None if reference is None else over(reference))  # fmt: skip


def _of_policy(name: str, policy: Policy, base: MakeOptimizer, policy_on: PolicyOn) -> Row:
    without, reporting = (wrapped(name, policy, base, statistics=statistics) for statistics in (False, True))
    return Row(without, policy_on, reporting, policy)


def _rotated(base: MakeOptimizer) -> list[Row]:
    """Rotations between two refreshes, and with a refresh every ten steps, without a policy and with one."""
    rows = []
    best = next(iter(SPACES))
    for policy, names in ((Dense(), list(SPACES)), (Cautious(), [best])):
        for name in names:
            for refreshes in (False, True):
                space = SPACES[name] if refreshes else SPACES[name].model_copy(update={"refresh_every": NEVER})
                full = name + (" + Cautious" if isinstance(policy, Cautious) else "")
                full += f", refresh every {REFRESH_EVERY}" if refreshes else ", no refresh"
                without, reporting = (
                    wrapped(full, policy, base, preconditioner=space, statistics=statistics)
                    for statistics in (False, True)
                )
                reports = None if isinstance(policy, Dense) else reporting
                period = REFRESH_EVERY if refreshes else 1
                rows.append(Row(without, "all", reports, policy, space, period))
    return rows


def _norms(base: MakeOptimizer) -> list[Row]:
    """Norm control of the inner matrices, without a policy and with one."""

    def inner(groups: Sequence[Group]) -> Optimizer:
        return base([{**group, "norm": None} if "preconditioner" in group else group for group in groups])

    rows = []
    for name, policy in (("norms kept", Dense()), ("norms kept + Cautious", Cautious())):
        without, reporting = (
            wrapped(name, policy, inner, norm=NormControl(), statistics=statistics) for statistics in (False, True)
        )
        rows.append(Row(without, "all", None if isinstance(policy, Dense) else reporting, policy))
    return rows


def _muon(base: MakeOptimizer) -> list[Row]:
    """torch's Muon for matrices beside AdamW for the rest: bare, wrapped as it is, and with our own rule."""

    def maker(policy: Policy | None, capture: CaptureName = "auto", statistics: bool = False) -> MakeOptimizer:
        def make(groups: Sequence[Group]) -> Optimizer:
            flat, others = divided(groups)
            if not flat:
                raise NotPossible("Muon takes matrices with two dimensions, and this model has none inside")
            muon: Optimizer = torch.optim.Muon(plain(flat), **MUON)
            if policy is not None:
                try:
                    muon = SelectiveUpdate(muon, policy=policy, capture=capture, statistics=statistics)
                except ValueError as wrong:
                    raise NotPossible(str(wrong)) from wrong
            return ChainedOptimizer({"matrices": muon, "rest": base(plain(others))} if others else {"matrices": muon})

        return make

    bare, by_hand = maker(None), maker(MGUP(), "scratch")
    rows = [Row(Contender("torch Muon, AdamW for the rest", bare, agrees="own"))]
    kinds: list[tuple[str, Policy, CaptureName, MakeOptimizer]] = [
        ("Muon, Dense, capture='fused'", Dense(), "fused", bare),
        ("Muon, MGUP, capture='fused'", MGUP(), "fused", by_hand),
        ("Muon, MGUP, capture='scratch'", MGUP(), "scratch", by_hand),
    ]
    for name, policy, capture, reference in kinds:
        of = partial(Contender, name, make_reference=reference, agrees="near", allowed=MUON_ALLOWED)
        with_statistics = None if isinstance(policy, Dense) else of(maker(policy, capture, True))
        rows.append(Row(of(maker(policy, capture)), "all", with_statistics, policy))
    return rows


def _peers() -> list[Row]:
    """Other people's SOAP, and HeavyBall's AdamW. They have rules of their own, which are not compared."""
    adamw_of_heavyball = next(c for c in peer_contenders() if c.name == "HeavyBall AdamW")
    options = {"lr": ADAMW["lr"], "betas": (0.95, 0.95), "weight_decay": ADAMW["weight_decay"],
               "precondition_frequency": REFRESH_EVERY}  # fmt: skip
    rows = [Row(_over_plain(adamw_of_heavyball))]
    for package in ("pytorch_optimizer", "heavyball"):

        def make(groups: Sequence[Group], package: str = package) -> Optimizer:
            return import_module(package).SOAP(plain(groups), **options)

        missing = None if find_spec(package) is not None else f"{package} is not installed"
        name = "HeavyBall SOAP" if package == "heavyball" else f"{package} SOAP"
        rows.append(Row(Contender(name, make, agrees="own", missing=missing), period=REFRESH_EVERY))
    return rows
