"""Rotation: a group's parameters taken into the space of their preconditioner, and their moments carried along."""
