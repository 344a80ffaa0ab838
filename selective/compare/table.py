"""The comparison in the terminal: progress bars while it runs, the table and the verdicts at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from selective.compare.config import CompareConfig
from selective.compare.extras import require
from selective.compare.runner import Comparison, worker_count
from selective.compare.summary import Row, Summary, summarise
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
            elif message["complete"]:
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
    end = "diverged" if record["diverged"] else f"loss {record['validation']['loss'][-1]:.4f}"
    return f"{record['key']}: {end} after {record['steps_done']} steps, {record['seconds']:.1f} s"


def headline(config: CompareConfig, comparison: Comparison, parameters: int) -> str:
    model, text = config.model, comparison.text
    alone = (
        ""
        if len(comparison.contenders) > 1
        else "\nNo policy to compare it with: only the baseline is trained. Add --policy MGUP."
    )
    counts = sorted({len(c.rates) for c in comparison.contenders})
    rates = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return (
        f"{len(comparison.contenders)} contender(s) x {rates} learning rate(s) x {len(config.seeds)} seed(s): "
        f"{len(comparison.runs)} runs of {config.steps} steps, {worker_count(config)} at a time, {config.threads} "
        f"thread(s) each. GPT with {parameters:,} parameters: {model.layers} layers of width {model.width}, context "
        f"{model.context}, batch {config.loop.batch}. {text.source}: {len(text.train):,} bytes to train on, "
        f"{len(text.validation):,} held out.{alone}"
    )


def results_table(summary: Summary, memory: list[dict[str, int]]) -> Any:
    """The table, for rich: a row for each contender and learning rate, and the best rate of each in bold."""
    title = f"Mean and 95 % interval over {len(summary.seeds)} seed(s); bold: the contender's best learning rate"
    simple = require("rich.box").SIMPLE
    table = require("rich.table").Table(title=title, title_justify="left", box=simple, padding=(0, 1, 0, 0))
    table.add_column("contender", overflow="fold", min_width=24)
    for heading in ("lr", "final loss\nnats/byte", "paired difference\nto baseline", "steps to\nits loss", "ms a\nstep",
                    "extra\nstate", "extra\nin a step"):  # fmt: skip
        table.add_column(heading, justify="right", overflow="fold")
    text = require("rich.text").Text  # so that brackets in a label are no markup
    for row in summary.rows:
        values = cells(row, summary, memory[row.contender.index])
        table.add_row(*map(text, values), style="bold" if row.best else "dim")
        if row.lr == row.contender.rates[-1]:
            table.add_section()
    return table


def cells(row: Row, summary: Summary, memory: dict[str, int]) -> list[str]:
    """The cells of a row, as text."""
    baseline = row.contender.role == "baseline"
    label = row.contender.label if row.contender.role != "control" else "  its random control"
    if row.loss is None:
        loss, difference, steps = f"diverged in {row.diverged} of {len(summary.seeds)}", "", ""
    else:
        loss = str(row.loss)
        difference = "" if row.difference is None or (baseline and row.best) else row.difference.signed()
        steps = steps_text(row, len(summary.seeds))
    extra = ["", ""] if baseline else [size(memory[name]) for name in ("extra_state_bytes", "extra_step_bytes")]
    return [label, f"{row.lr:g}", loss, difference, steps, f"{row.step_ms:.2f}", *extra]


def size(count: int) -> str:
    """A number of bytes as text. 1.2 MB is 1.2 million bytes."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if abs(count) >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} B"


def steps_text(row: Row, seeds: int) -> str:
    if row.difference is None:
        return ""
    if row.steps is None:
        return "not reached"
    if row.reached < seeds:
        return f"{row.steps:.0f} ({row.reached} of {seeds})"
    if row.speed is None or row.contender.role == "baseline":
        return f"{row.steps:.0f}"
    half = "" if row.speed.half is None else f" ± {row.speed.half:.2f}"
    return f"{row.steps:.0f} ({row.speed.mean:.2f}{half} ×)"


def show(summary: Summary, comparison: Comparison, console: Any) -> None:
    """Print table, verdicts and notes. Without a complete seed, print the state of each run."""
    if not summary.rows:
        done = sum(record["complete"] for record in comparison.records.values())
        console.print(f"No seed is complete for every contender yet: {done} of {len(comparison.runs)} runs are done.")
        for record in comparison.records.values():
            state = "" if record["complete"] else " (interrupted)"
            if record["validation"]["loss"]:
                console.print(f"  {finished_line(record)}{state}", markup=False, highlight=False)
        return
    console.print(results_table(summary, comparison.bytes))
    for policy, verdict in summary.verdicts:
        console.print(f"{policy}: {verdict}", markup=False, highlight=False)
    for note in summary.notes:
        console.print(f"Note: {note}", style="dim", markup=False, highlight=False)
