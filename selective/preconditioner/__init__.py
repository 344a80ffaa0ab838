"""The stage before: rotate the gradients into a space where their covariance is nearly diagonal."""

from selective.preconditioner.base import Carry, Preconditioner, Shape, State, preconditioner_from
from selective.preconditioner.eigenbasis import Eigenbasis
from selective.preconditioner.named import AdaDiag, Soap

__all__ = ["AdaDiag", "Carry", "Eigenbasis", "Preconditioner", "Shape", "Soap", "State", "preconditioner_from"]
