"""Optimizer in backward: one `SelectiveUpdate` a parameter steps in `register_post_accumulate_grad_hook`.

No gradient outlives the backward pass. What has to hold: selection looks at one tensor at a time, so that a run is the
plain loop's bit for bit; but for random policies, which draw by address (every optimizer's only parameter has address
0) and so need a seed of their own each.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stack_loops import CASES, LR, differences, loss_of, net, train, wrap
from torch import Tensor, nn

from selective import Eigenbasis, SelectiveUpdate


class Run:
    """As torchtune does it: a dictionary of optimizers, stepped and emptied by hooks."""

    def __init__(self, case: str, seeds: bool = False) -> None:
        self.model = net()
        self.optimizers: dict[str, SelectiveUpdate] = {}
        for number, (name, p) in enumerate(self.model.named_parameters()):
            options = {**CASES[case], **({"seed": number} if seeds else {})}
            self.optimizers[name] = SelectiveUpdate(torch.optim.AdamW([p], lr=LR), **options)
            p.register_post_accumulate_grad_hook(self.hook(self.optimizers[name]))

    @staticmethod
    def hook(optimizer: SelectiveUpdate) -> Any:
        def step(parameter: Tensor) -> None:
            optimizer.step()
            optimizer.zero_grad()

        return step

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            loss_of(self.model, step).backward()
            assert all(p.grad is None for p in self.model.parameters())

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            **{name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
        }

    def load(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(saved[name])


def different_parameters(a: nn.Module, b: nn.Module) -> list[str]:
    return [n for (n, p), q in zip(a.named_parameters(), b.parameters(), strict=True) if not torch.equal(p, q)]


@pytest.mark.parametrize("case", ["dense", "mgup", "soap", "mgup-eigenbasis"])
def test_steps_are_those_of_the_plain_loop(case: str) -> None:
    run = Run(case)
    run.train(0, 6)
    model = net()
    train(model, wrap(model, case), range(6))
    assert different_parameters(run.model, model) == []


def test_refreshes_take_turns_over_the_matrices_of_one_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here each matrix has an optimizer of its own, so that steps are not those of the plain loop."""
    monkeypatch.setitem(CASES, "in turns", {"preconditioner": Eigenbasis(refresh_every=2, stagger=True)})
    run = Run("in turns")
    run.train(0, 6)
    model = net()
    train(model, wrap(model, "in turns"), range(6))
    assert different_parameters(run.model, model)


@pytest.mark.parametrize("case", CASES)
def test_it_resumes_bit_for_bit(case: str, tmp_path: Any) -> None:
    run = Run(case, seeds=True)
    run.train(0, 3)
    torch.save(run.state_dict(), tmp_path / "at-3.pt")
    run.train(3, 6)
    resumed = Run(case, seeds=True)
    resumed.load(torch.load(tmp_path / "at-3.pt", weights_only=True))
    assert different_parameters(resumed.model, run.model)
    resumed.train(3, 6)
    assert different_parameters(resumed.model, run.model) == []
    for name, optimizer in run.optimizers.items():
        assert differences((resumed.model, resumed.optimizers[name]), (run.model, optimizer)) == []


def test_random_masks_are_the_same_in_equal_shapes_without_seeds_of_their_own() -> None:
    masks = []
    for seeds in (False, True):
        params = [nn.Parameter(torch.zeros(64)) for _ in range(2)]
        for number, p in enumerate(params):
            p.grad = torch.ones(64)
            options = {**CASES["random"], "seed": number if seeds else 0}
            SelectiveUpdate(torch.optim.AdamW([p], lr=LR), **options).step()
        masks.append([p.detach() != 0 for p in params])
    assert torch.equal(*masks[0])
    assert not torch.equal(*masks[1])
