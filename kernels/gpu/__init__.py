"""The GPU path: the same functions as `kernels/reference`, as Triton kernels. Importing this imports Triton.

The code that runs on the host is here:

- `plan.py` has the functions `selective_step` and `selective_steps`, of one and of several lists of tensors.
  `batches.py` finds the tensors that can be launched together, and `kept_plans.py` keeps what was found for the next
  step. `batch.py` and `tables.py` keep the tables of tensors, `groups.py` those of groups, and `configure.py` makes the
  constants that are compiled in. `eligible.py` says which tensors the kernels can take.
- `launch.py` has the launches of a step in order, and `direct.py` makes them without Triton's dispatcher. `graphs.py`
  says when they are recorded and replayed, `cuda_graphs.py` records them in a CUDA graph.
- `top_k.py` has the function `top_k`, of one tensor of scores. `functions.py` compiles and evaluates a user's own
  function. `products.py` has products of float32 matrices, and averages of Gram matrices, `matrices.py` norm control.

The code that runs on the GPU is in `device/`:

- `selective_step.py` has the kernel that passes over everything; `rules.py`, `selections.py` and `strengths.py` are its
  parts.
- `numbers.py` fills in each tensor's numbers, `sums.py` adds up what strengths and statistics need.
- `control.py` and `limit.py` draw as many coordinates as a policy selects: its matched control.
- `scores.py` and `top_k/` find the K-th score: `bracket.py` from a sample, `settle.py`, `repair.py`, and `small.py` for
  small tensors.
- `products.py` multiplies float32 matrices on tensor cores. `matrices.py` copies, adds up and turns matrices.
- `config.py`, `elements.py`, `random.py` and `rounding.py` are shared by all.

`sharded/` steps parts of tensors that other ranks have the rest of: `plan.py` and `step.py` on the host, and the
kernels in `top_k.py` and `sums.py`.
"""

from .eligible import unsupported
from .functions import INTERPRETED, evaluate, jitted
from .kept_plans import parts, plan_of
from .matrices import hold_matrices_, holds, norm_sums, turn_matrices_
from .plan import selective_step, selective_steps
from .products import average_grams_, float32_product, multiplies
from .sharded.step import ShardKernels
from .top_k import ranks, top_k

__all__ = [
    "INTERPRETED", "ShardKernels", "average_grams_", "evaluate", "float32_product", "hold_matrices_", "holds", "jitted",
    "multiplies", "norm_sums", "parts", "plan_of", "ranks", "selective_step", "selective_steps", "top_k",
    "turn_matrices_", "unsupported",
]  # fmt: skip
