"""Every policy on every base: it steps, or says in one sentence why not and what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from base_optimizers import BASES, build, give_grads, make_params

from selective import (
    MGUP,
    AlphaConsistency,
    Cautious,
    CautiousMGUP,
    Dense,
    Grams,
    Magma,
    Policy,
    RandomMask,
    SelectiveUpdate,
    SkipUpdate,
)
from selective.policies import Combined

POLICIES: dict[str, Policy] = {
    "dense": Dense(),
    "alpha": AlphaConsistency(),
    "mgup": MGUP(),
    "mgup-momentum": MGUP(score="momentum"),
    "mgup-nesterov": MGUP(score="nesterov"),
    "cautious-mgup": CautiousMGUP(),
    "cautious": Cautious(),
    "grams": Grams(),
    "magma": Magma(),
    "skip": SkipUpdate(),
    "random": RandomMask(),
    "control-of-cautious": RandomMask.matching(Cautious()),
}


def test_every_policy_of_ours_is_in_the_list() -> None:
    """`Combined` is what `Policy(selection=..., strength=...)` makes: its parts are those of the others."""
    ours = {policy for policy in Policy._registry.values() if policy.__module__.startswith("selective.")}
    assert ours - {type(policy) for policy in POLICIES.values()} == {Combined}


@pytest.fixture(autouse=True)
def _eager():
    with torch.compiler.set_stance("force_eager"):
        yield


def moves(name: str, policy: Policy, dtype: torch.dtype, **options: Any) -> None:
    """Ten steps: everything stays finite, and (a coin may spare any one tensor) something has moved."""
    base = BASES[name]
    params = make_params(base, dtype)
    before = [p.detach().clone() for p in params]
    optimizer = SelectiveUpdate(build(base, params), policy=policy, **options)
    for step in range(10):
        give_grads(params, step)
        optimizer.step()
    assert all(torch.isfinite(p).all() for p in params)
    assert any(not torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert type(policy).__name__ in optimizer.explain()


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("name", BASES)
def test_it_steps_or_says_why_not(name: str, policy: Policy) -> None:
    needs_momentum = bool(policy.needs() & {"momentum", "previous_momentum"})
    if needs_momentum and not BASES[name].momentum:
        with pytest.raises(ValueError, match=r"keeps no first moment of the gradient; pass momentum_beta=0\.9"):
            moves(name, policy, torch.float32)
        moves(name, policy, torch.float32, momentum_beta=0.9)  # the way out that the sentence names
    else:
        moves(name, policy, torch.float32)


@pytest.mark.parametrize("name", BASES)
def test_bfloat16_with_every_base(name: str) -> None:
    moves(name, MGUP(), torch.bfloat16)
    moves(name, Cautious(), torch.bfloat16, stochastic_rounding=True)
