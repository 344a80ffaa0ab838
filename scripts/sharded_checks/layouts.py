"""The layouts: each cuts a model over all ranks, as its users do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from .model import Llama
from .processes import Ranks

# Each with the number of ranks of which the number of processes has to be a multiple.
LAYOUTS = {"fsdp": 1, "fsdp-columns": 1, "hsdp": 2, "fsdp-tp": 2, "ddp": 1}
UNSHARDED = {"fsdp": "columns", "fsdp-columns": "rows", "hsdp": "columns", "fsdp-tp": "columns"}


def unfit(layout: str, size: int) -> str | None:
    """Return in words why so many processes can't have this layout; None if they can."""
    if size % LAYOUTS[layout]:
        return f"{layout} needs a multiple of {LAYOUTS[layout]} processes, not {size}"
    return None


class Bag(nn.Module):
    """Parameters without a model, for gradients that are given."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(params)


@dataclass(frozen=True)
class Layout:
    """One layout over all ranks."""

    name: str
    ranks: Ranks

    @property
    def batches(self) -> tuple[int, int]:
        """The number of this rank's share of a batch, and the number of shares."""
        if self.name == "fsdp-tp":
            return self.ranks.rank // 2, self.ranks.size // 2
        return self.ranks.rank, self.ranks.size

    def cut_bag(self, bag: Bag, both_ways: bool = True) -> nn.Module:
        """Cut loose parameters. Under "fsdp-tp" every second matrix is cut both ways, unless that is not wanted."""
        if self.name == "fsdp-tp":
            tp = self.ranks.mesh(dp=self.ranks.size // 2, tp=2)["tp"]
            for index, p in enumerate(bag.weights):
                dim = index % 2 if both_ways else 0
                if p.dim() > 1 and p.shape[dim] % self.ranks.size == 0:  # torch cuts strided shards evenly
                    bag.weights[index] = nn.Parameter(distribute_tensor(p.detach(), tp, [Shard(dim)]))
        return self._over_data(bag, [])

    def cut_model(self, model: Llama) -> nn.Module:
        """Cut a model, its blocks first."""
        if self.name == "fsdp-tp":
            tp = self.ranks.mesh(dp=self.ranks.size // 2, tp=2)["tp"]
            plan: dict[str, Any] = {name: ColwiseParallel() for name in ("q", "k", "v", "gate", "up")}
            plan |= {name: RowwiseParallel() for name in ("o", "down")}
            for block in model.blocks:
                parallelize_module(block, tp, plan)
        return self._over_data(model, list(model.blocks))

    def _over_data(self, model: nn.Module, blocks: list[nn.Module]) -> nn.Module:
        """Cut over the ranks that have batches of their own, or replicate."""
        if self.name == "ddp":
            return DistributedDataParallel(model)
        how: dict[str, Any] = {"mesh": self._mesh()}
        if self.name == "fsdp-columns":
            how["shard_placement_fn"] = lambda p: _last_dimension(p, self.ranks.size)
        for module in (*blocks, model):
            fully_shard(module, **how)
        return model

    def _mesh(self) -> Any:
        if self.name == "hsdp":
            return self.ranks.mesh(replicate=self.ranks.size // 2, shard=2)
        if self.name == "fsdp-tp":
            return self.ranks.mesh(dp=self.ranks.size // 2, tp=2)["dp"]
        return self.ranks.mesh(shard=self.ranks.size)


def _last_dimension(p: nn.Parameter, ranks: int) -> Shard:
    """FSDP2 cuts rows unevenly, and other dimensions evenly only."""
    return Shard(p.dim() - 1 if p.shape[-1] % ranks == 0 else 0)


def cut_like(whole: Tensor, p: Tensor) -> Tensor:
    """Cut a whole tensor as the parameter is cut."""
    if not isinstance(p, DTensor):
        return whole.clone()
    return distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor. On DTensors that is a collective."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
