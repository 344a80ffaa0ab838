"""The commands `selective compare` and `selective explain`: they read the options and write to the terminal."""

from __future__ import annotations

import argparse
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from selective.compare import config as configuration
from selective.compare.config import CompareConfig, ConfigError
from selective.compare.extras import MissingExtra

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130


def compare(options: argparse.Namespace, given: dict[str, Any]) -> int:
    """Run a comparison to its end, or to Ctrl-C. Returns the exit code."""
    try:
        return _compare(options, given)
    except (ConfigError, MissingExtra) as error:
        print(f"selective compare: {error}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print("selective compare: interrupted twice; go on from the last checkpoints with --resume", file=sys.stderr)
        return INTERRUPTED


def _compare(options: argparse.Namespace, given: dict[str, Any]) -> int:
    from selective.compare.runner import Comparison
    from selective.compare.show import check_extras, run_and_show
    from selective.compare.workers import WorkerFailed

    check_extras()
    folder = Path(options.out) if options.out else Path("results") / f"compare-{datetime.now():%Y%m%d-%H%M%S}"
    config = resolve(options, given, folder)
    # With a configuration, --resume also begins a comparison, so that one command line serves from start to end.
    begin = not (folder / "config.json").exists() and bool(options.config or given)
    comparison = Comparison(config, folder, options.resume and not begin, options.overwrite)
    try:
        finished = run_and_show(comparison)
    except WorkerFailed as error:
        print(f"selective compare: {error}\nWhat was finished is in {folder}.", file=sys.stderr)
        return FAILED
    if not finished:
        print(f"Interrupted. Go on with: selective compare --resume --out {folder}")
        return INTERRUPTED
    if comparison.failed:
        count = len(comparison.failed)
        print(f"selective compare: {count} of {len(comparison.runs)} runs failed; see the notes", file=sys.stderr)
        return FAILED
    return DONE


def resolve(options: argparse.Namespace, given: dict[str, Any], folder: Path) -> CompareConfig:
    """The configuration: the command line over the file, over a resumed folder's own, over the defaults."""
    from selective.compare.runner import read_json

    data: dict[str, Any] = {}
    sources = []
    if options.resume and (folder / "config.json").exists():
        data = read_json(folder / "config.json")["config"]
    if options.resume and not options.out:
        raise ConfigError("--resume: say which comparison to go on with, by its folder: --out results/...")
    if options.config:
        data = configuration.merge(data, configuration.read(Path(options.config)))
        sources.append(options.config)
    if given:
        data = configuration.merge(data, given)
        sources.append("the command line")
    if options.first_seed is not None:
        data["seeds"] = _seeds_from(options.first_seed, data.get("seeds", 3))
    return configuration.build(data, " with ".join(sources) or "the configuration")


def _seeds_from(first: int, seeds: Any) -> Any:
    """The seeds from `first` on, as many as the count `seeds`. Raises ConfigError if `seeds` is a list."""
    if isinstance(seeds, (list, tuple)):
        raise ConfigError(
            f"--first-seed {first}: the seeds are a list ({', '.join(map(str, seeds))}); give a count with --seeds, or "
            "leave --first-seed out"
        )
    return list(range(first, first + seeds)) if isinstance(seeds, int) else seeds


def explain(base: str, base_options: dict[str, Any], policy: Any, preconditioner: Any = None) -> int:
    """Print the `explain()` of a base under a policy and a preconditioner. Returns the exit code."""
    from selective.compare.contenders import make_base, wrap
    from selective.compare.gpt_task import GPTTask
    from selective.compare.model import GPT
    from selective.compare.setup import Setup

    try:
        spaces = [] if preconditioner is None else [preconditioner]
        asked = {"base": base, "base_options": base_options, "policies": [policy], "preconditioners": spaces}
        config = configuration.build(asked)
        setup = Setup(config, GPTTask, {})
        optimizer = make_base(setup, GPT(config.model, 0), config.lr[0], bool(spaces))
        print(wrap(config, optimizer, config.policies[0], 0, next(iter(config.preconditioners), None)).explain())
    except ConfigError as error:
        print(f"selective explain: {error}", file=sys.stderr)
        return REFUSED
    return DONE
