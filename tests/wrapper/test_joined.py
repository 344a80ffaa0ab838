"""A stack that joins a group's tensors into one vector after the optimizer was wrapped, as DeepSpeed's ZeRO does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from selective import MGUP, Cautious, Dense, Eigenbasis, Policy, RandomMask, SelectiveUpdate, Soap
from selective.plan import group_params as members_module

CASES: dict[str, dict[str, Any]] = {
    "mgup": {"policy": MGUP()},
    "cautious": {"policy": Cautious()},
    "random": {"policy": RandomMask()},
    "soap": {"preconditioner": Soap()},
    "mgup-eigenbasis": {"policy": MGUP(), "preconditioner": Eigenbasis()},
}


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((6, 4), (4,), (3, 4))]


def joined(group: dict[str, Any], ranks: int = 1, padding: int = 0) -> Tensor:
    """The group's parameters become one vector with a gradient: this rank's part of it, padded."""
    flat = torch.cat([p.detach().reshape(-1) for p in group["params"]])
    part = nn.functional.pad(flat, (0, padding))[: (flat.numel() + padding) // ranks].clone().requires_grad_()
    part.grad = torch.ones_like(part)
    group["params"] = [part]
    return part


@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.RAdam], ids=["fused", "scratch"])
@pytest.mark.parametrize("case", CASES)
def test_a_step_on_the_vector_is_refused(case: str, base: Any) -> None:
    """The first step says so, in which DeepSpeed makes the base's state, and nothing has moved."""
    optimizer = SelectiveUpdate(base(parameters(), lr=0.01), **CASES[case])
    flat = joined(optimizer.param_groups[0], padding=2)
    before = flat.detach().clone()
    for _ in range(2):  # and it stays refused
        with pytest.raises(
            ValueError, match=r"param_groups\[0\] had 3 tensors .* vector of 42 elements .*FSDP2.*stage 0"
        ):
            optimizer.step()
    assert torch.equal(flat, before)


def test_one_ranks_part_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = SelectiveUpdate(torch.optim.AdamW(parameters(), lr=0.01), policy=MGUP())
    joined(optimizer.param_groups[0], ranks=4)
    monkeypatch.setattr("selective.plan.flattened._ranks", lambda: 4)
    with pytest.raises(ValueError, match="vector of 10 elements"):
        optimizer.step()


def test_emptied_tensors_are_known_by_the_shapes_that_they_had() -> None:
    params = parameters()
    optimizer = SelectiveUpdate(torch.optim.AdamW(params, lr=0.01), policy=MGUP())
    joined(optimizer.param_groups[0])
    for p in params:
        p.data = torch.empty(0)
    with pytest.raises(ValueError, match="vector of 40 elements"):
        optimizer.step()


def test_the_base_alone_steps_on_it_as_without_us() -> None:
    steps = []
    for wrap in (lambda base: base, lambda base: SelectiveUpdate(base, policy=Dense())):
        optimizer = wrap(torch.optim.AdamW(parameters(), lr=0.01))
        steps.append(joined(optimizer.param_groups[0]))
        optimizer.step()
    assert torch.equal(*steps)


@pytest.mark.parametrize("shapes", [((5, 4), (4,)), ((9,),), ((40,),), ()], ids=str)
def test_parameters_that_somebody_exchanged_are_not_joined(shapes: tuple[tuple[int, ...], ...]) -> None:
    optimizer = SelectiveUpdate(torch.optim.AdamW(parameters(), lr=0.01), policy=MGUP())
    optimizer.param_groups[0]["params"] = others = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    for p in others:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all((p != 1).all() for p in others)


def test_a_group_of_one_vector_may_get_another() -> None:
    optimizer = SelectiveUpdate(torch.optim.AdamW([nn.Parameter(torch.ones(5))], lr=0.01), policy=MGUP())
    vector = torch.ones(9, requires_grad=True)
    vector.grad = torch.ones(9)
    optimizer.param_groups[0]["params"] = [vector]
    optimizer.step()
    assert (vector != 1).all()


class Halves(Policy):
    """Of the first half of each tensor alone."""

    def mask(self, view: Any) -> Tensor:
        return (torch.arange(view.update.numel()) < view.update.numel() // 2).reshape(view.update.shape)


def test_unrefused_it_selects_otherwise_than_on_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The failing twin: what a run got that was not told."""
    monkeypatch.setattr(members_module, "are_joined", lambda shapes, params: False)
    whole, flat = (SelectiveUpdate(torch.optim.SGD(parameters(), lr=1.0), policy=Halves()) for _ in range(2))
    start = torch.cat([p.detach().reshape(-1) for p in parameters()])
    for p in whole.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    vector = joined(flat.param_groups[0])
    whole.step()
    flat.step()
    moved = torch.cat([p.detach().reshape(-1) for p in whole.param_groups[0]["params"]]) != start
    assert not torch.equal(moved, vector.detach() != start)
