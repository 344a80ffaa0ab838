"""A small Llama, trained in every layout, against one process with an unwrapped model.

Tolerance: gradients are summed over ranks in another order, in float64, so that they are about 1e-16 apart. Adam's
division and 30 steps at a learning rate of 1e-2 may turn that into a thousand times as much in the parameters, 1e-13.
1e-9 is far above that, and far below the effect of one coordinate that is selected differently, which is the learning
rate times the difference of the strengths: 1e-3 and more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sharded_cases_selection import BASES, POLICIES
from sharded_runs import whole
from sharded_world import World
from small_llama import BATCH, SmallLlama, batch, loss_of, small_llama
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from selective import MGUP, Cautious, SelectiveUpdate

TOLERANCE = 1e-9
Cut = Callable[[SmallLlama, Any], None]


def by_rows(model: SmallLlama, mesh: Any) -> None:
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def by_columns(model: SmallLlama, mesh: Any) -> None:
    def place(p: nn.Parameter) -> Shard:
        return Shard(p.dim() - 1)

    for block in model.blocks:
        fully_shard(block, mesh=mesh, shard_placement_fn=place)
    fully_shard(model, mesh=mesh, shard_placement_fn=place)


def tensor_parallel(model: SmallLlama, mesh: Any) -> None:
    """Cut matrices by columns or rows over the mesh's last dimension; norms, embedding and head stay whole."""
    plan: dict[str, Any] = {"attention." + name: ColwiseParallel() for name in "qkv"}
    plan |= {"mlp.gate": ColwiseParallel(), "mlp.up": ColwiseParallel()}
    plan |= {"attention.o": RowwiseParallel(), "mlp.down": RowwiseParallel()}
    for block in model.blocks:
        parallelize_module(block, mesh, plan)


def both(model: SmallLlama, mesh: Any) -> None:
    """FSDP over tensor parallelism: strided shards, matrices cut both ways, norms on the first dimension alone."""
    tensor_parallel(model, mesh["tp"])
    by_rows(model, mesh["dp"])


def trained(
    base: Any,
    options: dict[str, Any],
    steps: int,
    cut: Cut | None = None,
    mesh: Any = None,
    data: Any = None,
    layers: int = 1,
) -> tuple[list[Tensor], list[float]]:
    """Train, and return parameters and losses. `data` is the mesh dimension over which the batch is divided."""
    model = small_llama(layers)
    if cut is not None:
        cut(model, mesh)
    optimizer = SelectiveUpdate(base(list(model.parameters())), **options)
    losses, shares = [], 1 if data is None else data.size()
    for step in range(steps):
        size = BATCH // shares
        first = 0 if data is None else data.get_local_rank() * size
        loss = loss_of(model, batch(step)[first : first + size])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(whole(loss.detach())))
    return [whole(p.detach()) for p in model.parameters()], losses


def _close(found: tuple[list[Tensor], Any], wanted: tuple[list[Tensor], Any], what: str) -> None:
    apart = [float((a - b).abs().max()) for a, b in zip(found[0], wanted[0], strict=True)]
    assert max(apart) < TOLERANCE, f"{what}: {max(apart)} in parameter {apart.index(max(apart))}"


def _layouts(world: World, everywhere: bool) -> dict[str, tuple[Cut, Any, Any]]:
    found: dict[str, tuple[Cut, Any, Any]] = {}
    for size in range(1, world.size + 1) if everywhere else (world.size,):
        mesh = world.mesh(size, names=("dp",))
        found |= {f"{size} rows": (by_rows, mesh, mesh), f"{size} columns": (by_columns, mesh, mesh)}
    pair = world.mesh(2, names=("tp",))
    found["tensor parallel"] = tensor_parallel, pair, None
    mesh = world.mesh(2, 2, names=("dp", "tp"))
    replicated = world.mesh(2, 2, names=("replicate", "shard"))
    found["fsdp x tp"] = both, mesh, mesh["dp"]  # type: ignore[index]
    flat = world.mesh(world.size)
    found["hsdp"] = by_rows, replicated, flat
    return {name: one for name, one in found.items() if one[1] is not None}


def one_policy_everywhere(world: World) -> None:
    wanted = trained(BASES["AdamW"], {"policy": MGUP()}, 4)
    for layout, (cut, mesh, data) in _layouts(world, everywhere=False).items():
        _close(trained(BASES["AdamW"], {"policy": MGUP()}, 4, cut, mesh, data), wanted, layout)


def _every_policy(world: World, base: str) -> None:
    """Train 30 steps on 1 to 4 processes, by rows and columns; for the slow lane."""
    for name, policy in POLICIES.items():
        wanted = trained(BASES[base], {"policy": policy}, 30, layers=2)
        for layout, (cut, mesh, data) in _layouts(world, everywhere=True).items():
            found = trained(BASES[base], {"policy": policy}, 30, cut, mesh, data, layers=2)
            _close(found, wanted, f"{name}, {base}, {layout}")


def every_policy_over_adamw(world: World) -> None:
    _every_policy(world, "AdamW")


def every_policy_over_sgd(world: World) -> None:
    _every_policy(world, "SGD")


def every_policy_over_lion(world: World) -> None:
    _every_policy(world, "Lion")


def local_scope_goes_elsewhere(world: World) -> None:
    """The failing twin: with scope local, shards select other elements."""
    mesh = world.mesh(world.size)
    wanted = trained(BASES["AdamW"], {"policy": MGUP()}, 4)
    found = trained(BASES["AdamW"], {"policy": MGUP(), "scope": "local"}, 4, by_rows, mesh, mesh)
    assert max(float((a - b).abs().max()) for a, b in zip(found[0], wanted[0], strict=True)) > 1e-4


def replicas_stay_together(world: World) -> None:
    """Under HSDP, both replicas of every shard have the same bits, statistics included."""
    mesh = world.mesh(2, 2, names=("replicate", "shard"))
    model = small_llama().float()
    by_rows(model, mesh)
    optimizer = SelectiveUpdate(torch.optim.AdamW(model.parameters(), lr=1e-2), policy=Cautious())
    for step in range(4):
        loss_of(model, batch(step)[3 * world.rank : 3 * world.rank + 3]).backward()
        optimizer.step()
        optimizer.zero_grad()
    mine = torch.cat([p.detach().to_local().flatten() for p in model.parameters()])  # type: ignore[attr-defined]
    told = torch.stack([value for one in optimizer.statistics().values() for value in one.values()])
    bits = torch.cat([mine, told]).view(torch.int32)
    others = [torch.empty_like(bits) for _ in range(2)]
    torch.distributed.all_gather(others, bits, group=mesh.get_group("replicate"))  # type: ignore[union-attr]
    assert torch.equal(others[0], others[1])


def beside_what_is_ignored(world: World) -> None:
    """A parameter that FSDP ignores, whole on every rank, in one group with shards of two meshes."""
    mesh, pair = world.mesh(world.size), world.mesh(2)

    def made(cut: bool) -> tuple[SmallLlama, SelectiveUpdate]:
        model = small_llama()
        if cut:
            fully_shard(model.blocks[0], mesh=mesh)
            if pair is not None:
                fully_shard(model.head, mesh=pair)
        optimizer = SelectiveUpdate(torch.optim.AdamW(model.parameters(), lr=1e-2), policy=MGUP())
        return model, optimizer

    runs = []
    for cut in (False, True):
        model, optimizer = made(cut)
        for step in range(3):
            loss_of(model, batch(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append([whole(p.detach()) for p in model.parameters()])
    _close((runs[1], None), (runs[0], None), "ignored")
