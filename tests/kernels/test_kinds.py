"""A kind that a device has no code for is refused by that device's name, and nothing is taken for something else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sharded_pieces import shards

from selective.kernels import AdamRule, Decay, Draw, Item, Selection, Strength, cpu, gpu, reference, spec
from selective.kernels.sharded import run
from selective.kernels.sharded.selective_step import sharded_step
from selective.kernels.spec import StepSpec

RULE = AdamRule(1e-2, 0.9, 0.99, 1e-8)
DECAYING_RULE = replace(RULE, weight_decay=0.1)
AGREEMENT, NORM = Selection("agreement"), Strength("norm_preserving")  # a norm is summed over the shards
NEW_SELECTION = Selection("largest_magnitude")  # type: ignore[arg-type]
NEW_STRENGTH = Strength("entropy")  # type: ignore[arg-type]
NEW_DECAY = Decay("on_sundays")  # type: ignore[arg-type]
NEW_SCORE = Selection("top_k", score="curvature")  # type: ignore[arg-type]


@dataclass(frozen=True)
class SignumRule:
    lr: float = 1e-2
    weight_decay: float = 0.0
    maximize: bool = False


def sharded(items: Sequence[Item], how: StepSpec) -> None:
    """One process that has all of each tensor."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        steps = sharded_step(items, how, local_step=_never)
        for one in steps:
            one.resume()
        run(steps)
    finally:
        dist.destroy_process_group()


def _never(items: Sequence[Item], how: StepSpec) -> None:
    raise AssertionError("this step is to be made by the sharded code")


DEVICES: dict[str, Callable[..., Any]] = {
    "the reference": reference.selective_step,
    "the CPU": cpu.selective_step,
    "the GPU": gpu.selective_step,
    "the sharded step": sharded,
}
SCORES: tuple[Any, ...] = ("update", "momentum", "nesterov")
MADE_UP: dict[str, dict[str, Any]] = {
    "selection of the kind 'largest_magnitude'": {"selection": NEW_SELECTION},
    "strength of the kind 'entropy'": {"strength": NEW_STRENGTH},
    "score 'curvature' for a top-K": {"selection": NEW_SCORE},
    "decay of the kind 'on_sundays'": {"decay": NEW_DECAY},
    "rule SignumRule": {"rule": SignumRule()},
}
HOW: dict[str, Any] = {"rule": RULE, "selection": AGREEMENT, "strength": NORM, "draw": Draw(0, 0)}


def items_for(device: str) -> list[Item]:
    """Compiled kernels take tensors of a GPU, interpreted ones those of the CPU."""
    where = "cuda" if device == "the GPU" and torch.cuda.is_available() else "cpu"
    items = shards(RULE, 1, "plain", torch.float32, device=where)[0]
    return list(items) if device == "the sharded step" else [replace(item, shard=None) for item in items]


def tensors(items: list[Item]) -> list[torch.Tensor]:
    return [t.clone() for item in items for t in (item.param, *item.state.values())]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("what", MADE_UP)
def test_a_kind_that_is_none_is_refused_before_anything_moves(device: str, what: str) -> None:
    items = items_for(device)
    before = tensors(items)
    with pytest.raises(ValueError, match=f"^{device} has no {what}$"):
        DEVICES[device](items, StepSpec(**HOW | MADE_UP[what]))
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(items), strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("part", ["selection", "strength"])
def test_a_kind_that_a_device_has_forgotten_is_no_other_kind(
    device: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kind is defined, so that the first check lets it pass; every dispatch has to notice that it has no code."""
    monkeypatch.setattr(spec, "SELECTION_KINDS", spec.SELECTION_KINDS | {NEW_SELECTION.kind})
    monkeypatch.setattr(spec, "STRENGTH_KINDS", spec.STRENGTH_KINDS | {NEW_STRENGTH.kind})
    new: Any = NEW_SELECTION if part == "selection" else NEW_STRENGTH
    says = f"has no {part} of this kind" if device == "the GPU" else f"has no {part} of the kind '{new.kind}'"
    with pytest.raises(Exception, match=says):  # of Triton's own class on a GPU
        DEVICES[device](items_for(device), StepSpec(**HOW | {part: new}))


@pytest.mark.parametrize("device", DEVICES)
def test_a_decay_that_a_device_has_forgotten_is_no_other_decay(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sharded step asks the reference. The rule has a factor: without one, no device looks."""
    monkeypatch.setattr(spec, "DECAY_KINDS", spec.DECAY_KINDS | {NEW_DECAY.kind})
    who = "the reference" if device == "the sharded step" else device
    says = "has no decay of this kind" if device == "the GPU" else f"{who} has no decay of the kind 'on_sundays'"
    with pytest.raises(Exception, match=says):  # of Triton's own class on a GPU
        DEVICES[device](items_for(device), StepSpec(**HOW | {"rule": DECAYING_RULE, "decay": NEW_DECAY}))
    DEVICES[device](items_for(device), StepSpec(**HOW | {"rule": DECAYING_RULE, "decay": Decay()}))


@pytest.mark.parametrize("device", DEVICES)
def test_a_score_that_a_device_has_forgotten_is_not_nesterov(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The score is defined; the sharded step asks the reference for it."""
    monkeypatch.setattr(spec, "SCORES", spec.SCORES | {NEW_SCORE.score})
    who = "the reference" if device == "the sharded step" else device
    with pytest.raises(ValueError, match=f"^{who} has no score 'curvature' for a top-K$"):
        DEVICES[device](items_for(device), StepSpec(**HOW | {"selection": NEW_SCORE}))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("selection", [AGREEMENT, *(Selection("top_k", score=score) for score in SCORES)])
def test_what_there_is_is_stepped(device: str, selection: Selection) -> None:
    """The twin: the same items and the same call, with kinds that exist."""
    items = items_for(device)
    before = tensors(items)
    DEVICES[device](items, StepSpec(**HOW | {"selection": selection}))
    assert not all(torch.equal(a, b) for a, b in zip(before, tensors(items), strict=True))
