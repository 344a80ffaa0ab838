"""Newton-Schulz as the library's Muon has it, for transcriptions that are compared with fused capture."""

from __future__ import annotations

from torch import Tensor

from selective.kernels import newton_schulz_


def in_a_stack(matrix: Tensor) -> Tensor:
    """The orthogonalised matrix, of a stack of its own: on a CPU, the bits do not depend on the others in a stack."""
    stack = matrix[None].clone()
    newton_schulz_([stack], [1.0], steps=5, coefficients=(3.4445, -4.775, 2.0315), eps=1e-7)
    return stack[0]
