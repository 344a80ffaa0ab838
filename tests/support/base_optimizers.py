"""The bases that tests wrap, by name, each with its constructor, the shapes and dtypes it takes, and its state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import optimi
import pytorch_optimizer
import torch
from torch import Tensor
from torch.optim import Optimizer

MIXED = ((12, 8), (8,), (5, 4, 3), (1,), (33, 7))
MATRICES = ((12, 8), (33, 7), (6, 6))
LARGE = ((64, 64), (8,), (5000,))  # 8-bit states start at 4,096 elements


@dataclass(frozen=True)
class Base:
    """A base: `make(params)` builds it; the other fields say which shapes and dtypes it takes."""

    make: Callable[[list[Tensor]], Optimizer]
    shapes: tuple[tuple[int, ...], ...] = MIXED
    low: bool = True
    double: bool = True
    momentum: bool = True
    residue: bool = False  # it keeps the part that rounding takes from low-precision parameters
    way: str = "scratch"  # the capture that "auto" should take in float32
    other_products: bool = False  # its fused rule forms products of matrices in another order than the base


def _transformers_adafactor(**options: object) -> Callable[[list[Tensor]], Optimizer]:
    from transformers.optimization import Adafactor

    return lambda params: Adafactor(params, **options)  # type: ignore[arg-type]


def _adamw8bit(params: list[Tensor]) -> Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(params, lr=1e-2, weight_decay=0.1)


t, po = torch.optim, pytorch_optimizer
BASES: dict[str, Base] = {
    "sgd": Base(lambda p: t.SGD(p, lr=0.1), momentum=False, way="fused"),
    "sgd-momentum": Base(lambda p: t.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.05), way="fused"),
    "sgd-nesterov": Base(lambda p: t.SGD(p, lr=0.1, momentum=0.9, nesterov=True), way="fused"),
    "sgd-dampening": Base(lambda p: t.SGD(p, lr=0.1, momentum=0.9, dampening=0.3, maximize=True, weight_decay=0.05),
                          way="fused"),
    "adam": Base(lambda p: t.Adam(p, lr=1e-2), way="fused"),
    "adam-amsgrad": Base(lambda p: t.Adam(p, lr=1e-2, amsgrad=True), way="fused"),
    "adam-maximize": Base(lambda p: t.Adam(p, lr=1e-2, maximize=True, weight_decay=0.1), way="fused"),
    "adam-coupled": Base(lambda p: t.Adam(p, lr=1e-2, weight_decay=0.1), way="fused"),
    "adamw-foreach": Base(lambda p: t.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True), way="fused"),
    "adamw-fused": Base(lambda p: t.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True), way="fused"),
    "adamw-plain": Base(lambda p: t.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=False), way="fused"),
    "nadam": Base(lambda p: t.NAdam(p, lr=1e-2, weight_decay=0.1, decoupled_weight_decay=True)),
    "nadam-coupled": Base(lambda p: t.NAdam(p, lr=1e-2, weight_decay=0.1)),
    "radam": Base(lambda p: t.RAdam(p, lr=1e-2, weight_decay=0.1)),
    "adamax": Base(lambda p: t.Adamax(p, lr=1e-2, weight_decay=0.1)),
    "rmsprop": Base(lambda p: t.RMSprop(p, lr=1e-2, momentum=0.9), momentum=False),
    "adagrad": Base(lambda p: t.Adagrad(p, lr=1e-2, weight_decay=0.1), momentum=False),
    "adafactor": Base(lambda p: t.Adafactor(p, lr=1e-2, weight_decay=0.1), momentum=False, way="delta"),
    "muon": Base(lambda p: t.Muon(p, lr=1e-2, weight_decay=0.1), MATRICES, way="fused", other_products=True),
    "po-lion": Base(lambda p: po.Lion(p, lr=1e-2, weight_decay=0.1), way="fused"),
    "po-ademamix": Base(lambda p: po.AdEMAMix(p, lr=1e-2, weight_decay=0.1)),
    "po-lamb": Base(lambda p: po.Lamb(p, lr=1e-2, weight_decay=0.1), way="delta"),
    "po-came": Base(lambda p: po.CAME(p, lr=1e-2, weight_decay=0.1), momentum=False),
    "po-tiger": Base(lambda p: po.Tiger(p, lr=1e-2, weight_decay=0.1)),
    "po-stableadamw": Base(lambda p: po.StableAdamW(p, lr=1e-2, weight_decay=0.1), residue=True),  # Kahan sums
    "optimi-adamw": Base(lambda p: optimi.AdamW(p, lr=1e-2, weight_decay=0.1), residue=True),
    "optimi-lion": Base(lambda p: optimi.Lion(p, lr=1e-2, weight_decay=0.1), residue=True),
    "transformers-adafactor": Base(_transformers_adafactor(weight_decay=0.1), momentum=False, way="delta"),
    "transformers-adafactor-fixed": Base(
        _transformers_adafactor(lr=1e-2, relative_step=False, scale_parameter=False, weight_decay=0.1), momentum=False
    ),
    "torchao-adamw8bit": Base(_adamw8bit, LARGE, double=False),
}  # fmt: skip


def build(base: Base, params: list[torch.nn.Parameter]) -> Optimizer:
    """Build the optimizer. In float16 its eps does not round to zero, as torch's default would."""
    optimizer = base.make(params)
    for group in optimizer.param_groups:
        if params[0].dtype == torch.float16 and isinstance(group.get("eps"), float):
            group["eps"] = 1e-4
    return optimizer


def make_params(base: Base, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.nn.Parameter]:
    """Parameters of the base's shapes, with standard normal values in `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in base.shapes]


def give_grads(params: list[torch.nn.Parameter], step: int, seed: int = 1, dtype: torch.dtype | None = None) -> None:
    """Set the gradients of a step. They are correlated over steps, as real ones are, and exact in bfloat16."""
    for index, p in enumerate(params):
        mean = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed * 1000 + index))
        noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed * 1000 + 100 * (step + 1) + index))
        p.grad = (0.3 * mean + noise).bfloat16().to(dtype or p.dtype)
