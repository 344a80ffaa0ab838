"""The task of fine-tuning: the subject of an entry of a dictionary, from pretrained weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from evidence.bert import pretrained
from evidence.draws import of_epoch, sent
from evidence.foldoc import Entries


class SubjectTask:
    """The cross entropy of an entry's subject; a task of `selective compare`.

    A batch is tokens, int64 (entries, length), and classes, int64 (entries,). An epoch is a permutation that the seed
    fixes, and what is left of it is dropped. The seed fixes the head's start, too; everything else is pretrained.
    """

    unit = "nats per entry"
    parts = None  # no weight is several matrices
    micro_batch = None

    def __init__(self, entries: Entries, batch_size: int = 32, name: str = "foldoc") -> None:
        self.name, self.batch_size, self.entries = name, batch_size, entries
        train = ~entries.held_out
        self.train = (entries.tokens[train], entries.classes[train])
        self.held_out = (entries.tokens[~train], entries.classes[~train])
        if len(self.train[0]) < batch_size or not len(self.held_out[0]):
            raise ValueError(f"{name}: there are too few entries for a batch of {batch_size} and for an evaluation")

    def to(self, device: str | torch.device) -> SubjectTask:
        """The task with its entries on a device."""
        self.train = (self.train[0].to(device), self.train[1].to(device))
        self.held_out = (self.held_out[0].to(device), self.held_out[1].to(device))
        return self

    def model(self, seed: int) -> nn.Module:
        return pretrained(self.entries.weights, 1 + int(self.entries.classes.max()), seed)

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """The entries of one step, which seed and step fix."""
        tokens, classes = self.train
        chosen = sent(of_epoch(len(tokens), self.batch_size, seed, step), tokens.device)
        return tokens[chosen], classes[chosen]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The mean cross entropy in nats per entry."""
        tokens, classes = batch
        return nn.functional.cross_entropy(self._logits(model, tokens), classes)

    def evaluate(self, model: nn.Module) -> float:
        """The mean loss of the held-out entries."""
        return self._of_held_out(model, nn.functional.cross_entropy)

    def measures(self, model: nn.Module) -> dict[str, float]:
        """The share of the held-out entries whose subject is the one with the highest logit."""
        return {
            "accuracy": self._of_held_out(model, lambda logits, classes: (logits.argmax(1) == classes).double().mean())
        }

    def _of_held_out(self, model: nn.Module, measure: Callable[[Tensor, Tensor], Tensor]) -> float:
        """The mean over the held-out entries of a measure of logits and classes. It waits for the device once."""
        device = next(model.parameters()).device
        total = torch.zeros((), dtype=torch.float64, device=device)
        for tokens, classes in zip(*(part.to(device).split(256) for part in self.held_out), strict=True):
            total += measure(self._logits(model, tokens), classes).detach().double() * len(tokens)
        return float(total) / len(self.held_out[0])

    def facts(self) -> dict[str, Any]:
        content = hashlib.sha256(json.dumps(self.entries.facts, sort_keys=True).encode())
        for tensor in (self.entries.tokens, self.entries.classes, self.entries.held_out):
            content.update(tensor.numpy().tobytes())
        return {"entries": content.hexdigest(), "batch": self.batch_size}

    def _logits(self, model: nn.Module, tokens: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=tokens.is_cuda):
            return model(tokens).float()
