"""Parameters that a training stack joined into one flat vector after the optimizer was wrapped (DeepSpeed's ZeRO).

Such a stack makes one vector of each parameter group, keeps the part of it that belongs to this rank, and puts that in
place of the group's parameters. Where one tensor ends and the next begins can't be seen in it any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def shapes_of(params: Sequence[Tensor]) -> list[torch.Size]:
    """The shapes of a group's parameters; that of a scalar for those which have no shape before their first forward."""
    return [torch.Size() if nn.parameter.is_lazy(p) else p.shape for p in params]


def are_joined(shapes: Sequence[torch.Size], params: Sequence[Tensor]) -> bool:
    """Say whether `params`, one flat vector, stands for all of a group's earlier parameters, which had these `shapes`.

    The vector may be one rank's part of it. It is no `nn.Parameter`: those belong to a model, and were put there by
    somebody who changed the model.
    """
    if len(params) != 1 or params[0].dim() != 1 or isinstance(params[0], nn.Parameter):
        return False
    if all(len(shape) == 1 for shape in shapes) and len(shapes) < 2:
        return False
    return params[0].numel() * _ranks() >= sum(shape.numel() for shape in shapes)


def _ranks() -> int:
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1


def refuse_joined(number: int, shapes: Sequence[torch.Size], params: Sequence[Any]) -> None:
    """Raise the error for the group of this number."""
    raise ValueError(
        f"SelectiveUpdate: param_groups[{number}] had {len(shapes)} tensors when it was wrapped and holds one flat "
        f"vector of {params[0].numel():,} elements now: a training stack joined them, as DeepSpeed does with "
        f"ZeRO stages 1 to 3 and with its bfloat16 optimizer. Policies select within a tensor, preconditioners rotate "
        f"matrices, and neither can be seen in the vector. Use FSDP2 (torch.distributed.fsdp.fully_shard), which keeps "
        f"them; or DeepSpeed with stage 0; or policy=Dense() without a preconditioner and without a selective decay: "
        f"that is the base itself"
    )
