"""The GPU path: the same functions as `kernels/reference`, as Triton kernels. Importing this imports Triton.

`plan.py` finds what can be launched together, `batch.py` and `tables.py` keep its tables, `launch.py` has the launches
of a step in order. The kernels: `numbers.py`, `selective_step.py`, `sample.py`, `whole.py`, `settle.py`, `repair.py`,
`statistics.py`, `strengths.py`; what they share: `elements.py`, `selecting.py`, `rules.py`, `top_k.py`, `keys.py`,
`random.py`, `rounding.py`. `shards.py` and `shard_plan.py` step parts of tensors that are shared out over processes,
with two files of kernels more: `counting.py`, `shard_sums.py`.
"""

from .eligible import unsupported
from .functions import INTERPRETED, evaluate, jitted
from .plan import selective_step, step_again
from .sharded.step import ShardKernels
from .top_k import ranks, top_k

__all__ = [
    "INTERPRETED", "ShardKernels", "evaluate", "jitted", "ranks", "selective_step", "step_again", "top_k",
    "unsupported",
]  # fmt: skip
