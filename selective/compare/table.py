"""The comparison in the terminal: progress bars while it runs, the table and the verdicts at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from selective.base.generators import generators_restored
from selective.compare.devices import worker_count
from selective.compare.extras import require
from selective.compare.intervals import Interval
from selective.compare.runner import Comparison
from selective.compare.summary import Row, Summary, summarise
from selective.compare.task import name_of, start_of, unit_of
from selective.compare.train import Record
from selective.compare.words import so_far
from selective.compare.workers import Progress


@contextmanager
def progress_bars(comparison: Comparison, console: Any) -> Iterator[Callable[[Progress | Record], None]]:
    """Show a bar for all steps and one for each worker's run; without a terminal, a line for each finished run."""
    bars = require("rich.progress")
    columns = (
        bars.TextColumn("{task.description}", markup=False),
        bars.BarColumn(bar_width=24),
        bars.MofNCompleteColumn(),
        bars.TextColumn("{task.fields[note]}", markup=False),
        bars.TimeRemainingColumn(),
    )
    steps = comparison.config.steps
    finished = len(comparison.runs) - len(comparison.todo())
    told = len(_summary(comparison).seeds)
    with bars.Progress(*columns, console=console, transient=True) as progress:
        total = progress.add_task("all steps", total=steps * len(comparison.runs), completed=steps * finished, note="")
        slots: dict[int, Any] = {}
        begun: dict[str, int] = {}

        def handle(message: Progress | Record) -> None:
            nonlocal finished, told
            if isinstance(message, Progress):
                if message.slot not in slots:
                    slots[message.slot] = progress.add_task("", total=steps, note="")
                note = "" if message.loss is None else f"loss {message.loss:.3f}"
                progress.update(slots[message.slot], completed=message.done, description=message.key, note=note)
                progress.advance(total, message.done - begun.get(message.key, 0))
                begun[message.key] = message.done
            elif message["complete"] or message.get("failed"):
                finished += 1
                if not console.is_terminal:
                    console.print(
                        f"{finished}/{len(comparison.runs)} {finished_line(message)}", markup=False, highlight=False
                    )
                now = _summary(comparison)
                if told < len(now.seeds) < len(comparison.config.seeds):  # after the last seed the table says it
                    console.print(so_far(comparison.config, now), markup=False, highlight=False, soft_wrap=True)
                told = len(now.seeds)

        yield handle


def _summary(comparison: Comparison) -> Summary:
    return summarise(comparison.config, list(comparison.records.values()))


def finished_line(record: Record) -> str:
    if record.get("failed"):
        return f"{record['key']}: failed after {record['steps_done']} steps: {record['failed']}"
    end = "diverged" if record["diverged"] else f"loss {record['validation']['loss'][-1]:.4f}"
    return f"{record['key']}: {end} after {record['steps_done']} steps, {record['seconds']:.1f} s"


def headline(comparison: Comparison) -> str:
    """The size of the comparison, its model and its data, in a few sentences."""
    config = comparison.config
    alone = (
        ""
        if len(comparison.contenders) > 1
        else "\nNo policy to compare it with: only the baseline is trained. Add --policy MGUP."
    )
    counts = sorted({len(c.pairs) for c in comparison.contenders})
    rates = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    kind = "pair(s) of learning rates" if config.rest_lr else "learning rate(s)"
    return (
        f"{len(comparison.contenders)} contender(s) x {rates} {kind} x {len(config.seeds)} seed(s): "
        f"{len(comparison.runs)} runs of {config.steps} steps, {worker_count(config)} at a time, {config.threads} "
        f"thread(s) each. {_described(comparison)}{alone}"
    )


def _described(comparison: Comparison) -> str:
    config, task = comparison.config, comparison.setup.task
    with generators_restored():
        parameters = sum(p.numel() for p in start_of(task, config.seeds[0]).parameters())
    if not comparison.setup.built_in:
        return f"{name_of(task)} with {parameters:,} parameters on {config.device}."
    model, text = config.model, task.text
    return (
        f"GPT with {parameters:,} parameters: {model.layers} layers of width {model.width}, context {model.context}, "
        f"batch {config.loop.batch}. {text.source}: {len(text.train):,} bytes to train on, {len(text.validation):,} "
        "held out."
    )


def results_table(summary: Summary, memory: Sequence[Mapping[str, int | None]], unit: str = "loss") -> Any:
    """The table, for rich: a row for each contender and learning rate, and the best rate of each in bold."""
    title = f"Mean and 95 % interval over {len(summary.seeds)} seed(s); bold: the contender's best learning rate"
    simple = require("rich.box").SIMPLE
    table = require("rich.table").Table(title=title, title_justify="left", box=simple, padding=(0, 1, 0, 0))
    table.add_column("contender", overflow="fold", min_width=24)
    loss = "final loss" if unit == "loss" else f"final loss\n{unit}"
    for heading in ("lr", loss, "paired difference\nto baseline", "steps to\nits loss", "time to\nits loss",
                    "ms a\nstep", "extra\nstate", "extra\nin a step"):  # fmt: skip
        table.add_column(heading, justify="right", overflow="fold")
    text = require("rich.text").Text  # so that brackets in a label are no markup
    for row in summary.rows:
        values = cells(row, summary, memory[row.contender.index])
        table.add_row(*map(text, values), style="bold" if row.best else "dim")
        if row.pair == row.contender.pairs[-1]:
            table.add_section()
    return table


def cells(row: Row, summary: Summary, memory: Mapping[str, int | None]) -> list[str]:
    """The cells of a row, as text."""
    baseline = row.contender.role == "baseline"
    label = row.contender.label if row.contender.role != "control" else "  its random control"
    seeds = len(summary.seeds)
    difference = steps = seconds = ""
    if row.loss is None:
        loss = f"failed in {row.failed} of {seeds}" if row.failed else f"diverged in {row.diverged} of {seeds}"
    else:
        loss = str(row.loss) + (f" ({row.failed} failed)" if row.failed else "")
        difference = "" if row.difference is None or (baseline and row.best) else row.difference.signed()
        raced = 0 if row.difference is None else row.difference.n
        steps, seconds = steps_text(row, raced), seconds_text(row, raced)
    rates = f"{row.lr:g}" if row.rest_lr is None else f"{row.lr:g}\nrest {row.rest_lr:g}"
    step_ms = "" if math.isnan(row.step_ms) else f"{row.step_ms:.2f}"
    extra = ["", ""] if baseline else [size(memory[name]) for name in ("extra_state_bytes", "extra_step_bytes")]
    return [label, rates, loss, difference, steps, seconds, step_ms, *extra]


def size(count: int | None) -> str:
    """A number of bytes as text. 1.2 MB is 1.2 million bytes. Empty if it is not known."""
    if count is None:
        return ""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if abs(count) >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} B"


def steps_text(row: Row, seeds: int) -> str:
    """The steps to the baseline's final loss, and how many times as many it takes, if all `seeds` got there."""
    return _way_text(row, seeds, row.steps, row.speed, "{:.0f}".format)


def seconds_text(row: Row, seeds: int) -> str:
    """The same in time of training."""
    if row.steps is not None and row.seconds is None:
        return ""  # runs of before times were recorded
    return _way_text(row, seeds, row.seconds, row.time_speed, duration)


def _way_text(row: Row, seeds: int, mean: float | None, ratio: Interval | None, written: Callable[[float], str]) -> str:
    if row.difference is None:
        return ""
    if mean is None:
        return "not reached"
    if row.reached < seeds:
        return f"{written(mean)} ({row.reached} of {seeds})"
    if ratio is None or row.contender.role == "baseline":
        return written(mean)
    half = "" if ratio.half is None else f" ± {ratio.half:.2f}"
    return f"{written(mean)} ({ratio.mean:.2f}{half} ×)"


def duration(seconds: float) -> str:
    """Seconds as text: `0.42 s`, `12.3 s`, `12 min`, `3.1 h`."""
    if seconds < 120:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def show(summary: Summary, comparison: Comparison, console: Any) -> None:
    """Print table, verdicts and notes. Without a complete seed, print the state of each run."""
    if not summary.rows:
        done = sum(record["complete"] for record in comparison.records.values())
        console.print(f"No seed is complete for every contender yet: {done} of {len(comparison.runs)} runs are done.")
        for record in comparison.records.values():
            state = "" if record["complete"] or record.get("failed") else " (interrupted)"
            if record["validation"]["loss"] or record.get("failed"):
                console.print(f"  {finished_line(record)}{state}", markup=False, highlight=False)
        return
    unit = unit_of(comparison.setup.task).replace("nats per byte", "nats/byte")
    console.print(results_table(summary, comparison.bytes, unit))
    for policy, verdict in summary.verdicts:
        console.print(f"{policy}: {verdict}", markup=False, highlight=False)
    for note in summary.notes:
        console.print(f"Note: {note}", style="dim", markup=False, highlight=False)
