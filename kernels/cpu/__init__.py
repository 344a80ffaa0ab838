"""The CPU path: the same functions as `kernels/reference`, over chunks that stay in the cache."""

# In this order: `selective_step.py` imports the module `top_k`, whose function takes the name afterwards.
from .selective_step import selective_step
from .top_k import top_k

__all__ = ["selective_step", "top_k"]
