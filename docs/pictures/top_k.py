"""Draws top_k.png of docs/how-it-works/kernels.md: how the K-th largest score of one tensor is found, on real scores.

    python docs/pictures/top_k.py [FILE]

A GPT of 1.7M parameters is trained for 40 steps of AdamW on the source of Python's standard library, on the CPU, in a
few seconds. The scores are the update times the gradient of one of its tensors. What is drawn is the algorithm of
`kernels/gpu/device/scores.py`, written again in a few lines of torch.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from selective.compare.config import DataConfig, ModelConfig
from selective.compare.data import load
from selective.compare.model import GPT, loss
from selective.kernels import Draw, uniform_bits

STEPS, BATCH, CONTEXT = 40, 8, 64
TENSOR = "blocks.0.qkv.weight"  # 196,608 elements
SAMPLES, RUN, WIDTH, SAMPLE_STREAM = 8_192, 8, 3.75, 1
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#BBBBBB"


def real_scores() -> Tensor:
    """The update times the gradient, of every element of one tensor."""
    text = load(DataConfig(max_bytes=400_000), CONTEXT, BATCH).train.long()
    model = GPT(ModelConfig(layers=2, width=256, heads=4, context=CONTEXT), seed=0)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        starts = torch.randint(0, len(text) - CONTEXT - 1, (BATCH,), generator=generator).tolist()
        opt.zero_grad()
        loss(model, torch.stack([text[at : at + CONTEXT + 1] for at in starts])).backward()
        opt.step()
    param = dict(model.named_parameters())[TENSOR]
    state, grad = opt.state[param], param.grad
    assert grad is not None
    unbiased = state["exp_avg_sq"] / (1 - 0.999**STEPS)
    update = 1e-3 * (state["exp_avg"] / (1 - 0.9**STEPS)) / (unbiased.sqrt() + 1e-8)
    return (update * grad).flatten()


def keys(scores: Tensor) -> Tensor:
    """Unsigned 32-bit integers in the order of the scores (as int64)."""
    bits = (scores + 0.0).view(torch.int32).long()
    return torch.where(bits < 0, ~bits, bits + (1 << 31)) & 0xFFFFFFFF


def score(key: int) -> float:
    bits = key - (1 << 31) if key >= 1 << 31 else ~key
    return float(torch.tensor([bits], dtype=torch.int64).to(torch.int32).view(torch.float32))


@dataclass
class Found:
    """Keys: the sample's quantile, the bracket's ends, the K-th. Bins: of all keys inside, and the K-th's."""

    quantile: int
    low: int
    high: int
    kth: int
    shift: int
    counts: Tensor
    critical: int


def find(scores: Tensor) -> Found:
    numel, key = len(scores), keys(scores)
    wanted, runs = numel // 2, SAMPLES // RUN
    edges = torch.arange(runs + 1) * numel // runs
    bits = uniform_bits(Draw(0, STEPS), 0, runs, stream=SAMPLE_STREAM).long()
    starts = edges[:-1] + (bits * (edges[1:] - edges[:-1] - (RUN - 1)) >> 24)
    sample = key[starts[:, None] + torch.arange(RUN)]
    ranked = sample.flatten().sort(descending=True).values
    place = wanted / numel * SAMPLES
    in_run = (sample >= ranked[round(place) - 1]).sum(1).double()
    margin = WIDTH * math.sqrt(float(in_run.var(correction=0)) * runs) + 2
    low = int(ranked[int(place + margin)]) >> 11 << 11
    high = int(ranked[int(place - margin) - 1]) | 2047
    shift = max(int(math.log2(high - low)) + 1 - 11, 0)
    inside = key[(key >= low) & (key <= high)]
    counts = torch.bincount(inside - low >> shift)
    kth = int(key.sort(descending=True).values[wanted - 1])
    return Found(int(ranked[round(place) - 1]), low, high, kth, shift, counts, (kth - low) >> shift)


def draw(scores: Tensor, found: Found, file: Path) -> None:
    figure = Figure(figsize=(5.2, 8.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    everything, bracket, bins = figure.subplots(3, 1)
    _everything(everything, scores, found)
    _bracket(bracket, found)
    _bins(bins, scores, found)
    for axes in (everything, bracket, bins):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylabel("elements" if axes is not bins else "")
    bins.set_xlabel("score, update × gradient")
    figure.savefig(file, metadata={"Software": None})


def _marks(axes: Any, found: Found) -> None:
    axes.axvline(score(found.quantile), color=GREEN, linestyle=(0, (4, 2)), label="the sample's quantile")
    axes.axvline(score(found.kth), color=ORANGE, label="the K-th largest score")


def _everything(axes: Any, scores: Tensor, found: Found) -> None:
    shown = scores[(scores > -4e-8) & (scores < 6e-8)]
    axes.hist(shown.numpy(), bins=250, color=GREY)
    axes.set_xlim(-4e-8, 6e-8)
    low, high = score(found.low), score(found.high)
    share = float(((scores >= low) & (scores <= high)).double().mean())
    axes.axvspan(low, high, color=BLUE, alpha=0.3, label=f"the bracket: {share:.1%} undecided")
    _marks(axes, found)
    axes.set_title(f"1  A sample of {SAMPLES:,} of {len(scores):,} scores\ngives the bracket", loc="left")
    axes.text(-3.9e-8, axes.get_ylim()[1] * 0.5, "below: × γ")
    axes.text(5.9e-8, axes.get_ylim()[1] * 0.5, "above: × α", ha="right")
    axes.legend(loc="upper right", frameon=False)


def _bracket(axes: Any, found: Found) -> None:
    edges = [score(found.low + (i << found.shift)) for i in range(len(found.counts) + 1)]
    axes.stairs(found.counts.numpy(), edges, fill=True, color=BLUE, alpha=0.4)
    _marks(axes, found)
    axes.set_title(f"2  The bracket's histogram, {len(found.counts):,} bins:\nwhich one holds the K-th", loc="left")
    axes.set_xlim(edges[0], edges[-1])


def _bins(axes: Any, scores: Tensor, found: Found) -> None:
    first, last = found.critical - 3, found.critical + 4
    edges = [score(found.low + (i << found.shift)) for i in range(first, last + 1)]
    axes.axvspan(edges[3], edges[4], color=BLUE, alpha=0.15)
    for edge in edges:
        axes.axvline(edge, color=GREY, linewidth=0.8)
    near = scores[(scores >= edges[0]) & (scores < edges[-1])].sort().values
    chosen = keys(near) >= found.kth
    height = torch.arange(len(near))
    for which, colour, label in ((chosen, BLUE, "selected"), (~chosen, "black", "not selected")):
        axes.plot(near[which].numpy(), height[which].numpy(), ".", color=colour, label=label)
    axes.plot(score(found.kth), float(height[chosen][0]), "o", markersize=12, fillstyle="none", color=ORANGE,
              label="the K-th")  # fmt: skip
    axes.set_title("3  The critical bin (shaded):\nits elements are ranked one by one", loc="left")
    axes.set_xlim(edges[0], edges[-1])
    axes.set_yticks([])
    axes.legend(loc="lower right", frameon=False)


if __name__ == "__main__":
    found_scores = real_scores()
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("top_k.png")
    draw(found_scores, find(found_scores), target)
