"""A step on shards of tensors that selects what a step on the whole tensors selects. Any device, plain torch.

`kernels/reference` says what is right; here the same is computed from local parts and a few sums over processes. On a
GPU `kernels/gpu/sharded/step.py` does it for most (`by_kernels.py`).
"""

from .exchange import Exchange, Steps, in_order, run
from .gpu_path import can_be
from .how import How
from .own_code import alone, mask_report, smallest, totals
from .selective_step import count_rounds, is_local, sharded_step

__all__ = [
    "Exchange", "How", "Steps", "alone", "can_be", "count_rounds", "in_order", "is_local", "mask_report", "run",
    "sharded_step", "smallest", "totals",
]  # fmt: skip
