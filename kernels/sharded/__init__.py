"""A step on shards of tensors that selects what a step on the whole tensors selects. Any device, plain torch.

`kernels/reference` says what is right; here the same is computed from local parts and a few sums over processes.
"""

from .exchange import Exchange, Steps, in_order, run
from .selective_step import sharded_step

__all__ = ["Exchange", "Steps", "in_order", "run", "sharded_step"]
