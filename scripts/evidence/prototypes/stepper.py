"""What the training loop asks of an optimizer, or of a prototype around one."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

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


def by_kind(model: nn.Module) -> dict[str, list[Tensor]]:
    """The trainable parameters by their kind: "matrices", "embeddings", "head" and "vectors"."""
    return {group["name"]: [p for _, p in group["params"]] for group in param_groups_for(model, ask=True)}
