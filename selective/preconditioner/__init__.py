"""The stage before: rotate the gradients into a space where their covariance is nearly diagonal."""

from selective.preconditioner.base import Carry, Preconditioner, Shape, State, preconditioner_from
from selective.preconditioner.matrices import MatrixView, as_matrix, check_matrix_view, matrix_shape

__all__ = [
    "Carry",
    "MatrixView",
    "Preconditioner",
    "Shape",
    "State",
    "as_matrix",
    "check_matrix_view",
    "matrix_shape",
    "preconditioner_from",
]
