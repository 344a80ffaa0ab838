"""Draws gram.png of docs/how-it-works/rotation.md: a gradient covariance before and after rotation, a real one.

    python docs/pictures/gram.py [FILE]

A GPT of 0.14M parameters is trained for 60 steps of AdamW on the source of Python's standard library, on the CPU, in a
few seconds. The basis of one of its matrices is made from the first 40 gradients; the covariance that is drawn is that
of the 20 gradients after them, which the basis has not seen.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from selective import Eigenbasis
from selective.compare.config import DataConfig, ModelConfig
from selective.compare.data import batch, load
from selective.compare.model import GPT, loss

STEPS, SEEN, BATCH, CONTEXT = 60, 40, 8, 64
TENSOR = "blocks.0.mlp_in.weight"  # 384 rows, 64 columns
BLUE, ORANGE = "#0072B2", "#D55E00"


def real_gradients() -> list[Tensor]:
    """[1, rows, columns] of each step."""
    text = load(DataConfig(max_bytes=400_000), CONTEXT, BATCH).train
    model = GPT(ModelConfig(layers=2, width=64, heads=4, context=CONTEXT), seed=0)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    param = dict(model.named_parameters())[TENSOR]
    grads = []
    for step in range(STEPS):
        opt.zero_grad()
        loss(model, batch(text, 0, step, BATCH, CONTEXT)).backward()
        assert param.grad is not None
        grads.append(param.grad.clone()[None])
        opt.step()
    return grads


def covariances(grads: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean GᵀG of the unseen gradients, [columns, columns], as they are and rotated by the basis of the seen ones."""
    basis = Eigenbasis(sides="columns")
    states = [basis.init_state(grads[0])]
    for step, grad in enumerate(grads[:SEEN]):
        if basis.is_due(step, 0, 1):
            basis.refresh(states, [grad])
        basis.observe(states, [grad])
    basis.refresh(states, [grads[SEEN - 1]])
    plain = torch.cat(grads[SEEN:])
    rotated = torch.cat(basis.project_in(states * len(plain), [grad[None] for grad in plain]))
    return (plain.mT @ plain).mean(0), (rotated.mT @ rotated).mean(0)


def off_diagonal(gram: Tensor) -> float:
    """The share of the squares that is off the diagonal."""
    return float(1 - gram.diagonal().square().sum() / gram.square().sum())


def draw(before: Tensor, after: Tensor, file: Path) -> None:
    figure = Figure(figsize=(4.8, 5.4), dpi=170, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplot_mosaic([["before", "after"], ["diagonal", "diagonal"]])
    left, middle = axes["before"], axes["after"]
    largest = float(torch.stack((before, after)).abs().max())
    for panel, gram, title in ((left, before, "as it is"), (middle, after, "rotated")):
        size = (gram.abs() / largest).clamp(min=1e-9).log10()
        image = panel.imshow(size.numpy(), vmin=-4, vmax=0, cmap="magma", interpolation="nearest")
        panel.set_title(f"{title}: {off_diagonal(gram):.0%}\noff the diagonal", loc="left", fontsize="medium")
        panel.set_xlabel("column" if gram is before else "rotated column")
    bar = figure.colorbar(image, ax=[left, middle], shrink=0.8, location="right", ticks=[-4, -3, -2, -1, 0])
    bar.ax.set_yticklabels(["$10^{-4}$", "$10^{-3}$", "$10^{-2}$", "0.1", "1"])
    _diagonals(axes["diagonal"], before, after)
    figure.savefig(file, metadata={"Software": None})


def _diagonals(axes: Any, before: Tensor, after: Tensor) -> None:
    total = float(before.diagonal().sum())
    for gram, colour, label in ((before, BLUE, "as it is"), (after, ORANGE, "rotated")):
        values = gram.diagonal().sort(descending=True).values / total
        axes.semilogy(values.numpy(), color=colour, label=label)
    axes.set_title("what Adam normalises: the diagonal", loc="left")
    axes.set_xlabel("column, sorted")
    axes.set_ylabel("share of the squares")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("gram.png")
    draw(*covariances(real_gradients()), target)
