"""The two pictures: the curves and ends of the losses, and the share of each parameter selected over the steps."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from selective.compare.config import CompareConfig
from selective.compare.contenders import Contender, contenders
from selective.compare.extras import require
from selective.compare.gpt_task import GPTTask
from selective.compare.intervals import t_interval
from selective.compare.race import final
from selective.compare.summary import Row, Summary
from selective.compare.task import name_of, unit_of
from selective.compare.train import Record, write_atomically

MOST_ROWS = 80  # parameters in the picture of the shares
LABEL = 0.24  # inches from one label of a curve to the next
# Okabe and Ito's palette, which colour-blind eyes can tell apart, without yellow, which vanishes on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def write_plots(
    config: CompareConfig, summary: Summary, records: Sequence[Record], folder: Path, task: Any = GPTTask
) -> list[Path]:
    """Write `loss.png` and, if the share that a policy selected varies, `share.png`. Returns the files written.

    The pictures are labelled with the name and the unit of `task`.
    """
    best = [(row.contender, _runs_of(records, row, summary.seeds)) for row in summary.rows if row.best]
    if not best:
        return []
    written = [_save(_losses(config, best, summary, task), folder / "loss.png")]
    chose = [(c, rs) for c, rs in best if c.role == "policy" and all(r["share"]["step"] for r in rs)]
    shares = [(c, rs) for c, rs in chose if varies(rs)]
    if shares:
        written.append(_save(_heatmap(config, shares), folder / "share.png"))
    return written


def varies(records: Sequence[Record]) -> bool:
    """True if the share selected is not practically constant: a panel of one colour shows nothing.

    Top-K rounds K down, so that the shares of small tensors differ, but by less than the threshold.
    """
    every = [share for r in records for line in r["share"]["by_parameter"].values() for share in line]
    return max(every) - min(every) > 0.02


def _runs_of(records: Sequence[Record], row: Row, seeds: Sequence[int]) -> list[Record]:
    """The finished runs of a row, in the order of the seeds."""
    wanted = (row.contender.index, row.lr, row.rest_lr)
    of_row = [r for r in records if r["complete"] and (r["contender"], r["lr"], r.get("rest_lr")) == wanted]
    return [r for seed in seeds for r in of_row if r["seed"] == seed]


def _figure(width: float, height: float) -> Any:
    """A figure without pyplot and its global state, so that it works in threads and without a display."""
    figure = require("matplotlib.figure").Figure(figsize=(width, height), dpi=130, layout="constrained")
    require("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())
    return path


def _looks(field: Sequence[Contender]) -> dict[int, dict[str, Any]]:
    """Colour and line style of each contender, by its index.

    The baseline is black; each policy and each space has a colour; controls have their policy's colour, dashed.
    """
    looks: dict[int, dict[str, Any]] = {}
    policies = [contender for contender in field if contender.role in ("policy", "rotation", "optimizer")]
    for contender in field:
        if contender.role == "baseline":
            looks[contender.index] = {"color": "black", "linestyle": "-"}
    for number, policy in enumerate(policies):
        colour = COLOURS[number % len(COLOURS)]
        looks[policy.index] = {"color": colour, "linestyle": "-"}
        if policy.of is not None:
            looks[policy.of] = {"color": colour, "linestyle": (0, (4, 2))}
    return looks


def _losses(
    config: CompareConfig, best: Sequence[tuple[Contender, list[Record]]], summary: Summary, task: Any
) -> Any:  # fmt: skip
    """Plot the held-out loss above, and the final losses minus the baseline's below, with a dot for each seed.

    The panels are stacked, and narrow for the size of their type, so that they can be read on a phone.
    """
    rivals = [pair for pair in best if pair[0].role != "baseline"]
    baseline = next((pair for pair in best if pair[0].role == "baseline"), None)
    compared = baseline is not None and bool(rivals)
    curves = max(3.6, 0.9 + LABEL * len(best))
    heights = [curves, 0.9 + 0.5 * len(rivals)] if compared else [curves]
    figure = _figure(_width([contender.label for contender, _ in best]), 0.4 + sum(heights))
    parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]  # each in full width
    panels = [part.subplots() for part in parts]
    looks = _looks(contenders(config))
    _curves(panels[0], best, looks, len(summary.seeds), LABEL / (curves - 0.9))
    panels[0].set_ylabel(unit_of(task))
    if baseline is not None and rivals:
        _ends(panels[1], rivals, baseline, looks)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{name_of(task)}, {config.steps} steps, each at its best rate", fontsize=12)
    return figure


def _width(labels: Sequence[str]) -> float:
    """The picture's width in inches. Labels stand beside the panels, so long ones need a wider picture."""
    return 6.2 + 0.085 * max(0, max(map(len, labels)) - 22)


def _curves(
    axes: Any,
    best: Sequence[tuple[Contender, list[Record]]],
    looks: dict[int, dict[str, Any]],
    seeds: int,
    label: float,
) -> None:
    """Plot each mean over the seeds, with a label at its end. `label` is a label's share of the panel's height."""
    ends = []
    for contender, records in best:
        look = looks[contender.index]
        steps = records[0]["validation"]["step"]
        mean = [fmean(at) for at in zip(*(r["validation"]["loss"] for r in records), strict=True)]
        axes.plot(steps, mean, linewidth=1.8, **look)
        ends.append((steps[-1], mean[-1], f"{contender.label}, lr {_rates(records[0])}", look["color"]))
    title = "Held-out loss" + (f", mean over {seeds} seeds" if seeds > 1 else ", one seed")
    axes.set(xlabel="step", title=title)
    axes.set_ylim(top=_ceiling(best))
    axes.xaxis.get_major_locator().set_params(integer=True)  # there is no step 2.5
    axes.grid(alpha=0.25)
    low, high = axes.get_ylim()
    right = axes.get_xlim()[1]
    places = spread([end for _, end, _, _ in ends], label * (high - low))
    for (last, end, text, colour), place in zip(ends, places, strict=True):
        axes.plot([last, right * 1.02], [end, place], color=colour, linewidth=0.6, clip_on=False)
        axes.text(right * 1.03, place, text, color=colour, fontsize=10, va="center")
    axes.set_xlim(right=right)


def spread(heights: Sequence[float], apart: float) -> list[float]:
    """Heights near these, in the same order, of which no two are nearer than `apart`. For labels."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = [heights[i] for i in order]
    for _ in range(200):  # push neighbours apart, half each: settles in far fewer rounds for some ten labels
        for k in range(len(placed) - 1):
            missing = max(0.0, apart - (placed[k + 1] - placed[k]))
            placed[k], placed[k + 1] = placed[k] - missing / 2, placed[k + 1] + missing / 2
    places = [0.0] * len(heights)
    for place, i in zip(placed, order, strict=True):
        places[i] = place
    return places


def _ends(
    axes: Any,
    rivals: Sequence[tuple[Contender, list[Record]]],
    baseline: tuple[Contender, list[Record]],
    looks: dict[int, dict[str, Any]],
) -> None:
    """Plot a row for each contender: its final loss minus the baseline's at each seed, the mean and its interval."""
    one_seed = len(baseline[1]) == 1
    for row, (contender, records) in enumerate(rivals):
        colour = looks[contender.index]["color"]
        of_seed = {r["seed"]: r for r in baseline[1]}
        apart = [final(r) - final(of_seed[r["seed"]]) for r in records if r["seed"] in of_seed]
        if not apart:
            continue  # one side failed at each seed
        interval = t_interval(apart)
        axes.plot(apart, [row] * len(apart), "o", color=colour, alpha=0.45, markersize=6, markeredgewidth=0)
        if interval.half is not None:
            axes.plot([interval.mean], [row], "|", color=colour, markersize=16, markeredgewidth=2)
            axes.plot(
                [interval.mean - interval.half, interval.mean + interval.half], [row, row], color=colour, linewidth=1.6
            )
        number = f"{interval.mean:+.3f}".replace("-", "−") + (
            "" if interval.half is None else f" ± {interval.half:.3f}"
        )
        axes.annotate(
            number, (interval.mean, row), (0, 11), textcoords="offset points", color=colour, fontsize=10, ha="center"
        )
    axes.axvline(0, color="black", linewidth=1.2)
    axes.set_yticks(range(len(rivals)), [_short(contender) for contender, _ in rivals], fontsize=10)
    axes.set_ylim(len(rivals) - 0.5, -0.6)
    axes.margins(x=0.12)
    axes.grid(alpha=0.25, axis="x")
    title = "One seed, which is no evidence" if one_seed else "A dot for each seed, mean and 95 % interval"
    axes.set(xlabel=f"final loss minus {baseline[0].label}'s; left of 0 is better", title=title)


def _short(contender: Contender) -> str:
    """A contender's label in a list in which a control follows its policy."""
    return "its random control" if contender.role == "control" else contender.label


def _ceiling(best: Sequence[tuple[Contender, list[Record]]]) -> float:
    """The top of the loss axis: the largest loss after the first sixth of the evaluations.

    The first evaluations are near log 256 for everyone, and would press the rest together.
    """
    late = [r["validation"]["loss"][len(r["validation"]["loss"]) // 6 :] for _, records in best for r in records]
    return max(max(curve) for curve in late) * 1.02


def _heatmap(config: CompareConfig, shares: Sequence[tuple[Contender, list[Record]]]) -> Any:
    """Plot shares with parameters down and steps across: a panel for each policy, one scale of colours for all."""
    every = _order(list(shares[0][1][0]["share"]["by_parameter"]))
    names = _few(every)
    tables = [[_mean([r["share"]["by_parameter"][name] for r in records]) for name in names] for _, records in shares]
    low = min(min(min(line) for line in table) for table in tables)
    high = max(max(max(line) for line in table) for table in tables)
    figure = _figure(2.6 + 3.4 * len(shares), 2.2 + 0.2 * len(names))
    panels = figure.subplots(1, len(shares), squeeze=False, sharey=True)[0]
    image = None
    for axes, (contender, records), table in zip(panels, shares, tables, strict=True):
        extent = (0, config.steps, len(names) - 0.5, -0.5)
        image = axes.imshow(
            table, aspect="auto", interpolation="nearest", cmap="viridis", vmin=low, vmax=high, extent=extent
        )
        axes.set_title(f"{contender.label}\nlr {_rates(records[0])}", fontsize=9)
        axes.set_xlabel("step")
    panels[0].set_yticks(range(len(names)), [name.removesuffix(".weight") for name in names], fontsize=7)
    figure.colorbar(image, ax=list(panels), label="share of the coordinates selected", shrink=0.8)
    some = "" if len(names) == len(every) else f"\n{len(names)} of {len(every)} parameters"
    figure.suptitle(f"Share selected by parameter and step, mean over {len(shares[0][1])} seed(s){some}")
    return figure


def _order(names: list[str]) -> list[str]:
    """The built-in GPT's names by the flow of data: embedding, blocks, last norm, head. (Groups list matrices first.)

    Other models' names stay in the order of the optimizer's groups.
    """
    ends = {"embedding": 0, "blocks": 1, "norm": 2, "head": 3}
    inside = ("attention_norm", "qkv", "attention_out", "mlp_norm", "mlp_in", "mlp_out")

    def place(name: str) -> tuple[int, int, int]:
        first, *rest = name.split(".")
        return (1, int(rest[0]), inside.index(rest[1])) if first == "blocks" else (ends[first], 0, 0)

    block = re.compile(rf"blocks\.\d+\.({'|'.join(inside)})\.weight")
    of_gpt = all(block.fullmatch(name) or name.removesuffix(".weight") in set(ends) - {"blocks"} for name in names)
    return sorted(names, key=place) if of_gpt else names


def _few(names: list[str]) -> list[str]:
    """At most MOST_ROWS of the names, evenly spread: a picture of a thousand rows can't be read."""
    if len(names) <= MOST_ROWS:
        return names
    return [names[i * len(names) // MOST_ROWS] for i in range(MOST_ROWS)]


def _rates(record: Record) -> str:
    rest = record.get("rest_lr")
    return f"{record['lr']:g}" + ("" if rest is None else f", rest {rest:g}")


def _mean(curves: Sequence[Sequence[float]]) -> list[float]:
    return [fmean(at) for at in zip(*curves, strict=True)]
