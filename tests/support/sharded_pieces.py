"""Tensors by rows over several ranks in one process, as items of a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from selective.kernels import AdamRule, Item, ItemList, LionRule, Rule, SGDRule
from selective.kernels.spec import Shard

SHAPES = [(7, 5), (2, 3), (12,), (1, 4), (9, 2, 2)]  # on four ranks, some have no part of the second and fourth


def values(shape: tuple[int, ...], seed: int, kind: str) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if kind == "ties":
        return (x * 1.5).round() / 2
    if kind == "zeros":
        return torch.where(x > 1, x, 0.0)
    if kind == "strange":
        return torch.where(x > 1.5, torch.nan, torch.where(x < -1.5, torch.inf, x))
    return x


def state_of(rule: Rule, shape: tuple[int, ...], seed: int, kind: str) -> dict[str, Tensor]:
    momentum = values(shape, 100 + seed, kind if kind != "strange" else "plain")
    if kind == "first" and seed % 2:
        momentum = torch.zeros_like(momentum)
    if isinstance(rule, SGDRule):
        return {"momentum_buffer": momentum} if rule.momentum else {}
    if isinstance(rule, LionRule):
        return {"exp_avg": momentum}
    found = {"exp_avg": momentum, "exp_avg_sq": momentum.square() + 0.1}
    found |= {"max_exp_avg_sq": momentum.square() + 0.2} if rule.amsgrad else {}  # type: ignore[union-attr]
    return found


def shards(
    rule: Rule, ranks: int, kind: str, dtype: torch.dtype, seed: int = 0,
    shapes: Sequence[tuple[int, ...]] = SHAPES, device: str = "cpu",
) -> list[ItemList]:  # fmt: skip
    """The rows of all tensors on each rank, as `fully_shard` cuts them."""
    found = [ItemList() for _ in range(ranks)]
    for address, shape in enumerate(shapes):
        whole = {"param": values(shape, seed, "plain").to(dtype), "grad": values(shape, seed + 50, kind).to(dtype)}
        whole |= state_of(rule, shape, seed, kind)
        seed += 1
        size = -(-shape[0] // ranks)
        for rank in range(ranks):
            start, stop = min(rank * size, shape[0]), min((rank + 1) * size, shape[0])
            here = {name: x[start:stop].clone().to(device) for name, x in whole.items()}
            run = ((start, stop - start),) if stop > start else ()
            runs = (run, *(((0, n),) for n in shape[1:]))
            shard = Shard(shape, runs, None, pieces=ranks, places=(rank,), stretches=True, row_stretches=True)
            param, grad = here.pop("param"), here.pop("grad")
            step = {"step": torch.tensor(3.0)} if isinstance(rule, AdamRule) else {}
            found[rank].append(Item(param, grad, {**here, **step}, address, {}, shard))
    return found
