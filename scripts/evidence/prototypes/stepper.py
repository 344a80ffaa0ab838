"""The interface of an optimizer, or of a prototype around one, for the training loop; and what prototypes share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.optim import Optimizer

from selective import param_groups_for


class Stepper(Protocol):
    """Steps parameters. Every `torch.optim.Optimizer` is one."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    def zero_grad(self) -> None: ...

    def step(self) -> Any: ...


@runtime_checkable
class Finishes(Protocol):
    """Changes the parameters again after the last step."""

    def finish(self) -> None: ...


class Around:
    """An optimizer's groups and gradients, for a prototype that steps it and does something besides."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()


def with_gradients(optimizer: Optimizer) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
    """Yield each parameter that has a gradient, with it and its group."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                yield p, p.grad, group


def by_kind(model: nn.Module) -> dict[str, list[Tensor]]:
    """The trainable parameters by their kind: "matrices", "embeddings", "head" and "vectors"."""
    return {group["name"]: [p for _, p in group["params"]] for group in param_groups_for(model, ask=True)}
