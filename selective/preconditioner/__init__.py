"""The stage before: rotate the gradients into a space where their covariance is nearly diagonal."""

from selective.preconditioner.base import Carry, Preconditioner, Shape, State, preconditioner_from

__all__ = ["Carry", "Preconditioner", "Shape", "State", "preconditioner_from"]
