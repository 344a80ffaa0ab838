"""Two small wrappers that do everything right, and that the broken ones break in one way each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Identity(Optimizer):
    """Hands the step to the base. A real `Optimizer` over the base's own groups and state."""

    def __init__(self, base: Optimizer) -> None:
        self.base = base
        self._constructing = True
        super().__init__([{"params": []}], base.defaults)
        self._constructing = False

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if not self._constructing:  # Optimizer.__init__ sets an empty list
            self.base.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.base.state

    @state.setter
    def state(self, value: Any) -> None:
        if not self._constructing:
            self.base.state = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if not self._constructing:
            self.base.add_param_group(param_group)

    def step(self, closure: Any = None) -> Any:
        return self.unpatched_step(closure)

    def unpatched_step(self, closure: Any) -> Any:
        """The step that a subclass overrides: torch patches each class's own `step`, and hooks would fire for each."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.inner_step()
        return loss

    def inner_step(self) -> None:
        self.step_base()

    def step_base(self) -> None:
        """The base's step without torch's patch around it: that fires the global hooks, which are fired already."""
        type(self.base).step.__wrapped__(self.base)  # type: ignore[attr-defined]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        self.base.load_state_dict(state_dict)
        self.restore_dtypes(state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def restore_dtypes(self, state_dict: dict[str, Any]) -> None:
        """torch has cast floating state to the parameters' dtype: take the saved tensors instead."""
        saved = [name for group in state_dict["param_groups"] for name in group["params"]]  # numbers, or DCP's names
        live = [p for group in self.param_groups for p in group["params"]]
        for name, p in zip(saved, live, strict=True):
            for key, value in state_dict["state"].get(name, {}).items():
                if isinstance(value, Tensor) and self.base.state[p][key].dtype != value.dtype:
                    self.base.state[p][key] = value.to(p.device)

    def train(self) -> None:
        if hasattr(self.base, "train"):
            self.base.train()  # type: ignore[operator]

    def eval(self) -> None:
        if hasattr(self.base, "eval"):
            self.base.eval()  # type: ignore[operator]

    def __getstate__(self) -> dict[str, Any]:
        return {"base": self.base}

    def __setstate__(self, state: dict[str, Any]) -> None:
        type(self).__init__(self, state["base"])


class HalfAgainst(Identity):
    """The full step where the update agrees with the gradient, half of it elsewhere, by differencing."""

    rest = 0.5

    def mask(self, p: Tensor, update: Tensor, grad: Tensor) -> Tensor:
        return torch.where(update * grad > 0, 1.0, self.rest)

    def inner_step(self) -> None:
        taken = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        grads = [p.grad.clone() for p in taken]  # before the base, which may write on them
        before = [p.detach().clone() for p in taken]
        self.step_base()
        for p, grad, old in zip(taken, grads, before, strict=True):
            update = (old.float() - p.detach().float()).to(torch.float32)
            kept = 1 - self.mask(p, update, grad.float())
            with torch.no_grad():
                p.copy_(p.float() + kept * update)
