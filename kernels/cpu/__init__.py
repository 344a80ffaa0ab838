"""The CPU path: the same functions as `kernels/reference`, over chunks that stay in the cache."""

from .selective_step import selective_step
from .top_k import top_k

__all__ = ["selective_step", "top_k"]
