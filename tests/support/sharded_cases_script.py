"""The checks of scripts/sharded.py on ranks over gloo: each passes in its layouts, and notices what it is there for."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from sharded_world import World
from torch.distributed.tensor import DTensor

sys.path.append(str(Path(__file__).parents[2] / "scripts"))  # ranks don't have pytest's `pythonpath`
from sharded_checks import rotations
from sharded_checks.given import Given
from sharded_checks.layouts import LAYOUTS, Layout, unfit
from sharded_checks.muon import muon
from sharded_checks.optimizers import POLICIES
from sharded_checks.processes import Ranks
from sharded_checks.replicas import replicas
from sharded_checks.results import Result
from sharded_checks.selections import selections
from sharded_checks.waits import waits

FEW = {
    name: POLICIES[name]
    for name in ("MGUP", "Cautious", "CautiousMGUP", "RandomMask (row)", "TopK by momentum × NormPreserving")
}
RANKS = Ranks(torch.device("cpu"))  # with the meshes of all cases in this process


def _passed(found: Iterable[Result], count: int) -> None:
    results = list(found)
    assert len(results) == count and all(result.passed for result in results), "\n".join(map(str, results))


def selections_over_tensor_parallelism(world: World) -> None:
    _passed(selections(Layout("fsdp-tp", RANKS), ["AdamW"], FEW), 5)


def selections_everywhere(world: World) -> None:
    for name in LAYOUTS:
        _passed(selections(Layout(name, RANKS), ["AdamW", "SGD", "Lion"]), 54)


def local_selections_are_noticed(world: World) -> None:
    """The failing twin: shards that select by themselves."""
    found = {result.case: result for result in selections(Layout("fsdp", RANKS), ["SGD"], FEW, scope="local")}
    failed = {case for case, result in found.items() if result.passed is False}
    assert "SGD, MGUP" in failed and found["SGD, MGUP"].numbers["selected_otherwise"] > 0
    assert "SGD, CautiousMGUP" not in failed  # which looks at single coordinates


def rotations_over_tensor_parallelism(world: World) -> None:
    _passed([rotations.from_one_basis(Layout("fsdp-tp", RANKS), "AdamW", "gathered")], 1)


def rotations_everywhere(world: World) -> None:
    for name in LAYOUTS:
        _passed(rotations.rotations(Layout(name, RANKS), ["AdamW", "SGD", "Lion"]), 6)


def another_start_of_a_rotation_is_noticed(world: World) -> None:
    """The failing twin: shards whose state is not loaded."""
    real = rotations._loaded

    def loaded(run: Given, saved: dict[str, Any]) -> Given:
        return run if any(isinstance(p, DTensor) for p in run.params) else real(run, saved)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rotations, "_loaded", loaded)
        assert rotations.from_one_basis(Layout("fsdp", RANKS), "SGD", "unsharded").passed is False


def replicas_over_tensor_parallelism(world: World) -> None:
    _passed([next(replicas(Layout("fsdp-tp", RANKS), 2))], 1)  # without the one of rotations, which follows


def replicas_everywhere(world: World) -> None:
    for name in LAYOUTS:
        _passed(replicas(Layout(name, RANKS), 50), 2)


def replicas_that_draw_for_themselves_are_noticed(world: World) -> None:
    """The failing twin: a seed of its own on each rank."""
    results = list(replicas(Layout("ddp", RANKS), 2, seed=world.rank))
    assert [result.passed for result in results] == [False, False]
    assert results[0].numbers["entries_that_differ"] > 0


def muon_everywhere(world: World) -> None:
    for name in LAYOUTS:
        _passed(muon(Layout(name, RANKS)), 2)


def what_is_not_run_says_why(world: World) -> None:
    (result,) = waits(Layout("fsdp", RANKS))
    assert result.passed is None and result.said == "only a GPU can be waited for"
    assert unfit("hsdp", 3) == "hsdp needs a multiple of 2 processes, not 3" and unfit("hsdp", 6) is None
