"""Chains against the public suite: of one member, of two alike, and Muon beside AdamW.

A chain of one member has a base, so every row applies. A chain of several has none. Rows that look into the base don't
apply then, and `add_param_group` needs the key "member".
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer

from selective import MGUP, ChainedOptimizer, RandomMask, SelectiveUpdate
from selective.testing import Subject, check_wrapper

NEED_THE_BASE = {
    "param_groups_are_those_of_the_base",
    "modes_reach_the_base",
    "attributes_of_the_base_do_not_leak",
    "initialisation_step_moves_nothing_of_the_wrapper",
    "state_shows_what_the_base_has",
    "checkpoint_of_the_base_loads",
    "base_part_loads_into_the_base",
    "base_state_is_left_to_the_base",
    "nothing_foreign_in_the_base_state",
}
"""Rows that ask for the base. Those of them that make sense for several members have tests in this folder."""
NEED_ANOTHER_BASE = {"state_dtypes_survive_a_load", "base_may_write_on_gradients", "inexact_moments_are_understood"}
WITHOUT_POLICY_DATA = {"configs_are_validated"}
WITHOUT_A_CLAIM = {"memory_is_as_claimed"}


def adamw(params: Any) -> Optimizer:
    return AdamW(params, lr=0.01)


def in_two(base: Optimizer, policy: Any) -> ChainedOptimizer:
    """Two optimizers of the base's class, each over every second parameter."""
    known = inspect.signature(type(base).__init__).parameters
    options = {key: value for key, value in base.defaults.items() if key in known}
    params = [p for group in base.param_groups for p in group["params"]]
    parts = [part for part in (params[::2], params[1::2]) if part]
    return ChainedOptimizer([SelectiveUpdate(type(base)(part, **options), policy=policy) for part in parts])


def matrices_and_rest(params: Sequence[Tensor], wrapped: bool) -> ChainedOptimizer:
    """Muon for matrices, AdamW for the rest; a wrapped one is under MGUP."""
    matrices, rest = [p for p in params if p.ndim == 2], [p for p in params if p.ndim != 2]
    members: dict[str, Optimizer] = {}
    if matrices:
        muon = Muon(matrices, lr=0.01)
        members["matrices"] = SelectiveUpdate(muon, policy=MGUP()) if wrapped else muon
    if rest:
        members["rest"] = AdamW(rest, lr=0.01)
    return ChainedOptimizer(members)


def one_member(policy: Any) -> Subject:
    return Subject(
        name="one member",
        base=adamw,
        wrap=lambda base: ChainedOptimizer([SelectiveUpdate(base, policy=policy)]),
        get_base=lambda chain: chain.members[0].base,
        copies=0,
        strict=True,
    )


def two_members(policy: Any) -> Subject:
    return Subject(
        name="two members",
        base=adamw,
        wrap=lambda base: in_two(base, policy),
        get_base=None,
        copies=0,
        strict=True,
        group_keys={"member": 0},
        waives={"checkpoint_of_the_base_loads": "the base has one group, the chain has two"},
    )


def muon_beside_adamw() -> Subject:
    """Its base alone is a chain of the same two without a policy."""
    return Subject(
        name="Muon beside AdamW",
        base=lambda params: matrices_and_rest(params, wrapped=False),
        make=lambda params: matrices_and_rest(params, wrapped=True),
        get_base=None,
        group_keys={"member": "matrices"},
    )


SUBJECTS: dict[str, tuple[Subject, set[str]]] = {
    "one": (one_member(MGUP()), WITHOUT_POLICY_DATA),
    "one-random": (one_member(RandomMask()), WITHOUT_POLICY_DATA),
    "two": (two_members(MGUP()), NEED_THE_BASE | WITHOUT_POLICY_DATA),
    "two-random": (two_members(RandomMask()), NEED_THE_BASE | WITHOUT_POLICY_DATA),
    "muon-adamw": (muon_beside_adamw(), NEED_THE_BASE | NEED_ANOTHER_BASE | WITHOUT_POLICY_DATA | WITHOUT_A_CLAIM),
}
QUICK = ("muon-adamw",)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SUBJECTS])
def test_conformance(name: str) -> None:
    subject, without = SUBJECTS[name]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        report = check_wrapper(subject)
    finally:
        torch.set_num_threads(threads)
    report.raise_if_failed()
    assert {outcome.check for outcome in report.not_applicable} == without, str(report)
