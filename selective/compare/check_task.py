"""Tries a task once before its runs, so that a mistake is one message instead of a failure of every run."""

from __future__ import annotations

import math
import traceback
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from selective.base.generators import generators_restored
from selective.compare.config import ConfigError
from selective.compare.setup import Setup
from selective.compare.task import Batches, evaluated, name_of, start_of, to_device
from selective.compare.train import fingerprint
from selective.parameter import is_lazy


def try_out(setup: Setup) -> None:
    """Make the first seed's model and batch twice, take the loss, and evaluate. Raises ConfigError.

    The model and the batch have to be the same both times: contenders are compared from the same start on the same
    batches.
    """
    task, seed, device = setup.task, setup.config.seeds[0], setup.config.device
    name = name_of(task)
    with generators_restored():
        try:
            model, again = start_of(task, seed), start_of(task, seed)
            batch, other = Batches(task, seed).at(0), Batches(task, seed).at(0)
            if _share(model, again):
                raise ConfigError(
                    f"two calls of {name}.model({seed}) return the same parameters, so that a run would go on from "
                    "where the run before it ended; make a new model in each call, such as copy.deepcopy(a loaded one)"
                )
            if fingerprint(model) != fingerprint(again):
                raise ConfigError(
                    f"{name}.model({seed}) makes another model each time; contenders need the same start: draw from "
                    "torch's global generator, which is seeded before, or from one that you seed with `seed`"
                )
            if not _alike(batch, other):
                raise ConfigError(
                    f"the first batch of {name} for seed {seed} is another one each time; contenders need the same "
                    "batches: shuffle with a generator that you seed with `seed`"
                )
            _check_loss(name, task.loss(model.to(device), to_device(batch, device)))
            _check_finite(f"{name}.evaluate", evaluated(task, model, seed))
        except ConfigError:
            raise
        except torch.OutOfMemoryError:
            return  # the runs will say so, and smaller contenders may fit
        except Exception as error:  # the user's own code
            raise ConfigError(
                f"{name} fails when it is tried out, with the model and the batch on {device}: {_where(error)}"
            ) from error


def _where(error: Exception) -> str:
    """The error, and the line of the user's code in which it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "selective/compare" not in frame.filename.replace("\\", "/")]
    place = f" ({own[0].filename}:{own[0].lineno})" if own else ""
    return f"{type(error).__name__}: {error}{place}"


def _check_loss(name: str, loss: Any) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else ""
        raise ConfigError(f"{name}.loss returned a {type(loss).__name__}{shape}; a tensor with one element is needed")
    if not loss.requires_grad:
        raise ConfigError(f"{name}.loss returned a tensor without a gradient; it has to depend on model's parameters")

    _check_finite(f"{name}.loss", loss.item())


def _check_finite(where: str, value: float) -> None:
    if not math.isfinite(value):
        raise ConfigError(f"{where} returned {value} for the model at its start, with which nothing can be compared")


def _share(left: nn.Module, right: nn.Module) -> bool:
    """True if both train the same memory. What is frozen may be shared."""
    return bool(_trained_memory(left) & _trained_memory(right))


def _trained_memory(model: nn.Module) -> set[int]:
    trained = [p for p in model.parameters() if p.requires_grad and not is_lazy(p)]
    return {p.data_ptr() for p in trained} - {0}  # what is empty or on the device "meta" has none


def _alike(left: Any, right: Any) -> bool:
    """True if all tensors in both are the same, bit for bit. What is no tensor is not compared."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.shape == right.shape and left.dtype == right.dtype and _same_bits(left, right)
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(_alike(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(_alike(a, b) for a, b in zip(left, right, strict=True))
    return True


def _same_bits(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left, right) or (torch.equal(left.isnan(), right.isnan()) and torch.equal(
        left.nan_to_num(), right.nan_to_num()
    ))  # fmt: skip
