"""The definition: every kernel in plain torch over whole tensors. Never synchronises a GPU with the host."""

from .matrices import hold_matrices_, norm_sums, turn_matrices_, turned_matrices
from .newton_schulz import newton_schulz_
from .products import average_grams_, float32_product
from .random import SAMPLE_SIZE, sample_positions, uniform, uniform_bits
from .rules import Advanced, advance, apply_mask, decay_factor
from .selective_step import selective_step
from .top_k import top_k

__all__ = [
    "SAMPLE_SIZE",
    "Advanced",
    "advance",
    "apply_mask",
    "average_grams_",
    "decay_factor",
    "float32_product",
    "hold_matrices_",
    "newton_schulz_",
    "norm_sums",
    "sample_positions",
    "selective_step",
    "top_k",
    "turn_matrices_",
    "turned_matrices",
    "uniform",
    "uniform_bits",
]
