"""`ChainedOptimizer` over sharded parameters: FSDP2 against one process, shared collectives, DCP."""

from __future__ import annotations

from typing import Any

import torch
from sharded_cases_traffic import counted
from sharded_cases_training import TOLERANCE, by_rows
from sharded_runs import whole
from sharded_world import World
from small_llama import BATCH, batch, loss_of, small_llama
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim import SGD, AdamW

from selective import MGUP, Cautious, ChainedOptimizer, SelectiveUpdate


def _chain(model: nn.Module) -> ChainedOptimizer:
    """MGUP on matrices, random coins with the same seed on half of the vectors, a bare SGD on the other half."""
    params = list(model.parameters())
    matrices, vectors = [p for p in params if p.ndim == 2], [p for p in params if p.ndim != 2]
    return ChainedOptimizer(
        {
            "matrices": SelectiveUpdate(AdamW(matrices, lr=1e-2), policy=MGUP()),
            "coins": SelectiveUpdate(AdamW(vectors[::2], lr=1e-2), policy="RandomMask"),
            "bare": SGD(vectors[1::2], lr=1e-2, momentum=0.9),
        }
    )


def _train(model: Any, optimizer: ChainedOptimizer, steps: range, data: Any = None) -> list[Tensor]:
    size = BATCH // (1 if data is None else data.size())
    first = 0 if data is None else data.get_local_rank() * size
    for step in steps:
        loss_of(model, batch(step)[first : first + size]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [whole(p.detach()) for p in model.parameters()]


def _apart(found: list[Tensor], wanted: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))


def trains_as_on_one_device(world: World) -> None:
    mesh = world.mesh(world.size)
    alone, model = small_llama(), small_llama()
    by_rows(model, mesh)
    found = _train(model, _chain(model), range(6), mesh)
    wanted = _train(alone, _chain(alone), range(6))
    apart = _apart(found, wanted)
    assert apart < TOLERANCE, apart


def goes_on_from_a_flattened_checkpoint(world: World) -> None:
    mesh, options = world.mesh(world.size), StateDictOptions(flatten_optimizer_state_dict=True)
    model, fresh = small_llama(), small_llama()
    for one in (model, fresh):
        by_rows(one, mesh)
    optimizer, resumed = _chain(model), _chain(fresh)
    _train(model, optimizer, range(3), mesh)
    weights, state = get_state_dict(model, optimizer, options=options)
    state = {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}
    weights = {key: value.clone() for key, value in weights.items()}
    wanted = _train(model, optimizer, range(3, 5), mesh)
    set_state_dict(fresh, resumed, model_state_dict=weights, optim_state_dict=state, options=options)
    found = _train(fresh, resumed, range(3, 5), mesh)
    assert _apart(found, wanted) == 0.0


def members_share_their_collectives(world: World) -> None:
    """Three members make as many all-reduces as one of three groups: those of the policy that asks most often."""
    mesh = world.mesh(world.size)
    whole_tensors = [torch.randn(8, 4), torch.randn(6, 3), torch.randn(5)]
    policies = [MGUP(), MGUP(tau=0.3), Cautious()]
    params = [nn.Parameter(distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None)) for x in whole_tensors]
    optimizer = ChainedOptimizer(
        [SelectiveUpdate(AdamW([p]), policy=policy) for p, policy in zip(params, policies, strict=True)]
    )
    for p in params:
        p.grad = torch.ones_like(p)
    with counted() as together:
        optimizer.step()
    with counted() as apart:
        for one in optimizer.members:
            one.step()
    assert (len(together), len(apart)) == (5, 11), (together, apart)


def skipped_by_all_members_on_all_ranks(world: World) -> None:
    """A gradient that is not finite in one rank's part of one member: no member moves on any rank."""
    mesh = world.mesh(world.size)
    params = [nn.Parameter(distribute_tensor(torch.ones(8, 4), mesh, [Shard(0)], src_data_rank=None)) for _ in range(2)]
    optimizer = ChainedOptimizer(
        [SelectiveUpdate(AdamW([p], lr=0.1), policy=MGUP(), on_nonfinite="skip") for p in params]
    )
    for step, is_finite in enumerate((True, False, True)):
        before = [whole(p.detach()) for p in params]
        for p in params:
            p.grad = torch.ones_like(p)
        if not is_finite and world.rank == 1:
            params[1].grad.to_local().fill_(float("nan"))  # type: ignore[union-attr]
        optimizer.step()
        moved = [not torch.equal(whole(p.detach()), was) for p, was in zip(params, before, strict=True)]
        assert moved == [is_finite] * 2, (step, moved)
