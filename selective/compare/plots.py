"""The two pictures: how the losses fall and differ, and what share of each parameter was selected when."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from selective.compare.config import CompareConfig
from selective.compare.contenders import Contender, contenders
from selective.compare.extras import require
from selective.compare.intervals import Interval, t_interval
from selective.compare.summary import Summary
from selective.compare.train import Record, write_atomically

# Distinguishable with colour-blind eyes (Okabe and Ito's palette, yellow left out: it vanishes on white).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def write_plots(config: CompareConfig, summary: Summary, records: Sequence[Record], folder: Path) -> list[Path]:
    """Write `loss.png` and, where a policy selected anything, `share.png`. Returns what was written."""
    best = [
        (row.contender, _of(records, row.contender.index, row.lr, summary.seeds)) for row in summary.rows if row.best
    ]
    if not best:
        return []
    written = [_save(_losses(config, best, summary), folder / "loss.png")]
    shares = [(c, rs) for c, rs in best if c.role == "policy" and all(r["share"]["step"] for r in rs)]
    if shares:
        written.append(_save(_heatmap(config, shares), folder / "share.png"))
    return written


def _of(records: Sequence[Record], contender: int, lr: float, seeds: Sequence[int]) -> list[Record]:
    """A contender's runs at one rate, in the order of the seeds."""
    return [r for seed in seeds for r in records if (r["contender"], r["lr"], r["seed"]) == (contender, lr, seed)]


def _figure(width: float, height: float) -> Any:
    """Without pyplot and its global state: works in threads and without a display."""
    figure = require("matplotlib.figure").Figure(figsize=(width, height), dpi=130, layout="constrained")
    require("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())
    return path


def _looks(field: Sequence[Contender]) -> dict[int, dict[str, Any]]:
    """Black for the baseline; a colour for each policy and each space, controls in their policy's, dashed. By index."""
    looks: dict[int, dict[str, Any]] = {}
    policies = [contender for contender in field if contender.role in ("policy", "rotation")]
    for contender in field:
        if contender.role == "baseline":
            looks[contender.index] = {"color": "black", "linestyle": "-"}
    for number, policy in enumerate(policies):
        colour = COLOURS[number % len(COLOURS)]
        looks[policy.index] = {"color": colour, "linestyle": "-"}
        if policy.of is not None:
            looks[policy.of] = {"color": colour, "linestyle": (0, (4, 2))}
    return looks


def _losses(config: CompareConfig, best: Sequence[tuple[Contender, list[Record]]], summary: Summary) -> Any:
    """Left: held-out loss. Right: its paired difference to the baseline, where a difference can be seen at all."""
    figure = _figure(12.5, 5.2)
    left, right = figure.subplots(1, 2)
    seeds = len(summary.seeds)
    baseline = next((records for contender, records in best if contender.role == "baseline"), None)
    looks = _looks(contenders(config))
    for place, (contender, records) in enumerate(best):
        look, label = looks[contender.index], f"{contender.label}, lr {records[0]['lr']:g}"
        steps = records[0]["validation"]["step"]
        curves = [r["validation"]["loss"] for r in records]
        left.plot(steps, [fmean(at) for at in zip(*curves, strict=True)], label=label, linewidth=1.6, **look)
        left.fill_between(steps, *_range(curves), color=look["color"], alpha=0.10, linewidth=0)
        if baseline is not None and contender.role != "baseline":
            _difference(right, steps, curves, [r["validation"]["loss"] for r in baseline], look, place)
    left.set(
        xlabel="step",
        ylabel="held-out loss (nats per byte)",
        title=f"Held-out loss: mean and range over {seeds} seed(s)",
    )
    left.set_ylim(top=_ceiling(best))
    right.axhline(0, color="black", linewidth=1.2)
    title = "Paired difference to the baseline: mean" + ("; 95 % interval at the end" if seeds > 1 else "")
    right.set(xlabel="step", ylabel=f"loss minus {config.base}'s (nats per byte)", title=title)
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)  # there is no step 2.5
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *left.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=2 if len(best) > 3 else 1,
        fontsize=9,
        frameon=False,
    )
    figure.suptitle(
        f"GPT on bytes, {config.steps} steps; each contender at its best of {len(config.lr)} learning rate(s)"
    )
    return figure


def _range(curves: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    return [min(at) for at in zip(*curves, strict=True)], [max(at) for at in zip(*curves, strict=True)]


def _ceiling(best: Sequence[tuple[Contender, list[Record]]]) -> float:
    """The first evaluations are near log 256 for everyone and would press the rest together: start a sixth in."""
    late = [r["validation"]["loss"][len(r["validation"]["loss"]) // 6 :] for _, records in best for r in records]
    return max(max(curve) for curve in late) * 1.02


def _difference(
    axes: Any,
    steps: Sequence[int],
    curves: list[list[float]],
    base: list[list[float]],
    look: dict[str, Any],
    place: int,
) -> None:
    """The mean from a sixth on (before, the warm-up's differences dwarf the rest), and the last interval."""
    apart = [[a - b for a, b in zip(x, y, strict=True)] for x, y in zip(curves, base, strict=True)]
    at: list[Interval] = [t_interval(values) for values in zip(*apart, strict=True)]
    start = len(steps) // 6
    axes.plot(steps[start:], [i.mean for i in at[start:]], linewidth=1.6, **look)
    if at[-1].half is not None:  # side by side, for they are alike
        beside = steps[-1] * (1 + 0.015 * place)
        bar = axes.errorbar(
            [beside], [at[-1].mean], yerr=[at[-1].half], color=look["color"], capsize=2.5, linewidth=1.3
        )
        bar[2][0].set_linestyle(look["linestyle"])


def _heatmap(config: CompareConfig, shares: Sequence[tuple[Contender, list[Record]]]) -> Any:
    """Parameters down, steps across, one panel for each policy, one scale of colours for all."""
    names = _order(list(shares[0][1][0]["share"]["by_parameter"]))
    tables = [[_mean([r["share"]["by_parameter"][name] for r in records]) for name in names] for _, records in shares]
    low = min(min(min(line) for line in table) for table in tables)
    high = max(max(max(line) for line in table) for table in tables)
    # A policy that selects a fixed share is one even colour; the scale keeps rounding from looking like a pattern.
    low, high = min(low, 0.45), max(high, 0.55)
    figure = _figure(2.6 + 3.4 * len(shares), 2.2 + 0.2 * len(names))
    panels = figure.subplots(1, len(shares), squeeze=False, sharey=True)[0]
    image = None
    for axes, (contender, records), table in zip(panels, shares, tables, strict=True):
        extent = (0, config.steps, len(names) - 0.5, -0.5)
        image = axes.imshow(
            table, aspect="auto", interpolation="nearest", cmap="viridis", vmin=low, vmax=high, extent=extent
        )
        axes.set_title(f"{contender.label}\nlr {records[0]['lr']:g}", fontsize=9)
        axes.set_xlabel("step")
    panels[0].set_yticks(range(len(names)), [name.removesuffix(".weight") for name in names], fontsize=7)
    figure.colorbar(image, ax=list(panels), label="share of the coordinates selected", shrink=0.8)
    figure.suptitle(f"Share selected by parameter and step, mean over {len(shares[0][1])} seed(s)")
    return figure


def _order(names: list[str]) -> list[str]:
    """As data flows through the model (groups list matrices first): embedding, blocks, last norm, head."""
    ends = {"embedding": 0, "blocks": 1, "norm": 2, "head": 3}

    def place(name: str) -> tuple[int, int, int]:
        parts = name.split(".")
        inside = ("attention_norm", "qkv", "attention_out", "mlp_norm", "mlp_in", "mlp_out")
        if parts[0] == "blocks":
            return 1, int(parts[1]), inside.index(parts[2])
        return ends[parts[0]], 0, 0

    return sorted(names, key=place)


def _mean(curves: Sequence[Sequence[float]]) -> list[float]:
    return [fmean(at) for at in zip(*curves, strict=True)]
