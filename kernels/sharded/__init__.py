"""A step on shards of tensors that selects what a step on the whole tensors selects. Any device, plain torch.

`kernels/reference` is the definition; here the same is computed from local parts and a few sums over the ranks. On a
GPU, `kernels/gpu/sharded/step.py` steps most shards instead: `gpu_path.py` says which.
"""

from .buckets import buckets_of, is_local, keep_buckets, kept_buckets
from .exchange import Exchange, RunningPart, in_order, run
from .gpu_path import has_gpu_kernel
from .own_code import kth_smallest, mask_report, run_alone, sum_over_shards
from .selective_step import count_rounds, sharded_step

__all__ = [
    "Exchange",
    "RunningPart",
    "buckets_of",
    "count_rounds",
    "has_gpu_kernel",
    "in_order",
    "is_local",
    "keep_buckets",
    "kept_buckets",
    "kth_smallest",
    "mask_report",
    "run",
    "run_alone",
    "sharded_step",
    "sum_over_shards",
]  # fmt: skip
