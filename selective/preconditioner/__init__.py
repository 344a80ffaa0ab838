"""Preconditioners: they rotate gradients into a space where their covariance is nearly diagonal."""

from selective.preconditioner.base import (
    Carry,
    LargeSide,
    Preconditioner,
    Refreshed,
    Shape,
    Side,
    State,
    preconditioner_from,
)
from selective.preconditioner.eigenbasis import Eigenbasis
from selective.preconditioner.matrices import MatrixView, as_matrix, check_matrix_view, matrix_shape
from selective.preconditioner.named import AdaDiag, Soap

__all__ = [
    "AdaDiag",
    "Carry",
    "Eigenbasis",
    "LargeSide",
    "MatrixView",
    "Preconditioner",
    "Refreshed",
    "Shape",
    "Side",
    "Soap",
    "State",
    "as_matrix",
    "check_matrix_view",
    "matrix_shape",
    "preconditioner_from",
]
