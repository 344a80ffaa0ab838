"""Rotation: taking a group's gradients into the space of their preconditioner, and carrying the base's moments."""
