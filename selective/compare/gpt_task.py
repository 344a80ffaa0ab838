"""The built-in task: a small GPT over bytes of text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from selective.compare import data, model
from selective.compare.config import DataConfig, ModelConfig
from selective.compare.spaces import JOINED


class GPTTask:
    """The task that `selective compare` trains unless it is given another: a small GPT over bytes of text.

    Losses are in nats per byte.

    Args:
        shape: layers, width, heads and context of the model.
        text: where the text comes from.
        batch_size: windows of text in a step.
        evaluate_windows: held-out windows in an evaluation.

    Raises:
        ConfigError: the text can't be read, or is too short.
    """

    name = "GPT on bytes"
    unit = "nats per byte"
    parts: Mapping[str, int] = JOINED

    def __init__(
        self,
        shape: ModelConfig | None = None,
        text: DataConfig | None = None,
        batch_size: int = 8,
        evaluate_windows: int = 64,
    ) -> None:
        self.shape = ModelConfig.model_validate({}) if shape is None else shape
        self.batch_size, self.evaluate_windows = batch_size, evaluate_windows
        source = DataConfig.model_validate({}) if text is None else text
        self.text = data.load(source, self.shape.context, batch_size)
        self._held_out = data.held_out(self.text.validation, evaluate_windows, self.shape.context)

    def model(self, seed: int) -> nn.Module:
        return model.GPT(self.shape, seed)

    def batch(self, seed: int, step: int) -> Tensor:
        return data.batch(self.text.train, seed, step, self.batch_size, self.shape.context)

    def loss(self, network: nn.Module, batch: Tensor) -> Tensor:
        return model.loss(network, batch)

    def evaluate(self, network: nn.Module) -> float:
        """The mean loss of the held-out windows, always in the same chunks, so that a resumed run gets the same."""
        device = next(network.parameters()).device
        chunks = self._held_out.split(self.batch_size)
        total = sum(model.loss(network, chunk.to(device)).item() * len(chunk) for chunk in chunks)
        return total / len(self._held_out)

    def facts(self) -> dict[str, Any]:
        sizes = {"train_bytes": len(self.text.train), "validation_bytes": len(self.text.validation)}
        return {"source": self.text.source, "sha256": self.text.fingerprint, **sizes}
