"""A step on shards of tensors that selects what a step on the whole tensors selects. Any device, plain torch.

`kernels/reference` says what is right; here the same is computed from local parts and a few sums over processes. On a
GPU `kernels/gpu/shards.py` does it for most (`by_kernels.py`).
"""

from .by_kernels import can_be
from .exchange import Exchange, Steps, in_order, run
from .how import How
from .masks import alone, mask_report, smallest, totals
from .selective_step import count_rounds, is_local, sharded_step

__all__ = [
    "Exchange", "How", "Steps", "alone", "can_be", "count_rounds", "in_order", "is_local", "mask_report", "run",
    "sharded_step", "smallest", "totals",
]  # fmt: skip
