"""Draws watching.png of docs/guides/watching.md: what three policies select in a real run, as `watch` sees it.

    python docs/pictures/watching.py [FILE]

The built-in GPT (0.67M parameters) is trained for 80 steps on the source of Python's standard library under each
policy, on one CPU core, in about 20 seconds. Lines are means over the tensors, bands the tenth to the ninetieth
percentile.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from selective import MGUP, AlphaConsistency, Cautious, Policy, SelectiveUpdate, watch
from selective.compare.config import DataConfig, ModelConfig
from selective.compare.data import batch, load
from selective.compare.model import GPT, loss
from selective.watching import Sample

STEPS, EVERY, BATCH, CONTEXT = 80, 2, 4, 64
POLICIES: dict[str, tuple[Policy, str]] = {
    "Cautious": (Cautious(), "#0072B2"),
    "MGUP": (MGUP(), "#009E73"),
    "AlphaConsistency": (AlphaConsistency(), "#D55E00"),
}
PANELS = {
    "share": "share selected",
    "cosine": "cosine of update and gradient",
    "strength_selected": "strength of the selected",
}

REFERENCES = {  # where a coin would be, and the cap
    "share": (0.5, "a coin"),
    "cosine": (0.0, "nothing in common"),
    "strength_selected": (2.0, "cap of AlphaConsistency"),
}


def watched_run(policy: Policy) -> list[Sample]:
    text = load(DataConfig(max_bytes=400_000), CONTEXT, BATCH).train
    model = GPT(ModelConfig(layers=3, width=128, heads=4, context=CONTEXT), seed=0)
    opt = SelectiveUpdate(torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95)), policy=policy)
    schedule = torch.optim.lr_scheduler.LinearLR(opt, 0.1, total_iters=STEPS // 10)
    samples: list[Sample] = []
    with watch(opt, samples.append, every=EVERY, model=model):
        for step in range(STEPS):
            opt.zero_grad()
            loss(model, batch(text, 0, step, BATCH, CONTEXT)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            schedule.step()
    return samples


def curves(samples: list[Sample], name: str) -> tuple[list[int], torch.Tensor]:
    """Steps, and (3, samples): tenth percentile, mean, ninetieth percentile over the tensors."""
    values = torch.tensor([[one[name] for one in sample.values.values()] for sample in samples])
    low, high = values.quantile(torch.tensor([0.1, 0.9]), dim=1)
    return [sample.step for sample in samples], torch.stack([low, values.mean(1), high])


def draw(runs: dict[str, list[Sample]], file: Path) -> None:
    figure = Figure(figsize=(4.6, 8.4), dpi=170, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, title) in zip(figure.subplots(3, 1), PANELS.items(), strict=True):
        for label, samples in runs.items():
            steps, (low, mean, high) = curves(samples, name)
            colour = POLICIES[label][1]
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.plot(steps, mean, color=colour, label=label)
        _references(axes, name)
        axes.set_title(title, loc="left")
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    figure.savefig(file, metadata={"Software": None})


def _references(axes: Any, name: str) -> None:
    at, text = REFERENCES[name]
    axes.axhline(at, color="#888888", linestyle="--", linewidth=0.9, zorder=0)
    axes.annotate(text, (1.0, at), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="#666666")


if __name__ == "__main__":
    torch.set_num_threads(1)  # several fight over the cores with whatever else runs here
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("watching.png")
    draw({name: watched_run(policy) for name, (policy, _) in POLICIES.items()}, target)
