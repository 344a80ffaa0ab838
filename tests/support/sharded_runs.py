"""The same run twice, on whole tensors in one process and on their shards. Gradients are given, so bits compare.

Whole tensors are stepped by the reference kernels, whose operations the sharded step uses, too. The CPU's fast path
leaves the arithmetic to torch's fused optimizers, which round differently in the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from older_torch import cuts_strided_shards_evenly_only
from pytorch_optimizer import Lion
from sharded_world import World
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.optim import Optimizer

from selective import SelectiveUpdate
from selective.kernels import Backend, use_backend

# 7 rows over 4 ranks; rows without a gradient (massive ties); vectors; fewer rows than ranks, for empty shards
SHAPES = [(7, 5), (24, 6), (5,), (1,), (4, 1), (2, 9), (3, 4, 2)]
Params = list[nn.Parameter] | list[dict[str, Any]]
Make = Callable[[Params], Optimizer]
Place = Callable[[Tensor], list[Any]]


def strided(tensor: Tensor) -> list[Any]:
    """The last dimension cut twice, the outer cut within the inner one, as tensor parallelism under FSDP2 leaves it."""
    last = tensor.dim() - 1
    if tensor.shape[last] % 4 and cuts_strided_shards_evenly_only():
        return [Replicate(), Shard(last)]
    return [_StridedShard(last, split_factor=2), Shard(last)]


def adamw(params: Params) -> Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)


def sgd(params: Params) -> Optimizer:
    return torch.optim.SGD(params, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.01)


def lion(params: Params) -> Optimizer:
    # the base's own step, which dense groups take, can't mix tensors and DTensors in one foreach operation
    return Lion(params, lr=1e-3, weight_decay=0.1, foreach=False)


def nadam(params: Params) -> Optimizer:
    return torch.optim.NAdam(params, lr=1e-2, weight_decay=0.1)


def rows(tensor: Tensor) -> list[Any]:
    return [Shard(0)]


def columns(tensor: Tensor) -> list[Any]:
    """The placement that cuts the last dimension."""
    return [Shard(tensor.dim() - 1)]


@dataclass
class Run:
    """A list of parameters and the optimizer over them. Without a `mesh`, they are whole, in this process alone.

    A tuple of policies makes a group of parameters for each. Their collectives are sent together, so that this costs
    little more time than one policy.
    """

    base: Make
    options: dict[str, Any]
    mesh: Any = None
    place: Place = rows
    shapes: Sequence[tuple[int, ...]] = tuple(SHAPES)
    dtype: torch.dtype = torch.float32
    backend: Backend = "reference"
    params: list[nn.Parameter] = field(default_factory=list)

    def __post_init__(self) -> None:
        values, options = torch.Generator().manual_seed(0), dict(self.options)
        policies = options.pop("policy", None)
        groups: list[dict[str, Any]] = []
        for policy in policies if isinstance(policies, tuple) else (policies,):
            starts = [torch.randn(s, generator=values, dtype=torch.float64) for s in [*self.shapes, ()]]
            params = [nn.Parameter(self.cut(start.to(self.dtype))) for start in starts]
            groups.append({"params": params, "policy": policy})
            self.params += params
        self.optimizer = SelectiveUpdate(self.base(groups), **options)

    def cut(self, whole: Tensor) -> Tensor:
        """Make a DTensor. The 0-d parameter stays whole on every rank, like one that FSDP ignores."""
        if self.mesh is None or whole.dim() == 0:
            return whole
        return distribute_tensor(whole.clone(), self.mesh, self.place(whole), src_data_rank=None)

    def step(self, number: int, nan: bool | Collection[int] = False) -> None:
        """Take one step with the gradients of that number. `nan`: those with NaN, by index; True: all."""
        values = torch.Generator().manual_seed(100 + number)
        for index, p in enumerate(self.params):
            grad = torch.randn(p.shape, generator=values, dtype=torch.float64).to(self.dtype)
            if p.dim() > 1 and p.shape[0] == 24:
                grad[3:20] = 0  # as in an embedding, rows of tokens that are not in the batch
            if p.dim() > 1 and (nan is True or (nan and index in nan)):
                grad.view(-1)[::3] = float("nan")
            p.grad = self.cut(grad)
        with use_backend(self.backend):
            self.optimizer.step()

    def train(self, steps: Sequence[int], nan: bool | Collection[int] = False) -> Run:
        for number in steps:
            self.step(number, nan)
        return self

    def values(self) -> list[Tensor]:
        return [whole(p.detach()) for p in self.params]

    def statistics(self) -> dict[str, dict[str, float]]:
        return {p: {k: float(v) for k, v in one.items()} for p, one in self.optimizer.statistics().items()}


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def parts(ours: Run, single: Run) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's part of each parameter, and what it is a part of on one device. Nothing is sent."""
    for mine, theirs in zip(ours.params, single.params, strict=True):
        yield local(mine.detach()), local(ours.cut(theirs.detach()))


def local(tensor: Any) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def compare(ours: Run, single: Run, what: str) -> None:
    """Require the same bits of every parameter, and the same statistics up to the rounding of their sums.

    Float32 products are summed in float64 in another order, and rounded to float32: two roundings of 2^-24. The norm
    after the mask comes from two sums.
    """
    for index, (mine, theirs) in enumerate(parts(ours, single)):
        assert torch.equal(mine.nan_to_num(7.5), theirs.nan_to_num(7.5)), f"{what}: parameter {index}"
    if single.optimizer.runner.report is None:
        return
    reported = ours.statistics()
    for name, wanted in single.statistics().items():
        for key, value in reported[name].items():
            close = abs(value - wanted[key]) <= 1e-6 * max(abs(wanted[key]), 1e-3)
            assert close or value != value, f"{what}: {name} {key} {value} {wanted[key]}"


def layouts(world: World, everywhere: bool = True, number: int | None = None) -> dict[str, tuple[Any, Place]]:
    """Return layouts: rows and columns over 1 to 4 ranks (only some without `everywhere`), two-dimensional meshes.

    With a `number` only two of them, others for each number: in five numbers every layout comes about twice.
    """
    found: dict[str, tuple[Any, Place]] = {}
    for size in range(1, world.size + 1):
        mesh = world.mesh(size)
        if everywhere or size == 3:
            found[f"{size} rows"] = mesh, rows
        if everywhere or size == 2:
            found[f"{size} columns"] = mesh, columns
    if world.size == 4:
        mesh = world.mesh(2, 2, names=("dp", "tp"))
        found["hsdp"] = mesh, lambda t: [Replicate(), Shard(0)]
        found["rows and columns"] = mesh, lambda t: [Shard(0), Shard(t.dim() - 1)]
        found["strided"] = mesh, strided
    names = list(found)
    if number is not None:
        names = [names[at % len(names)] for at in (number, number + 2)]
    return {name: found[name] for name in names if found[name][0] is not None}
