"""The tasks: what is trained. Each also works with `selective compare --task evidence.tasks:NAME`.

`scripts` has to be on Python's path for that: `PYTHONPATH=scripts selective compare --task evidence.tasks:python_34m`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evidence.classify import SubjectTask
from evidence.draws import generator, sent
from evidence.foldoc import read as entries_of_foldoc
from evidence.llama import llama_model
from evidence.packed import FOLDER
from evidence.pictures import read as read_pictures
from evidence.reconstruct import PictureTask
from evidence.tokens import Tokens, read
from selective.compare.config import ModelConfig
from selective.compare.model import loss as loss_of

SIZES: dict[str, tuple[int, int, int]] = {"34m": (8, 512, 8), "110m": (12, 768, 12)}  # layers, width, heads


class TextTask:
    """The next-token prediction of a text by a LLaMA-style model; a task of `selective compare`.

    Args:
        tokens: the text.
        shape: layers, width, heads and context of the model.
        batch_size: windows of `shape.context` tokens in a step.
        micro_batch: windows that are put through the model at once, if the loop can split a batch.
        evaluate_windows: held-out windows in an evaluation, evenly spread and the same each time.
        name: of the task, for titles.
        fused: queries, keys and values are one matrix, and a SwiGLU's gate and value another.

    On a GPU, matrix products are in bfloat16 (autocast), and the loss is compiled once: training and evaluation put
    windows of one shape through one graph.
    """

    unit = "nats per token"
    parts = None  # no weight is several matrices

    def __init__(
        self,
        tokens: Tokens,
        shape: ModelConfig,
        batch_size: int = 128,
        micro_batch: int = 64,
        evaluate_windows: int = 512,
        name: str = "text",
        fused: bool = False,
    ) -> None:
        self.name, self.shape, self.batch_size, self.micro_batch = name, shape, batch_size, micro_batch
        self.fused = fused
        self.tokens, self.train, self.held_out = tokens, tokens.train, tokens.held_out
        room = len(self.held_out) - shape.context - 1
        if room < 0 or len(self.train) <= shape.context + 1:
            raise ValueError(f"{name}: the text is too short for windows of {shape.context + 1} tokens")
        self._evaluated = torch.linspace(0, room, evaluate_windows).long()
        self._compiled: Callable[[nn.Module, Tensor], Tensor] | None = None

    def to(self, device: str | torch.device) -> TextTask:
        """The task with its text on a device, so that a batch is cut there. `train` may stay on the CPU as well."""
        self.train, self.held_out = self.train.to(device), self.held_out.to(device)
        return self

    def model(self, seed: int) -> nn.Module:
        return llama_model(self.shape, seed, self.tokens.vocabulary, self.fused)

    def batch(self, seed: int, step: int) -> Tensor:
        """The windows of one step, int64 (batch_size, context + 1), from places that seed and step fix."""
        starts = torch.randint(
            len(self.train) - self.shape.context, (self.batch_size,), generator=generator(f"batch {seed} {step}")
        )
        return self._windows(self.train, starts)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """The mean cross entropy in nats per token."""
        with torch.autocast("cuda", torch.bfloat16, enabled=batch.is_cuda):
            return self._forward(batch)(model, batch)

    def evaluate(self, model: nn.Module) -> float:
        """The mean loss of the held-out windows."""
        model.train()  # no dropout, so the same function; in another mode it would be compiled again
        device = next(model.parameters()).device
        total = torch.zeros((), dtype=torch.float64, device=device)
        with torch.enable_grad():  # the graph that was compiled for training: without gradients it would be another one
            for starts in self._evaluated.split(self.micro_batch):
                windows = self._windows(self.held_out, starts).to(device)
                total += self.loss(model, windows).detach().double() * len(starts)
        return float(total) / len(self._evaluated)

    def facts(self) -> dict[str, Any]:
        return {"text": self.tokens.facts, "shape": self.shape.model_dump(), "batch": self.batch_size}

    def _windows(self, text: Tensor, starts: Tensor) -> Tensor:
        places = torch.arange(self.shape.context + 1, device=text.device)
        return text[sent(starts, text.device)[:, None] + places].long()

    def _forward(self, batch: Tensor) -> Callable[[nn.Module, Tensor], Tensor]:
        if not batch.is_cuda:
            return loss_of
        if self._compiled is None:
            self._compiled = torch.compile(loss_of)
        return self._compiled


def llama(
    text: str = "python", size: str | ModelConfig = "34m", folder: Path = FOLDER, context: int = 512, **options: Any
) -> TextTask:
    """A LLaMA-style model on a text.

    Args:
        text: the name of tokens that `data.py` has made: "python", "english", or those of a file of yours.
        size: "34m", "110m", or layers, width, heads and context.
        folder: where the tokens are.
        context: tokens of a window, if `size` is a name.
        options: further arguments of `TextTask`.
    """
    if isinstance(size, str):
        layers, width, heads = SIZES[size]
        shape, called = ModelConfig(layers=layers, width=width, heads=heads, context=context), size
    else:
        shape, called = size, f"{size.layers}x{size.width}"
    return TextTask(read(text, folder), shape, name=f"{text}-{called}", **options)


def python_34m() -> TextTask:
    return llama("python", "34m")


def english_34m() -> TextTask:
    return llama("english", "34m")


def english_34m_256() -> TextTask:
    return llama("english", "34m", context=256)


def python_110m() -> TextTask:
    return llama("python-16k", "110m")


def english_110m() -> TextTask:
    return llama("english-16k", "110m")


def foldoc_minilm() -> SubjectTask:
    return SubjectTask(entries_of_foldoc(), name="foldoc-minilm")


def pictures_mae() -> PictureTask:
    return PictureTask(read_pictures())


TASKS: dict[str, Callable[[], Any]] = {
    "python-34m": python_34m,
    "english-34m": english_34m,
    "english-34m-256": english_34m_256,
    "python-110m": python_110m,
    "english-110m": english_110m,
    "foldoc-minilm": foldoc_minilm,
    "pictures-mae": pictures_mae,
}
