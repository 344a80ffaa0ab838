"""`compare`: a comparison on a task of yours, from Python."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch

from selective import Policy, Preconditioner, policy_from
from selective.base.by_name import optimizer_class
from selective.compare.config import ConfigError, LoopConfig, build
from selective.compare.extras import require
from selective.compare.optimizers import Maker, name_of_maker
from selective.compare.runner import Comparison
from selective.compare.setup import Given
from selective.compare.spaces import preconditioner_of
from selective.compare.task import Task, check_is_task

Contenders = Iterable[Any] | Mapping[str, Maker]


def compare(
    task: Task | type[Task] | str | None = None,
    contenders: Contenders = (),
    *,
    lrs: Sequence[float] = (1e-3, 3e-3),
    rest_lrs: Sequence[float] = (),
    seeds: int | Sequence[int] = 3,
    steps: int = 400,
    base: str | Maker = "AdamW",
    base_options: Mapping[str, Any] | None = None,
    controls: bool = True,
    policies_in_spaces: bool = True,
    loop: LoopConfig | Mapping[str, Any] | None = None,
    device: str = "cpu",
    threads: int = 1,
    workers: int | None = 1,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    show: bool = True,
) -> Comparison:
    """Train a task under several optimizers, from the same start on the same batches, and say which one helped.

    Everyone is trained at every learning rate and every seed, and judged at its best rate. Each policy also has a
    matched random control.

    Args:
        task: your `Task`, or its class if that takes no arguments; or its name, `module:name` or
            `path/to/file.py:name`. None is the built-in GPT on bytes.
        contenders: policies (`Cautious()`, "MGUP") and preconditioners (`Soap()`, "soap"), which go around `base`; and
            functions that make an optimizer, `maker(params, lr)` or `maker(model, lr)`, or their names
            (`module:name`). A class of optimizers can be given by its name alone ("lion", "SGD"), as `base` can. A
            mapping gives functions names of your own: `{"muon": lambda model, lr: ...}`. Classes of
            optimizers are such functions. The model is passed if the first parameter is called `model`, and parameter
            groups otherwise, with weight decay on matrices only. A parameter `seed` gets the run's seed, and `rest_lr`
            the second learning rate (without `rest_lrs`, its default, or the first).
        lrs: the learning rates that everyone is trained at.
        rest_lrs: second learning rates, of embeddings, head and vectors (norms, biases). Everyone is trained at every
            pair. Functions that take the model need a parameter `rest_lr` then.
        seeds: a count, or a list. A seed fixes the start of the model, the batches, and all random numbers.
        steps: the number of steps of each run.
        base: the optimizer that is the baseline and goes under policies and preconditioners: its name, its class, or
            a function like those in `contenders`.
        base_options: keyword arguments of the base.
        controls: train the random control of each policy, too.
        policies_in_spaces: also train the policies in the space of each preconditioner.
        loop: schedule, clipping, weight decay, and how often to evaluate: a `LoopConfig` or a dict of its fields.
        device: where models are trained. "cuda" with several workers gives each a GPU, as far as there are several.
        threads: torch's threads in each worker.
        workers: runs at the same time, each in a process of its own if there are several. None takes one for each GPU,
            or for each core. With several, call this under `if __name__ == "__main__":`.
        out: the folder of the results; None makes `results/compare-DATE`.
        resume: go on with the comparison in `out`, or begin it if there is none.
        overwrite: delete the comparison in `out`.
        show: print progress, table and verdict, and write pictures. This needs the extra `compare`.

    Returns:
        The comparison: `summary` has a row for each contender and rate, verdicts and notes; `records` has every run,
        and `failed` those that raised an error or whose process died, which cost nothing but themselves.

    Raises:
        ConfigError: the comparison can't be run as described. The message says why.
        MissingExtra: `show` is true, and a package that it needs is not installed.
        WorkerFailed: no process can be started.
        KeyboardInterrupt: Ctrl-C was pressed. What is done has been saved, and `resume` goes on.
    """
    if not isinstance(workers, int | None) or isinstance(workers, bool):
        raise ConfigError(f"workers: {workers!r} is no number of processes")
    makers: dict[str, Maker] = {}
    data: dict[str, Any] = {
        "base": base if isinstance(base, str) else _base(base),
        "base_options": _with_lists(dict(base_options or {})),
        "lr": _listed("lrs", lrs), "rest_lr": _listed("rest_lrs", rest_lrs),
        "seeds": seeds if isinstance(seeds, int) else _listed("seeds", seeds),
        "steps": steps, "controls": controls, "policies_in_spaces": policies_in_spaces, "device": device,
        "threads": threads, "workers": workers, "loop": _loop(loop),
        **_sorted(contenders, makers),
    }  # fmt: skip
    task = task() if isinstance(task, type) else task
    if task is not None:
        data["task"] = task if isinstance(task, str) else _reference(task)
    folder = Path("results") / f"compare-{datetime.now():%Y%m%d-%H%M%S}" if out is None else Path(out)
    if resume and out is None:
        raise ConfigError("resume: say which comparison to go on with, by its folder: out=...")
    if show:
        require("rich.console")
        require("matplotlib.figure")
    own_base = None if isinstance(base, str) or _of_torch(base) else base
    given = Given(None if isinstance(task, str) else task, makers, own_base)
    go_on = resume and (folder / "config.json").exists()
    comparison = Comparison(build(data, "compare()"), folder, go_on, overwrite, given)
    _run(comparison, show)
    return comparison


def _run(comparison: Comparison, show: bool) -> None:
    if show:
        from selective.compare.show import run_and_show

        finished = run_and_show(comparison)
    else:
        finished = comparison.run(lambda _: None)
    if not finished:
        raise KeyboardInterrupt(f"what is done is in {comparison.folder}; resume=True goes on")


def _of_torch(base: Any) -> bool:
    """True for a class of torch.optim, which is the same as its name."""
    return isinstance(base, type) and getattr(torch.optim, base.__name__, None) is base


def _base(base: Any) -> str:
    """The name of a base that is a class or a function."""
    return base.__name__ if _of_torch(base) else _named("base", base, {})


def _listed(name: str, values: Any) -> list[Any]:
    """The values of a list. Raises ConfigError if there is none, as for a single number."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ConfigError(f"{name}: {values!r} is no list; write [{values}]")
    return list(values)


def _with_lists(value: Any) -> Any:
    """The same with lists in the place of tuples, which JSON has not."""
    if isinstance(value, Mapping):
        return {key: _with_lists(each) for key, each in value.items()}
    return [_with_lists(each) for each in value] if isinstance(value, list | tuple) else value


def _loop(loop: LoopConfig | Mapping[str, Any] | None) -> dict[str, Any]:
    return loop.model_dump(mode="json") if isinstance(loop, LoopConfig) else dict(loop or {})


def _reference(task: Any) -> str:
    """The name of the task's class, or of a module, by which a resumed comparison recognises it."""
    check_is_task(task, f"task {type(task).__name__}")
    if isinstance(task, ModuleType):
        return task.__name__
    return f"{type(task).__module__}:{type(task).__qualname__}"


def _sorted(contenders: Contenders, makers: dict[str, Maker]) -> dict[str, Any]:
    """The contenders by what they are, as data of the configuration. Functions are added to `makers`."""
    if isinstance(contenders, str):
        raise ConfigError(f"contenders: {contenders!r} is a string; write a list: [{contenders!r}]")
    if isinstance(contenders, Policy | Preconditioner) or not isinstance(contenders, Iterable):
        raise ConfigError(f"contenders: {contenders!r} is no list; write a list: [{contenders!r}]")
    lists: dict[str, Any] = {"policies": [], "preconditioners": [], "optimizers": []}
    everyone = [contenders] if isinstance(contenders, Mapping) else list(contenders)
    for contender in everyone:
        kind, named = _classified(contender, makers)
        lists[kind] += named
    return lists


def _classified(contender: Any, makers: dict[str, Maker]) -> tuple[str, list[Any]]:
    """The list of the configuration in which a contender belongs, and what stands there for it."""
    if isinstance(contender, type) and issubclass(contender, Policy | Preconditioner):
        contender = contender()
    if isinstance(contender, Policy):
        return "policies", [contender]
    if isinstance(contender, Preconditioner):
        return "preconditioners", [contender]
    if isinstance(contender, Mapping) and "kind" not in contender:
        for name, maker in contender.items():
            _named("contenders", maker, makers, str(name))
        return "optimizers", [str(name) for name in contender]
    if isinstance(contender, str) and ":" in contender:
        return "optimizers", [contender]
    if isinstance(contender, str | Mapping):
        return _by_name(contender)
    return "optimizers", [_named("contenders", contender, makers)]


def _by_name(contender: str | Mapping[str, Any]) -> tuple[str, list[Any]]:
    """A policy or a preconditioner that is given by its kind, or a class of optimizers by its name."""
    attempts: list[tuple[str, Callable[[Any], Any]]] = [
        ("policies", policy_from),
        ("preconditioners", preconditioner_of),
    ]
    if isinstance(contender, str):
        attempts.append(("optimizers", optimizer_class))
    reasons = []
    for kind, parse in attempts:
        try:
            parsed = parse(contender)
        except ValueError as error:
            reasons.append(str(error))
        else:
            return kind, [contender if kind == "optimizers" else parsed]
    what = "is no policy and no preconditioner" + (", and no optimizer has this name" if len(attempts) > 2 else "")
    raise ConfigError(f"contenders: {contender!r} {what}:\n  " + "\n  ".join(reasons))


def _named(where: str, maker: Any, makers: dict[str, Maker], name: str | None = None) -> str:
    """Keep the function under its name, and return the name. `where` is the argument that has it, for messages."""
    if isinstance(maker, torch.optim.Optimizer):
        raise ConfigError(
            f"{where}: {type(maker).__name__} is an optimizer over some parameters already, and each run has its "
            "own model; give a function that makes one, (params, lr) or (model, lr)"
        )
    if not callable(maker):
        raise ConfigError(
            f"{where}: {maker!r} is no policy, preconditioner, or function that makes an optimizer of (params, lr)"
        )
    label = name_of_maker(cast(Maker, maker)) if name is None else name
    if not label:
        way = "write a function with def" if where == "base" else f"{{'mine': {maker!r}}}"
        raise ConfigError(f"{where}: a function needs a name to be shown under: {way}")
    if label in makers:
        raise ConfigError(f"contenders: two functions are called {label}; give them names: {{'mine': ...}}")
    makers[label] = cast(Maker, maker)
    return label
