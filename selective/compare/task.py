"""A task: what a comparison trains. It makes a model and batches, and says what the loss is and how to evaluate."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from selective.compare.config import ConfigError
from selective.compare.generators import seed_generators


class Task(Protocol):
    """A training that a comparison repeats: your model on your data.

    Any object with these methods is one; it need not inherit.

    A task also has one of two methods that make the batches:

    - `batches(seed)` returns an iterable, such as a `DataLoader`, a list, or a generator. It is begun again when it
      ends. A run that is resumed draws all earlier batches again and drops them.
    - `batch(seed, step)` returns the batch of one step (0, 1, ...). It depends on its arguments alone, so that a
      resumed run begins at once. If a task has both, this one is used.

    A batch is a tensor, or dicts, lists and tuples of them, or anything with a method `to(device)`. It is moved to the
    device. At the start of each step the global generators of Python, NumPy and torch are seeded from the run's seed
    and the step, so that shuffling and dropout are the same for every contender, and after an interruption.

    Further attributes, all of them optional:

    - `name`: a string for titles; without it, the name of the class.
    - `unit`: what the loss is measured in, for the pictures; "loss" without it.
    - `parts`: weights that are several matrices in one, as in `param_groups_for(parts=...)`, for rotations; "auto"
      without it.
    - `facts()`: a dict of JSON data that identifies model and data. It is written to the results, and a comparison is
      not resumed if it changes.

    Several workers are several processes. A task that is handed over in Python is pickled for them, so its class has to
    be importable: not defined inside of a function.
    """

    def model(self, seed: int, /) -> nn.Module:
        """The model at its start, on the CPU, which `seed` fixes. The global generators are seeded with it before."""
        ...

    def loss(self, model: Any, batch: Any, /) -> Tensor:
        """The loss of a batch, a tensor with one element. The model is in training mode."""
        ...

    def evaluate(self, model: Any, /) -> float:
        """A number that is smaller for better models: the held-out loss, an error rate.

        The model is in evaluation mode and on its device, and no gradients are kept. Held-out data has to be moved
        there: `next(model.parameters()).device`.
        """
        ...


_NEEDED = {
    "model": "model(seed) returns the model at its start",
    "loss": "loss(model, batch) returns a tensor with one element",
    "evaluate": "evaluate(model) returns a number that is smaller for better models",
}


def check_is_task(task: Any, where: str) -> None:
    """Raise ConfigError, which names what is missing, if `task` lacks a method of a task."""
    lacking = [says for name, says in _NEEDED.items() if not callable(getattr(task, name, None))]
    if not any(callable(getattr(task, name, None)) for name in ("batch", "batches")):
        lacking.append("batches(seed) returns an iterable of batches (or batch(seed, step) returns one)")
    if lacking:
        raise ConfigError(f"{where} is no task: it lacks methods:\n  " + "\n  ".join(lacking))


def name_of(task: Any) -> str:
    """The task's name for titles."""
    named = getattr(task, "name", None) or getattr(task, "__name__", None)
    return named if isinstance(named, str) else type(task).__name__


def unit_of(task: Any) -> str:
    """The unit of the task's losses, or "loss" if it names none."""
    return str(getattr(task, "unit", "loss"))


def facts_of(task: Any) -> dict[str, Any]:
    """The JSON data that identifies the task's model and data; empty if it gives none."""
    facts: Any = getattr(task, "facts", None)
    found = facts() if callable(facts) else facts
    if found is None:
        return {}
    try:
        json.dumps(found)
    except TypeError as error:
        raise ConfigError(f"{name_of(task)}.facts: {error}; it has to be a dict of JSON data") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{name_of(task)}.facts is a {type(found).__name__}; it has to be a dict of JSON data")
    return found


class Batches:
    """The batches of one run, by step. Steps are asked for in their order, beginning anywhere."""

    def __init__(self, task: Any, seed: int) -> None:
        self._task, self._seed = task, seed
        self._by_step = callable(getattr(task, "batch", None))
        self._source: Any = None
        self._iterator: Iterator[Any] | None = None
        self._next = 0

    def at(self, step: int) -> Any:
        """The batch of `step`. An iterable is drawn from until there; what was drawn before is dropped.

        The global generators are seeded before each batch, and left so for the step.
        """
        if self._by_step:
            seed_generators(self._seed, step)
            return self._task.batch(self._seed, step)
        batch = None
        while self._next <= step:
            seed_generators(self._seed, self._next)
            batch = self._draw()
            self._next += 1
        return batch

    def _draw(self) -> Any:
        if self._iterator is not None:
            try:
                return next(self._iterator)
            except StopIteration:
                self._iterator = None
        if self._source is None or isinstance(self._source, Iterator):  # an iterator is over for good
            self._source = self._task.batches(self._seed)
        if not isinstance(self._source, Iterable) and not hasattr(self._source, "__getitem__"):
            raise TypeError(
                f"{name_of(self._task)}.batches({self._seed}) returned a {type(self._source).__name__}; an iterable of "
                "batches is needed"
            )
        self._iterator = iter(self._source)
        try:
            return next(self._iterator)
        except StopIteration:
            raise ValueError(f"{name_of(self._task)}.batches({self._seed}) has no batch in it") from None


def to_device(batch: Any, device: str | torch.device) -> Any:
    """The batch on the device: tensors, also in dicts, lists and (named) tuples, and whatever has a method `to`."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        moved = {key: to_device(value, device) for key, value in batch.items()}
        return moved if type(batch) is dict else type(batch)(moved)
    if isinstance(batch, tuple):
        parts = [to_device(value, device) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else tuple(parts)
    if isinstance(batch, list):
        return [to_device(value, device) for value in batch]
    if callable(getattr(batch, "to", None)):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    return batch


def start_of(task: Any, seed: int) -> nn.Module:
    """The task's model at the start of a run, in training mode. The global generators are seeded before."""
    seed_generators(seed, None)
    model = task.model(seed)
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name_of(task)}.model({seed}) returned a {type(model).__name__}; a torch.nn.Module is needed")
    return model.train()


def evaluated(task: Any, model: nn.Module, seed: int) -> float:
    """`task.evaluate(model)` in evaluation mode, without gradients, from the same state of the generators each time."""
    seed_generators(seed, None)
    model.eval()
    try:
        with torch.no_grad():
            value = task.evaluate(model)
    finally:
        model.train()
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, str | Tensor) or not hasattr(value, "__float__"):
        raise TypeError(f"{name_of(task)}.evaluate returned a {type(value).__name__}; one number is needed")
    return float(value)
