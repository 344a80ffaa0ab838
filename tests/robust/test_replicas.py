"""DDP over gloo: after 50 steps replicas are the same to the last bit, although each rank's generators are its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from replicas import train_replicas

from selective import (
    MGUP,
    AlphaConsistency,
    Cautious,
    CautiousMGUP,
    Dense,
    Fixed,
    Grams,
    Magma,
    Policy,
    RandomMask,
    SkipUpdate,
    TopK,
)

POLICIES = [
    Dense(), MGUP(), CautiousMGUP(), Cautious(), Grams(), Magma(), SkipUpdate(), RandomMask(), AlphaConsistency(),
    Policy(selection=TopK(quantile="sampled"), strength=Fixed()),
]  # fmt: skip
PRECONDITIONERS = [None, {"kind": "Soap", "refresh_every": 3}, {"kind": "AdaDiag", "refresh_every": 7}]
RANDOM = {"policy": {"kind": "RandomMask"}, "preconditioner": {"kind": "Soap", "refresh_every": 3}}
WAYS: dict[str, dict[str, Any]] = {
    "join": {**RANDOM, "join": True},
    "no_sync": {**RANDOM, "no_sync": True},
    "static_graph": {**RANDOM, "static_graph": True},
}
# The twins: what is noticed when gradients are not averaged, or when the seed is each rank's own.
APART: dict[str, dict[str, Any]] = {"no ddp": {**RANDOM, "ddp": False}, "own seed": {**RANDOM, "seed_of_rank": True}}


AT_RANDOM = [MGUP(), Magma(), SkipUpdate(), RandomMask(), POLICIES[-1]]


def configurations(policies: list[Policy], spaces: list[Any]) -> dict[str, dict[str, Any]]:
    found = {
        f"{policy!r} in {space}": {"policy": policy.model_dump(), "preconditioner": space}
        for policy in policies
        for space in spaces
    }
    return {**found, **WAYS, **APART}


def check(found: dict[str, list[list[str]]], world: int) -> None:
    for name, ranks in found.items():
        assert all(len(digests) == 3 for digests in ranks), name
        assert len({tuple(digests) for digests in ranks}) == (world if name in APART else 1), name
    # a policy that did nothing would be the same everywhere, too (static_graph and join are what RandomMask is without)
    different = {ranks[0][-1] for name, ranks in found.items() if name not in APART}
    assert len(different) > len(found) - len(APART) - 4


def test_replicas_stay_together(tmp_path: Path) -> None:
    check(train_replicas(2, configurations(AT_RANDOM, PRECONDITIONERS[1:2]), tmp_path), 2)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_replicas_in_every_space(world: int, tmp_path: Path) -> None:
    check(train_replicas(world, configurations(POLICIES, PRECONDITIONERS), tmp_path), world)
