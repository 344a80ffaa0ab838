"""The task of the masked autoencoder: masked patches of pictures, from those that are left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from evidence.draws import generator, of_epoch, sent
from evidence.mae import MaskedAutoencoder, Shape
from evidence.pictures import Pictures

Batch = tuple[Tensor, Tensor]


class PictureTask:
    """The squared error of masked patches; a task of `selective compare`.

    A batch is pictures, uint8 (n, 3, size, size), half of which are mirrored, and numbers in [0, 1), float
    (n, patches), whose order is that of the patches. Pictures come in epochs. An evaluation is of held-out
    pictures, with the same masks each time.

    Args:
        pictures: to train on, and held out.
        shape: of the model.
        batch_size: pictures in a step.
        evaluated: held-out pictures in an evaluation, at most. A multiple of the batch needs no graph of its own.
        name: of the task, for titles.
    """

    unit = "squared error of a normalised pixel"
    parts = None  # no weight is several matrices
    micro_batch: int | None = None  # all at once

    def __init__(
        self,
        pictures: Pictures,
        shape: Shape | None = None,
        batch_size: int = 256,
        evaluated: int = 512,
        name: str = "pictures-mae",
    ) -> None:
        self.name, self.shape, self.batch_size, self.pictures = name, shape or Shape(), batch_size, pictures
        self.train, self.held_out = pictures.train, pictures.held_out[:evaluated]
        if len(self.train) < batch_size or not len(self.held_out):
            raise ValueError(f"{name}: there are too few pictures for a batch of {batch_size} and for an evaluation")
        self._held_out_order = torch.rand(len(self.held_out), self.shape.patches, generator=generator("held out"))
        self._compiled: Callable[[nn.Module, Batch], Tensor] | None = None

    def to(self, device: str | torch.device) -> PictureTask:
        """The task with its pictures on a device."""
        self.train, self.held_out = self.train.to(device), self.held_out.to(device)
        self._held_out_order = self._held_out_order.to(device)
        return self

    def model(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return MaskedAutoencoder(self.shape)

    def batch(self, seed: int, step: int) -> Batch:
        """The pictures of one step and their masks, which seed and step fix."""
        device = self.train.device
        draws = generator(f"masks {seed} {step}")
        chosen = sent(of_epoch(len(self.train), self.batch_size, seed, step), device)
        mirrored = sent(torch.rand(self.batch_size, generator=draws) < 0.5, device)
        pictures = self.train[chosen]
        pictures = torch.where(mirrored[:, None, None, None], pictures.flip(-1), pictures)
        return pictures, sent(torch.rand(self.batch_size, self.shape.patches, generator=draws), device)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean squared error of a masked pixel, in units of its patch's variance."""
        if not batch[0].is_cuda:
            return _loss(model, batch)
        if self._compiled is None:
            self._compiled = torch.compile(_loss)
        with torch.autocast("cuda", torch.bfloat16):
            return self._compiled(model, batch)

    def evaluate(self, model: nn.Module) -> float:
        """The mean loss of the held-out pictures."""
        model.train()  # no dropout, so the same function; in another mode it would be compiled again
        device = next(model.parameters()).device
        total = torch.zeros((), dtype=torch.float64, device=device)
        with torch.enable_grad():  # the graph that was compiled for training
            size = self.micro_batch or self.batch_size  # as in training, so that one shape is compiled
            parts = (part.to(device).split(size) for part in (self.held_out, self._held_out_order))
            for batch in zip(*parts, strict=True):
                total += self.loss(model, batch).detach().double() * len(batch[0])
        return float(total) / len(self.held_out)

    def facts(self) -> dict[str, Any]:
        return {"pictures": self.pictures.facts, "shape": self.shape.facts(), "batch": self.batch_size}


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    pictures, draws = batch
    return model(pictures.float() / 127.5 - 1, draws.argsort(1))
