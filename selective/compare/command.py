"""The commands `selective compare` and `selective explain`: they read the options and write to the terminal."""

from __future__ import annotations

import argparse
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from selective.compare import config as configuration
from selective.compare.config import CompareConfig, ConfigError
from selective.compare.extras import MissingExtra, require

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
    from selective.compare import plots, table
    from selective.compare.model import GPT
    from selective.compare.runner import Comparison
    from selective.compare.summary import summarise
    from selective.compare.words import in_plain_words
    from selective.compare.workers import WorkerFailed

    console = require("rich.console").Console()
    if not console.is_terminal:
        console.width = 120  # a log file has no width; rich would take 80
    require("matplotlib.figure")  # a missing package is an error before the training, not after it
    folder = Path(options.out) if options.out else Path("results") / f"compare-{datetime.now():%Y%m%d-%H%M%S}"
    config = resolve(options, given, folder)
    # With a configuration, --resume also begins a comparison, so that one command line serves from start to end.
    begin = not (folder / "config.json").exists() and bool(options.config or given)
    comparison = Comparison(config, folder, options.resume and not begin, options.overwrite)
    parameters = sum(p.numel() for p in GPT(config.model, 0).parameters())
    console.print(table.headline(config, comparison, parameters), markup=False, highlight=False)
    try:
        with table.progress_bars(comparison, console) as handle:
            finished = comparison.run(handle)
    except WorkerFailed as error:
        print(f"selective compare: {error}\nWhat was finished is in {folder}.", file=sys.stderr)
        return FAILED
    summary = summarise(config, list(comparison.records.values()))
    table.show(summary, comparison, console)
    written = [folder / "results.json", *plots.write_plots(config, summary, list(comparison.records.values()), folder)]
    console.print(f"Written: {', '.join(str(path) for path in written)}", markup=False, highlight=False, soft_wrap=True)
    for line in in_plain_words(summary):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if not finished:
        again = f"selective compare --resume --out {folder}"
        console.print(f"Interrupted. Go on with: {again}", markup=False, highlight=False, soft_wrap=True)
        return INTERRUPTED
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
    from selective.compare.model import GPT

    try:
        spaces = [] if preconditioner is None else [preconditioner]
        asked = {"base": base, "base_options": base_options, "policies": [policy], "preconditioners": spaces}
        config = configuration.build(asked)
        optimizer = make_base(config, GPT(config.model, 0), config.lr[0], bool(spaces))
        print(wrap(config, optimizer, config.policies[0], 0, next(iter(config.preconditioners), None)).explain())
    except ConfigError as error:
        print(f"selective explain: {error}", file=sys.stderr)
        return REFUSED
    return DONE
