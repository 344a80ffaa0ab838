"""A step on shards of tensors that selects what a step on the whole tensors selects. Any device, plain torch.

`kernels/reference` is the definition; here the same is computed from local parts and a few sums over the ranks. On a
GPU, `kernels/gpu/sharded/step.py` steps most shards instead: `gpu_path.py` says which.
"""

from .exchange import Exchange, Steps, in_order, run
from .gpu_path import can_be
from .own_code import alone, mask_report, smallest, totals
from .selective_step import count_rounds, is_local, sharded_step

__all__ = [
    "Exchange", "Steps", "alone", "can_be", "count_rounds", "in_order", "is_local", "mask_report", "run",
    "sharded_step", "smallest", "totals",
]  # fmt: skip
