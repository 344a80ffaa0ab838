"""Base optimizers for the suite to wrap. Each misbehaves in one known way, and all compute the same Adam."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class ProbeAdam(Optimizer):
    """Adam in its plainest form. Each other probe changes one thing."""

    def __init__(self, params: Any, lr: float = 1e-2, betas: tuple[float, float] = (0.9, 0.99), eps: float = 1e-8):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    def new_state(self, p: Tensor) -> dict[str, Any]:
        return {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

    def before(self, p: Tensor, state: dict[str, Any]) -> None:
        """Called before a parameter moves, with its state before the base touches it."""

    def after(self, p: Tensor, state: dict[str, Any]) -> None:
        """Called after a parameter has moved."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                self.before(p, state)
                if len(state) == 0:
                    state.update(self.new_state(p))
                self.move(p, state, group)
                self.after(p, state)
        return loss

    def move(self, p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        state["step"] += 1
        m, v = state["exp_avg"], state["exp_avg_sq"]
        assert p.grad is not None
        g = p.grad.to(m.dtype)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        root = (v / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        p.sub_((m / root * (group["lr"] / (1 - beta1 ** state["step"]))).to(p.dtype))


class WritesOnGradients(ProbeAdam):
    """Uses `p.grad` as scratch space: after the step it no longer holds the gradient."""

    def after(self, p: Tensor, state: dict[str, Any]) -> None:
        assert p.grad is not None
        p.grad.mul_(-3.0)


class ClearsGradients(ProbeAdam):
    """Frees gradients as it goes."""

    def after(self, p: Tensor, state: dict[str, Any]) -> None:
        p.grad = None


class HasModes(ProbeAdam):
    """Has `train()` and `eval()`, as schedule-free optimizers do."""

    mode = "unset"

    def train(self) -> None:
        self.mode = "train"

    def eval(self) -> None:
        self.mode = "eval"


class WatchesState(ProbeAdam):
    """Remembers every state entry that it did not make itself."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self.foreign: set[str] = set()

    def before(self, p: Tensor, state: dict[str, Any]) -> None:
        self.foreign |= set(state) - {"step", "exp_avg", "exp_avg_sq"}


class ExactStates(ProbeAdam):
    """float32 moments, a 64-bit counter and a flag, whatever the parameter's dtype."""

    def new_state(self, p: Tensor) -> dict[str, Any]:
        moments = {key: torch.zeros_like(p, dtype=torch.float32) for key in ("exp_avg", "exp_avg_sq")}
        # 1001 is not a bfloat16 number, and 2**24 + 1 not a float32 one.
        return {"step": 0, **moments, "count": torch.tensor(2**24 + 1), "seen": torch.tensor([1001.0, 0.1]),
                "flag": torch.tensor(True)}  # fmt: skip


class CodedMoment(ProbeAdam):
    """Keeps its first moment as unsigned 8-bit codes with a scale: `exp_avg` as stored is no moment at all."""

    def new_state(self, p: Tensor) -> dict[str, Any]:
        codes = torch.full(p.shape, 128, dtype=torch.uint8)
        return {"step": 0, "exp_avg": codes, "scale": torch.zeros(()), "exp_avg_sq": torch.zeros_like(p)}

    def move(self, p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        real = {**state, "exp_avg": (state["exp_avg"].float() - 128) / 127 * state["scale"]}
        super().move(p, real, group)
        scale = real["exp_avg"].abs().max()
        codes = (real["exp_avg"] / scale.clamp(min=1e-30) * 127).round() + 128
        state.update(step=real["step"], exp_avg=codes.to(torch.uint8), scale=scale)
