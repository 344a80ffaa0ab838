"""Checkpoints of every kind that an earlier version wrote: `tests/fixtures/checkpoints.pt`.

    python tests/support/stored_checkpoints.py    # writes the file anew, which gives up its purpose

For each case, the file holds the parameters and the state dict after `SAVED` steps, and the parameters after `END`
steps of the same run. A later version has to load the former and to arrive at the latter. The end of "fused, control"
was written again when a control got other random numbers, and that of "rotated, delta" when its steps got to keep the
stored basis (see `go_on`); its processor is another than that of the fingerprint.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from state_cases import members, numbers, values
from torch import Tensor
from torch.optim import Optimizer

from selective import (
    MGUP,
    AdaDiag,
    AlphaConsistency,
    Cautious,
    CautiousMGUP,
    Eigenbasis,
    Magma,
    Policy,
    RandomMask,
    SelectiveUpdate,
    Soap,
)

FILE = Path(__file__).parent.parent / "fixtures" / "checkpoints.pt"
SAVED, END = 4, 8


class Largest(Policy):
    """A policy with code and state of its own."""

    def init_state(self, view: Any) -> dict[str, Tensor]:
        return {"seen": torch.zeros_like(view.param)}

    def mask(self, view: Any) -> Tensor:
        view.state["seen"].add_(view.grad.abs())
        return (view.state["seen"] >= view.state["seen"].median()).float()


def _params(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(numbers(shape, seed).to(dtype)) for seed, shape in enumerate([(6, 4), (6,), (3, 8)])]


def _adamw(params: Any, **options: Any) -> Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1, **options)


def _groups() -> SelectiveUpdate:
    matrices, vector, more = _params()
    groups = [
        {"params": [matrices], "policy": MGUP()},
        {"params": [vector], "policy": None},
        {"params": [more], "lr": 3e-3, "preconditioner": Soap(refresh_every=2)},
    ]
    return SelectiveUpdate(_adamw(groups), policy=Cautious())


def _residues() -> SelectiveUpdate:
    from optimi import AdamW

    return SelectiveUpdate(AdamW(_params(torch.bfloat16), lr=1e-2, kahan_sum=True), policy=MGUP())


def _wrap(base: Callable[[Any], Optimizer], dtype: torch.dtype = torch.float32, **options: Any) -> SelectiveUpdate:
    return SelectiveUpdate(base(_params(dtype)), seed=3, **options)


def _sgd(params: Any) -> Optimizer:
    return torch.optim.SGD(params, lr=1e-2, momentum=0.9, weight_decay=0.1)


def _nadam(params: Any) -> Optimizer:
    return torch.optim.NAdam(params, lr=1e-2)


def _lion(params: Any) -> Optimizer:
    from pytorch_optimizer import Lion

    return Lion(params, lr=1e-3)


def _adafactor(params: Any) -> Optimizer:
    return torch.optim.Adafactor(params, lr=1e-2)


SPACE = {"refresh_every": 2}
CASES: dict[str, Callable[[], SelectiveUpdate]] = {
    "fused, constants": lambda: _wrap(_adamw, policy=CautiousMGUP()),
    "fused, sums": lambda: _wrap(_adamw, policy=Cautious()),
    "fused, top-K": lambda: _wrap(_adamw, policy=MGUP()),
    "fused, alignment": lambda: _wrap(_adamw, policy=AlphaConsistency()),
    "fused, random": lambda: _wrap(_adamw, policy=RandomMask()),
    "fused, control": lambda: _wrap(_adamw, policy=RandomMask.matching(MGUP())),
    "fused, state of the policy": lambda: _wrap(_adamw, policy=Magma()),
    "fused, bfloat16": lambda: _wrap(_adamw, torch.bfloat16, policy=MGUP(), stochastic_rounding=True),
    "fused, SGD": lambda: _wrap(_sgd, policy=MGUP()),
    "fused, Lion": lambda: _wrap(_lion, policy=Cautious()),
    "scratch": lambda: _wrap(_nadam, policy=MGUP()),
    "scratch, momentum of ours": lambda: _wrap(_nadam, policy=Cautious(), capture="scratch", momentum_beta=0.9),
    "scratch, code of one's own": lambda: _wrap(_adamw, policy=Largest(), capture="scratch"),
    "delta": lambda: _wrap(_adafactor, policy=MGUP(score="update"), capture="delta"),
    "delta, bfloat16": lambda: _wrap(_nadam, torch.bfloat16, policy=Cautious(), capture="delta"),
    "residues": _residues,
    "rotated, fused": lambda: _wrap(_adamw, policy=Cautious(), preconditioner=Soap(**SPACE)),
    "rotated, original mask": lambda: _wrap(
        _adamw, policy=MGUP(), preconditioner=Eigenbasis(**SPACE), mask_space="original"
    ),
    "rotated, one-sided": lambda: _wrap(_adamw, policy=Cautious(), preconditioner=AdaDiag(**SPACE)),
    "rotated, scratch": lambda: _wrap(_nadam, policy=Cautious(), preconditioner=Soap(**SPACE)),
    "rotated, delta": lambda: _wrap(_adafactor, preconditioner=AdaDiag(sides="two", **SPACE)),
    "rotated, rows": lambda: _wrap(_adamw, policy=MGUP(), preconditioner=Soap(**SPACE), matrix_view="rows:3"),
    "groups that differ": _groups,
}


def train(opt: Optimizer, begin: int, end: int) -> None:
    for step in range(begin, end):
        for index, p in enumerate(members(opt)):
            p.grad = numbers(p.shape, 100 * step + index).to(p.dtype)
        opt.step()


def go_on(name: str, opt: SelectiveUpdate) -> None:
    """Take the steps from `SAVED` to `END`."""
    if name == "rotated, delta":
        # AdaDiag's basis is that of one gradient. It has 4 columns and so leaves 2 of 6 directions of the rows open,
        # which each processor fills in its own way. Therefore no basis is made in these steps.
        opt.preconditioner_groups[0]["refresh_every"] = 1000
    train(opt, SAVED, END)


def put(opt: SelectiveUpdate, parameters: list[Tensor]) -> None:
    with torch.no_grad():
        for p, value in zip(members(opt), parameters, strict=True):
            p.copy_(value)


def fingerprint() -> Tensor:
    """A product and a fused step as numbers, whose last bits depend on the machine and on torch."""
    p = torch.nn.Parameter(numbers((24, 16), 1))
    p.grad = numbers((24, 16), 2)
    torch.optim.AdamW([p], lr=0.1, fused=True).step()
    return torch.cat([(p.detach() @ p.detach().T).flatten(), torch.linalg.qr(p.detach()).Q.flatten()])


def run(name: str) -> dict[str, Any]:
    opt = CASES[name]()
    train(opt, 0, SAVED)
    saved = {"parameters": values(opt), "state_dict": copy.deepcopy(opt.state_dict())}
    go_on(name, opt)
    return {**saved, "end": values(opt)}


if __name__ == "__main__":
    torch.save({"fingerprint": fingerprint(), "cases": {name: run(name) for name in CASES}}, FILE)
    print(f"{FILE}: {len(CASES)} cases, {FILE.stat().st_size:,} bytes")
