"""The configuration of a comparison: one frozen, validated description of model, text, loop and contenders.

A YAML or JSON file and the command line both end here. Unknown keys are errors that name their path. Settings that are
not written have the defaults below.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)

from selective.compare.extras import require
from selective.compare.spaces import AnyPreconditioner
from selective.policies.policy import AnyPolicy


class ConfigError(ValueError):
    """Raised if a comparison can't be run as it is described. The message says what is wrong, where, and what to do."""


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class ModelConfig(_Config):
    """A decoder-only transformer over bytes. The defaults (0.7M parameters) train in seconds on one CPU core."""

    layers: int = Field(3, ge=1)
    width: int = Field(128, ge=2, description="features of a token")
    heads: int = Field(4, ge=1)
    context: int = Field(128, ge=2, description="tokens (bytes) of a training window")

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width is {self.width}, heads is {self.heads}: each head needs an even number of features for its "
                f"rotary positions, so width must be a multiple of {2 * self.heads}"
            )
        return self


class DataConfig(_Config):
    """The text. Without a file: the Python standard library's own source, which is everywhere and real."""

    file: Path | None = None
    max_bytes: int = Field(8_000_000, ge=1, description="of the standard library's source; ignored with a file")
    validation: float = Field(0.1, gt=0, lt=1, description="share of the files (or the end of the one file) held out")


class LoopConfig(_Config):
    """The training loop: cosine schedule with linear warm-up, clipping, decay of the matrices only."""

    batch: int = Field(8, ge=1, description="windows in a step")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    final_lr: float = Field(0.1, ge=0, le=1, description="last learning rate, as a share of the peak")
    clip: float | None = Field(1.0, gt=0, description="largest norm of the whole gradient; null: no clipping")
    weight_decay: float = Field(0.1, ge=0, description="of matrices; vectors are not decayed")
    evaluate_every: int | None = Field(None, ge=1, description="steps; null: about 12 evaluations in a run")
    evaluate_windows: int = Field(64, ge=1, description="held-out windows in an evaluation, the same each time")
    checkpoint_every: int = Field(100, ge=1, description="steps between two checkpoints of a run")


MOST_SEEDS = 10_000


def _seeds(value: Any) -> Any:
    """Turn a count into the seeds 0 to count - 1. A list stays as it is."""
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 1:
            raise ValueError(f"{value} seeds; at least one is needed, and three for a useful interval")
        if value > MOST_SEEDS:  # for example a seed that was meant to be in a list
            raise ValueError(
                f"{value} seeds, and each trains every contender; at most {MOST_SEEDS}, or a list of seeds"
            )
        return tuple(range(value))
    return value


Seed = Annotated[int, Field(ge=0, lt=2**32)]
Rate = Annotated[float, Field(gt=0)]
Role = Literal["policy", "control", "rotation", "optimizer"]


class CompareConfig(_Config):
    """The whole comparison. `threads` changes the rounding of sums; `workers` changes the time only."""

    base: str = Field("AdamW", min_length=1, description="name in torch.optim or pytorch_optimizer, or module:Class")
    base_options: dict[str, JsonValue] = Field(default_factory=dict, description="keyword arguments of the base")
    momentum_beta: float | None = Field(
        None, ge=0, lt=1, description="of the wrapper's own momentum, for bases without"
    )
    lr: tuple[Rate, ...] = Field((1e-3, 3e-3), min_length=1, description="swept, by everyone")
    rest_lr: tuple[Rate, ...] = Field(
        (), description="second learning rates, of embeddings, head and vectors; swept with `lr` in pairs, by everyone"
    )
    rates: dict[Role, Annotated[tuple[Rate, ...], Field(min_length=1)]] = Field(
        default_factory=dict, description="learning rates of these, instead of `lr`, which stays the baseline's"
    )
    imports: tuple[str, ...] = Field((), description="modules to import first: those that define your own policies")
    task: str | None = Field(
        None, min_length=1, description="what is trained: module:name or path/to/file.py:name; null: the built-in GPT"
    )
    policies: tuple[AnyPolicy, ...] = Field((), description="names, or mappings with a `kind`")
    preconditioners: tuple[AnyPreconditioner, ...] = Field(
        (), description="the base and every policy in the space of each, too: adadiag, adadiag++, soap, or a `kind`"
    )
    policies_in_spaces: bool = Field(True, description="also run the policies in each preconditioner's space")
    optimizers: tuple[str, ...] = Field(
        (),
        description="beside the base: functions that make an optimizer, module:name or path/to/file.py:name; "
        "names of classes, as in `base`; or recipe:NAME, a name in selective.RECIPES",
    )
    controls: bool = Field(True, description="each policy beside a random mask of the same share and norm")
    seeds: Annotated[tuple[Seed, ...], BeforeValidator(_seeds)] = Field((0, 1, 2), min_length=1)
    steps: int = Field(400, ge=2)
    model: ModelConfig = Field(default_factory=lambda: ModelConfig.model_validate({}))
    data: DataConfig = Field(default_factory=lambda: DataConfig.model_validate({}))
    loop: LoopConfig = Field(default_factory=lambda: LoopConfig.model_validate({}))
    device: str = "cpu"
    threads: int = Field(1, ge=1, description="of torch, in each worker")
    workers: int | None = Field(None, ge=1, description="runs at the same time; null: as many as there are cores")

    @field_validator("imports")
    @classmethod
    def _import(cls, modules: tuple[str, ...]) -> tuple[str, ...]:
        """Import the modules. Fields are validated in their order, so this comes before the policies' names."""
        for module in modules:
            try:
                importlib.import_module(module)
            except ModuleNotFoundError as error:
                raise ValueError(
                    f"{module} cannot be imported ({error}); name a module without .py. One in the current folder is "
                    "found with PYTHONPATH=."
                ) from error
        return modules

    @model_validator(mode="after")
    def _no_twins(self) -> CompareConfig:
        swept = {f"rates.{role}": rates for role, rates in self.rates.items()}
        names = ("lr", "rest_lr", "seeds", "policies", "preconditioners", "optimizers")
        listed = {name: getattr(self, name) for name in names}
        for name, those in {**listed, **swept}.items():
            values = [repr(value) for value in those]
            twice = sorted({value for value in values if values.count(value) > 1})
            if twice:
                raise ValueError(f"{name} has {', '.join(twice)} more than once; one run of each is enough")
        return self

    @model_validator(mode="after")
    def _only_of_the_built_in_task(self) -> CompareConfig:
        """Refuse settings of the built-in GPT beside a task, which would have no effect."""
        if self.task is None:
            return self
        without = LoopConfig.model_validate({})
        changed = [name for name, kind in (("model", ModelConfig), ("data", DataConfig))
                   if getattr(self, name) != kind.model_validate({})]  # fmt: skip
        changed += [
            f"loop.{name}"
            for name in ("batch", "evaluate_windows")
            if getattr(self.loop, name) != getattr(without, name)
        ]
        if changed:
            raise ValueError(
                f"{', '.join(changed)} is of the built-in GPT, and the task is {self.task}: a task makes its own model "
                "and batches"
            )
        return self

    @property
    def evaluate_every(self) -> int:
        return self.loop.evaluate_every or max(1, self.steps // 12)


def dump(config: CompareConfig) -> dict[str, Any]:
    """The configuration as plain JSON data, so that `build(dump(c)) == c`."""
    return config.model_dump(mode="json")


def build(data: Mapping[str, Any], source: str = "the configuration") -> CompareConfig:
    """Validate plain data. Raises ConfigError with a line for each mistake: its path, and what is allowed there."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{source} is not a comparison that can be run: it is a {type(data).__name__}, not a mapping")
    try:
        return CompareConfig.model_validate(dict(data))
    except ValidationError as error:
        lines = [f"{source} is not a comparison that can be run:"]
        lines += [f"  {_line(problem)}" for problem in _apart(error.errors())]
        raise ConfigError("\n".join(lines)) from error


def _apart(problems: list[Any]) -> list[Any]:
    """The problems, without those that say that a list is too short because its values are wrong."""
    places = [problem["loc"] for problem in problems]
    return [
        problem
        for problem, place in zip(problems, places, strict=True)
        if problem["type"] != "too_short" or not any(place == other[: len(place)] != other for other in places)
    ]


def _line(problem: Any) -> str:
    path = ".".join(str(part) for part in problem["loc"]) or "(whole)"
    if problem["type"] == "extra_forbidden":
        owner: Any = CompareConfig
        for part in problem["loc"][:-1]:
            owner = owner.model_fields[part].annotation if part in getattr(owner, "model_fields", {}) else None
        known = "it is no setting of that policy" if owner is None else f"known here: {', '.join(owner.model_fields)}"
        return f"{path}: unknown key; {known}"
    if problem["type"] == "too_short":
        return f"{path}: the list is empty; at least one value is needed"
    message = problem["msg"].removeprefix("Value error, ").replace("\n", "\n    ")
    return f"{path}: {message}"


def read(path: Path) -> dict[str, Any]:
    """Read a configuration file, YAML or JSON by its suffix, as plain data. Raises ConfigError if it can't."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read ({error.strerror}); name a YAML or JSON file") from error
    form = "JSON" if path.suffix.lower() == ".json" else "YAML"
    yaml = require("yaml") if form == "YAML" else None
    unreadable: tuple[type[Exception], ...] = (ValueError, RecursionError)  # an impossible date; endless nesting
    if yaml is not None:
        unreadable = (*unreadable, yaml.YAMLError)
    try:
        data = json.loads(text) if yaml is None else yaml.safe_load(text)
    except unreadable as error:
        raise ConfigError(f"{path} is not valid {form}: {error}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds a {type(data).__name__}; a mapping of settings is needed, as in `steps: 400`")
    return data


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `above` over `below`, nested mappings included. The options of a base are replaced as a whole."""
    merged = dict(below)
    for key, value in above.items():
        nested = key != "base_options" and isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if nested else value
    return merged


def differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> list[str]:
    """A line for each difference of two dumped configurations: `model.width: 128 before, 192 now`."""
    lines = []
    for key in [*old, *(key for key in new if key not in old)]:
        before, now = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            lines += differences(before, now, f"{path}{key}.")
        elif before != now:
            lines.append(f"{path}{key}: {json.dumps(before)} before, {json.dumps(now)} now")
    return lines
