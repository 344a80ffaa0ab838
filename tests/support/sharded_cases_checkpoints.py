"""Checkpoints saved on n ranks and loaded on m: with given gradients, the run goes on bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from sharded_cases_own import Whole
from sharded_cases_selection import BASES
from sharded_cases_training import by_columns, by_rows
from sharded_runs import nadam, whole
from sharded_world import World
from small_llama import small_llama
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, distribute_tensor

from selective import MGUP, AlphaConsistency, Magma, RandomMask, SelectiveUpdate, Soap
from selective.kernels import use_backend

ADAMW = "MGUP, RandomMask and own state, AdamW"
NADAM = "own momentum, NAdam"
CONFIGURATIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    ADAMW: (BASES["AdamW"], {"policy": (MGUP(), RandomMask(), Whole())}),
    "MGUP, SGD": (BASES["SGD"], {"policy": MGUP()}),
    "Magma, Lion": (BASES["Lion"], {"policy": Magma(probability=0.8)}),
    NADAM: (nadam, {"policy": AlphaConsistency(), "momentum_beta": 0.9}),
}


class Training:
    """The model and its optimizer: in one process without a mesh, else cut over it."""

    def __init__(self, name: str, mesh: Any = None, cut: Any = by_rows) -> None:
        base, options = CONFIGURATIONS[name]
        self.model, self.mesh = small_llama().float(), mesh
        if mesh is not None:
            cut(self.model, mesh)
        params, options = list(self.model.parameters()), dict(options)
        policies = options.pop("policy")
        policies = policies if isinstance(policies, tuple) else (policies,)
        groups = [{"params": params[i :: len(policies)], "policy": policy} for i, policy in enumerate(policies)]
        self.optimizer = SelectiveUpdate(base(groups), **options)

    def train(self, steps: range) -> Training:
        for step in steps:
            values = torch.Generator().manual_seed(step)
            for p in self.model.parameters():
                grad = torch.randn(p.shape, generator=values)
                if isinstance(p, DTensor):
                    grad = distribute_tensor(grad, p.device_mesh, p.placements, src_data_rank=None)
                p.grad = grad
            with use_backend("reference"):
                self.optimizer.step()
        self.optimizer.zero_grad()
        return self

    def values(self) -> list[Tensor]:
        return [whole(p.detach()) for p in self.model.parameters()]

    def options(self, **more: Any) -> StateDictOptions:
        return StateDictOptions(flatten_optimizer_state_dict=more.pop("flatten", False), **more)

    def state(self, flatten: bool) -> dict[str, Any]:
        options = self.options(flatten=flatten)
        optimizer = get_optimizer_state_dict(self.model, self.optimizer, options=options)
        return {"model": get_model_state_dict(self.model), "optimizer": optimizer}

    def _how(self) -> dict[str, Any]:
        return {"no_dist": True} if self.mesh is None else {"process_group": self.mesh.get_group()}

    def save(self, folder: Path, flatten: bool) -> None:
        dcp.save(self.state(flatten), checkpoint_id=folder, **self._how())

    def load(self, folder: Path, flatten: bool) -> Training:
        found = self.state(flatten)
        dcp.load(found, checkpoint_id=folder, **self._how())
        set_model_state_dict(self.model, found["model"])
        options = self.options(flatten=flatten)
        set_optimizer_state_dict(self.model, self.optimizer, found["optimizer"], options=options)
        return self


def _same(found: list[Tensor], wanted: list[Tensor], what: str) -> None:
    for index, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert torch.equal(a, b), f"{what}: parameter {index}"


def resharded_in_a_run(world: World) -> None:
    """A run on 1, 2, 4 and 1 ranks in turn, each from the files of the one before; by columns, and flattened."""
    _resharded(world, (ADAMW, NADAM))


def resharded_in_every_run(world: World) -> None:
    """The same with the other configurations; for the slow lane."""
    _resharded(world, [name for name in CONFIGURATIONS if name not in (ADAMW, NADAM)])


def _resharded(world: World, names: Sequence[str]) -> None:
    for name in names:
        number = list(CONFIGURATIONS).index(name)
        flatten = number % 2 == 1
        undisturbed = Training(name).train(range(8)).values()
        folder = world.folder / f"run {number}"
        for part, size in enumerate((1, 2, 4, 1)):
            mesh, cut = world.mesh(size), by_columns if part == 2 and number % 3 == 0 else by_rows
            if world.rank < size:
                run = Training(name, None if size == 1 else mesh, cut)
                if part:
                    run.load(folder / str(part - 1), flatten)
                run.train(range(2 * part, 2 * part + 2)).save(folder / str(part), flatten)
                if part == 3:
                    _same(run.values(), undisturbed, name)
            torch.distributed.barrier()


def full_state_goes_both_ways(world: World) -> None:
    """The full state dict of a sharded run loads in a single-device run, and the other way round."""
    _full_state(world, (ADAMW, NADAM))


def full_state_of_every_run(world: World) -> None:
    """The same with the other configurations; for the slow lane."""
    _full_state(world, [name for name in CONFIGURATIONS if name not in (ADAMW, NADAM)])


def _full_state(world: World, names: Sequence[str]) -> None:
    mesh = world.mesh(world.size)
    full = StateDictOptions(full_state_dict=True)
    for name in names:
        undisturbed = Training(name).train(range(6)).values()
        sharded = Training(name, mesh).train(range(2))
        model = get_model_state_dict(sharded.model, options=full)
        optimizer = get_optimizer_state_dict(sharded.model, sharded.optimizer, options=full)
        kept = [value for entries in optimizer["state"].values() for value in entries.values()]
        assert not any(isinstance(value, DTensor) for value in kept)
        single = Training(name)
        set_model_state_dict(single.model, model)
        set_optimizer_state_dict(single.model, single.optimizer, optimizer)
        single.train(range(2, 4))
        saved = copy.deepcopy(single.optimizer.state_dict())  # loading shares step counters, as torch's does
        again = Training(name, mesh)
        set_model_state_dict(again.model, get_model_state_dict(single.model), options=full)
        state = get_optimizer_state_dict(single.model, single.optimizer)
        set_optimizer_state_dict(again.model, again.optimizer, state, options=full)
        _same(again.train(range(4, 6)).values(), undisturbed, name)
        plain = Training(name, mesh)
        set_model_state_dict(plain.model, get_model_state_dict(single.model), options=full)
        plain.optimizer.load_state_dict(saved)
        _same(plain.train(range(4, 6)).values(), undisturbed, f"{name}, load_state_dict")


def state_dict_of_torch(world: World) -> None:
    """On one layout, tensors shaped like the parameter are cut as it is, in `state_dict()` and after a load."""
    mesh = world.mesh(world.size)
    for name in CONFIGURATIONS:
        undisturbed = Training(name).train(range(4)).values()
        first = Training(name, mesh).train(range(2))
        saved = first.optimizer.state_dict()
        params = [p for group in first.optimizer.param_groups for p in group["params"]]
        for index, entries in saved["state"].items():
            for key, value in entries.items():
                if isinstance(value, Tensor) and value.dim() and value.shape == params[index].shape:
                    assert isinstance(value, DTensor) and value.placements == params[index].placements, key  # type: ignore[attr-defined]
        second = Training(name, mesh)
        second.model.load_state_dict(first.model.state_dict())
        second.optimizer.load_state_dict(saved)
        _same(second.train(range(2, 4)).values(), undisturbed, name)


def state_made_early(world: World) -> None:
    """`init_state()` makes the state that the first step would make, cut as the parameters, and moves nothing."""
    mesh = world.mesh(world.size)
    for name in CONFIGURATIONS:
        if "NAdam" in name:
            continue  # it counts the step in which it makes its state
        run = Training(name, mesh)
        before = run.values()
        run.optimizer.init_state()
        _same(run.values(), before, f"{name}: init_state has moved")
        for p in run.model.parameters():
            for key, value in run.optimizer.state[p].items():
                assert isinstance(value, DTensor) == (value.dim() > 0 and value.shape == p.shape), key
        _same(run.train(range(2)).values(), Training(name).train(range(2)).values(), name)


def read_before_the_first_step(world: World) -> None:
    """Before the first step torch makes state with a step of its own: nothing moves, and the run is one device's.

    (On one device, too, the base counts that step.)
    """
    mesh = world.mesh(world.size)
    for name in (ADAMW, "Magma, Lion"):
        for flatten in (False, True):
            single = Training(name)
            single.state(flatten)
            undisturbed = single.train(range(2)).values()
            run = Training(name, mesh)
            before = run.values()
            state = run.state(flatten)
            _same(run.values(), before, f"{name}: reading has moved")
            fresh = Training(name, mesh)
            set_optimizer_state_dict(
                fresh.model, fresh.optimizer, state["optimizer"], options=fresh.options(flatten=flatten)
            )
            _same(fresh.train(range(2)).values(), undisturbed, name)


def zero_redundancy(world: World) -> None:
    """Each rank wraps its share of the parameters. A state consolidated on one resumes on all, bit for bit."""

    def build() -> Any:
        make = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(n, 4, generator=make)) for n in range(3, 9)]
        bound = SelectiveUpdate.bind(torch.optim.AdamW, policy=RandomMask(), preconditioner=Soap(refresh_every=2))
        return params, ZeroRedundancyOptimizer(params, bound, lr=0.01)

    def train(params: list[Tensor], opt: Any, first: int, last: int) -> None:
        for step in range(first, last):
            make = torch.Generator().manual_seed(step)
            for p in params:
                p.grad = torch.randn(p.shape, generator=make)
            opt.step()

    params, opt = build()
    train(params, opt, 0, 5)
    opt.consolidate_state_dict()
    saved = [opt.state_dict() if world.rank == 0 else None]
    torch.distributed.broadcast_object_list(saved)
    again, resumed = build()
    with torch.no_grad():
        for new, p in zip(again, params, strict=True):
            new.copy_(p)
    resumed.load_state_dict(copy.deepcopy(saved[0]))
    train(params, opt, 5, 9)
    train(again, resumed, 5, 9)
    assert 0 < len(resumed.optim.state) < len(params)
    assert all(torch.equal(a, b) for a, b in zip(params, again, strict=True))
