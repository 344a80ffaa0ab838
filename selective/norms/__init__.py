"""Norm control: matrices that keep their norm, and are turned by a rate relative to it."""

from selective.norms.norm_control import Norm, NormControl, norm_from

__all__ = ["Norm", "NormControl", "norm_from"]
