"""Policies with code of their own on shards: the tensors and whole-tensor numbers they see, and their state."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from sharded_cases_traffic import counted
from sharded_runs import Run, adamw, columns, compare, layouts, nadam, rows
from sharded_world import World
from torch import Tensor
from torch.distributed.tensor import DTensor

from selective import Policy
from selective.policies.view import StepView


class Whole(Policy):
    """Sees whole tensors, as policies do by default, and keeps state of both kinds."""

    def init_state(self, view: StepView) -> dict[str, Tensor]:
        return {"seen": torch.zeros((), device=view.device), "last": torch.zeros(view.shape, device=view.device)}

    def mask(self, view: StepView) -> tuple[Tensor, dict[str, Tensor]]:
        above = view.update.abs() > view.update.abs().median()
        state = {"seen": view.state["seen"] + 1, "last": view.grad * 0.5 + view.state["last"]}
        return torch.where(above, 1.0, 0.25) * (1 + 0.01 * state["seen"]) + (state["last"] > 0), state


class Elementwise(Policy):
    """Sees shards, and asks for means, norms, quantiles and random numbers of the whole."""

    scope: ClassVar[Any] = "element"

    def init_state(self, view: StepView) -> dict[str, Tensor]:
        return {"last": torch.zeros_like(view.param)} if "param" in self.reads else {}

    def mask(self, view: StepView) -> Tensor:
        assert type(view.update) is Tensor
        level = view.quantile(view.grad, 0.4)
        kept = (view.grad > level) | (view.random() < 0.2) | (view.random("row") < 0.1)
        return torch.where(kept, 1.0, 0.5) * (view.mean(view.update) < view.norm(view.update) + view.random("tensor"))


class ByRow(Policy):
    """Sees whole rows."""

    scope: ClassVar[Any] = "row"

    def mask(self, view: StepView) -> Tensor:
        product = view.update * view.grad
        return product >= (product.mean(-1, keepdim=True) if product.dim() > 1 else 0.0)


def own_code_is_the_same_bits(world: World, everywhere: bool = False) -> None:
    """Own code gives the same bits as on one device, fused and through scratch, each in two layouts."""
    for number, base, policies in ((1, adamw, (Whole(), Elementwise(), ByRow())), (4, nadam, (Whole(),))):
        single = Run(base, {"policy": policies}).train(range(2))
        for name, (mesh, place) in layouts(world, everywhere, None if everywhere else number).items():
            ours = Run(base, {"policy": policies}, mesh, place).train(range(2))
            compare(ours, single, f"{policies!r}, {base.__name__}, {name}")


def own_code_in_every_layout(world: World) -> None:
    """The same in every layout; for the slow lane."""
    own_code_is_the_same_bits(world, everywhere=True)


def state_is_cut_as_the_parameter(world: World) -> None:
    """Parameter-shaped state of a policy is a DTensor, which checkpoints can reshard."""
    run = Run(adamw, {"policy": Whole()}, world.mesh(world.size)).train(range(2))
    single = Run(adamw, {"policy": Whole()}).train(range(2))
    found = []
    for mine, theirs in zip(run.params, single.params, strict=True):
        entry, wanted = (r.optimizer.state[p]["selective/state/last"] for r, p in ((run, mine), (single, theirs)))
        assert isinstance(entry, DTensor) == isinstance(mine.data, DTensor)
        if isinstance(entry, DTensor):
            assert entry.placements == mine.data.placements
            entry = entry.full_tensor()
        found.append(torch.equal(entry, wanted))
    assert all(found)


def what_is_gathered(world: World) -> None:
    """Whole tensors are gathered, and `explain()` says so; shards for scope element, or of whole rows, are not."""
    mesh = world.mesh(world.size)
    for policy, place, gathers in ((Whole(), rows, True), (ByRow(), rows, False), (ByRow(), columns, True)):
        run = Run(adamw, {"policy": policy, "statistics": False}, mesh, place, shapes=[(8, 6), (12, 4)])
        run.step(0)
        said = run.optimizer.explain()
        if gathers:
            assert "2 for each of 2 parameters are gathered in every step, 192 numbers" in said, said
        else:
            assert "runs on each rank's shard" in said, said
            with counted() as found:  # an all-gather would be an error
                run.step(1)
            assert found == []


def an_error_puts_parameters_back(world: World) -> None:
    """After a policy has raised on all ranks, parameters are as before, and training goes on."""
    run = Run(adamw, {"policy": Raises()}, world.mesh(world.size))
    before = run.values()
    with pytest.raises(RuntimeError, match="Raises failed in step 0"):
        run.step(0)
    assert all(torch.equal(a, b) for a, b in zip(before, run.values(), strict=True))


class Raises(Policy):
    def mask(self, view: StepView) -> Tensor:
        if view.name.endswith("[2]"):
            raise ValueError("no")
        return torch.zeros_like(view.update)
