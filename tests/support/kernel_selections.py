"""Selections with a kernel of their own, and the device on which their tests run it.

Without a CUDA device the kernels are interpreted on CPU tensors; with one, they are compiled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import ClassVar

import numpy
import torch
from pydantic import Field

from selective import Selection
from selective.kernels import use_backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class FarUpdates(Selection):
    """A selection whose kernel is a plain function."""

    threshold: float = Field(6e-4, gt=0)  # not the learning rate, which all first updates of Adam are
    reads: ClassVar = frozenset({"update"})

    @staticmethod
    def kernel(grad, update, momentum, threshold):
        return (update > threshold) | (update < -threshold)

    def select(self, view):
        return view.update.abs() > self.threshold


class AlongTheMomentum(Selection):
    """A selection whose kernel takes all three tensors and four numbers, in another order than the fields."""

    least: float = 0.01
    most: int = 4
    times: float = 1.5
    either: bool = False
    reads: ClassVar = frozenset({"grad", "update", "momentum"})

    @staticmethod
    def kernel(grad, update, momentum, times, either, least, most):
        along = times * momentum * grad
        return ((along > least) & (along < most)) | ((either > 0) & (update * grad > 0))

    def select(self, view):
        along = self.times * view.momentum * view.grad
        inside = (along > self.least) & (along < self.most)
        return inside | (view.update * view.grad > 0) if self.either else inside


@contextlib.contextmanager
def in_kernels() -> Iterator[None]:
    with use_backend("gpu"), numpy.errstate(all="ignore"):  # the interpreter's numpy warns of NaN and overflow
        yield
