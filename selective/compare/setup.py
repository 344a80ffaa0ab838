"""Setup: all that a run needs. The configuration, the task, and the functions that make optimizers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from selective.base.by_name import optimizer_class
from selective.compare.config import CompareConfig, ConfigError
from selective.compare.gpt_task import GPTTask
from selective.compare.optimizers import RECIPE, Maker, recipe_maker, takes_rest_lr
from selective.compare.references import load_object, load_task
from selective.compare.task import check_is_task, facts_of, name_of


@dataclass(frozen=True)
class Given:
    """The Python objects that were handed over, under the names that the configuration has for them.

    It is pickled for workers, in which everything else is loaded by its name. The base is apart from `makers`, because
    a contender may have the same name.
    """

    task: Any = None
    makers: Mapping[str, Maker] = field(default_factory=dict)
    base: Maker | None = None


@dataclass(frozen=True)
class Setup:
    """A comparison that is ready to run."""

    config: CompareConfig
    task: Any
    makers: Mapping[str, Maker]  # the functions of `optimizers`, by their names in the configuration
    base: Maker | None = None  # the base, if it was handed over

    @property
    def built_in(self) -> bool:
        """True if the task is the one that `selective compare` has itself."""
        return self.config.task is None

    def facts(self) -> dict[str, Any]:
        """The JSON data that identifies model and data, under the key that it has in the files."""
        if self.built_in:
            return {"text": self.task.facts()}
        return {"task": {"name": name_of(self.task), **facts_of(self.task)}}


def prepare(config: CompareConfig, given: Given | None = None) -> Setup:
    """Load the task and the functions that the configuration names, unless they are given. Raises ConfigError."""
    given = Given() if given is None else given
    task = given.task
    if task is not None:
        check_is_task(task, f"task {config.task}")
    elif config.task is not None:
        task = load_task(config.task)
    else:
        task = GPTTask(config.model, config.data, config.loop.batch, config.loop.evaluate_windows)
    makers = dict(given.makers)
    for name in config.optimizers:
        if name not in makers:
            makers[name] = _maker(name)
    everyone = [*([] if given.base is None else [(config.base, given.base)]), *makers.items()]
    deaf = [name for name, maker in everyone if config.rest_lr and not takes_rest_lr(maker)]
    if deaf:
        raise ConfigError(
            f"rest_lr: {', '.join(deaf)} would not get the second learning rate, because it takes the model; give it a "
            "parameter rest_lr, or leave rest_lr out"
        )
    return Setup(config, task, makers, given.base)


def _maker(reference: str) -> Maker:
    what = f"optimizer {reference}"
    if reference.startswith(RECIPE):
        try:
            return recipe_maker(reference.removeprefix(RECIPE))
        except ValueError as error:
            raise ConfigError(f"{what}: {error}") from error
    if ":" not in reference:
        try:
            return optimizer_class(reference)
        except ValueError as error:
            raise ConfigError(
                f"{what}: {reference!r} names no object; write module:name, or path/to/file.py:name. As a name of a "
                f"class it is unknown: {error}"
            ) from error
    maker: Any = load_object(reference, what)
    if not callable(maker):
        raise ConfigError(
            f"{what} is a {type(maker).__name__}; a function that makes an optimizer of (params, lr) or (model, lr) is "
            "needed"
        )
    return cast(Maker, maker)
