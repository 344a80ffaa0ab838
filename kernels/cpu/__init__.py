"""The CPU path: the same functions as `kernels/reference`, over chunks that stay in the cache."""

from ..reference import selective_step, top_k

__all__ = ["selective_step", "top_k"]
