"""Parameter groups as timm and torchtune lay them out, with the schedules that edit them, against the base alone.

timm itself needs torchvision; its layout is written again here: groups of `param_groups_layer_decay` with `lr_scale`
and `param_names`, and a schedule that sets each group's rate by hand.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stack_loops import CASES, LR, assert_same, differences, loss_of, net
from torch import nn

from selective import MGUP, SelectiveUpdate


def layer_decay_groups(model: nn.Sequential, policies: bool = False) -> list[dict[str, Any]]:
    """timm: for each layer one group with decay and one without; the rate falls by 0.7 with each layer from the top."""
    groups = []
    for depth, layer in enumerate(model):
        for name, p in layer.named_parameters():
            decays = p.ndim >= 2
            group: dict[str, Any] = {
                "lr_scale": 0.7 ** (len(model) - 1 - depth),
                "weight_decay": 0.05 if decays else 0.0,
                "param_names": [f"{depth}.{name}"],
                "params": [p],
            }
            if policies:
                group["policy"] = MGUP(tau=0.3) if decays else None
            groups.append(group)
    return groups


class CosineByHand:
    """timm's scheduler: no `LRScheduler`; it reads `initial_lr` and writes `lr` into every group."""

    def __init__(self, optimizer: torch.optim.Optimizer, steps: int) -> None:
        self.optimizer, self.steps = optimizer, steps
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    def step_update(self, number: int) -> None:
        share = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * number / self.steps)).item())
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * share * group.get("lr_scale", 1.0)


def run(model: nn.Module, optimizer: Any, first: int, last: int) -> None:
    schedule = CosineByHand(optimizer, 8)
    for step in range(first, last):
        schedule.step_update(step)
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def wrapped(case: str, policies: bool = False) -> tuple[nn.Sequential, SelectiveUpdate]:
    model = net()
    base = torch.optim.AdamW(layer_decay_groups(model, policies), lr=LR)
    return model, SelectiveUpdate(base, **CASES[case])


def test_dense_groups_step_as_the_base_alone() -> None:
    model = net()
    alone = torch.optim.AdamW(layer_decay_groups(model), lr=LR)
    run(model, alone, 0, 6)
    twin, optimizer = wrapped("dense")
    run(twin, optimizer, 0, 6)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert [g["lr"] for g in optimizer.base.param_groups] == [g["lr"] for g in alone.param_groups]
    assert len({group["lr"] for group in alone.param_groups}) == 2  # lr_scale had an effect


@pytest.mark.parametrize("policies", [False, True], ids=["one-policy", "policies-in-groups"])
@pytest.mark.parametrize("case", CASES)
def test_layer_decay_resumes_bit_for_bit(case: str, policies: bool, tmp_path: Any) -> None:
    model, optimizer = wrapped(case, policies)
    run(model, optimizer, 0, 3)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "at-3.pt")
    run(model, optimizer, 3, 6)
    twin, resumed = wrapped(case, policies)
    saved = torch.load(tmp_path / "at-3.pt", weights_only=True)
    twin.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert [group["lr_scale"] for group in resumed.param_groups] == pytest.approx([0.49, 0.49, 1.0, 1.0])
    assert not any("policy" in group for group in resumed.param_groups)
    run(twin, resumed, 3, 6)
    assert_same((twin, resumed), (model, optimizer))
    other = wrapped(case, not policies)
    run(*other, 0, 6)
    assert differences(other, (model, optimizer))


@pytest.mark.parametrize("policies", [False, True], ids=["one-policy", "policies-in-groups"])
def test_statistics_have_timms_names(policies: bool) -> None:
    model, optimizer = wrapped("mgup", policies)
    run(model, optimizer, 0, 1)
    names = ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert list(optimizer.statistics()) == ([n for n in names if "weight" in n] if policies else names)


class LoRALinear(nn.Module):
    """torchtune's: the weight is frozen, `lora_a` and `lora_b` are trained."""

    def __init__(self, inside: nn.Linear) -> None:
        super().__init__()
        self.inside = inside.requires_grad_(False)
        generator = torch.Generator().manual_seed(5)
        self.lora_a = nn.Parameter(torch.randn(2, inside.in_features, generator=generator))
        self.lora_b = nn.Parameter(torch.zeros(inside.out_features, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inside(x) + x @ self.lora_a.mT @ self.lora_b.mT


def lora(case: str, only_trained: bool) -> tuple[nn.Module, SelectiveUpdate]:
    whole = net()
    model = nn.Sequential(LoRALinear(whole[0]), whole[1], LoRALinear(whole[2]))
    params = [p for p in model.parameters() if p.requires_grad or not only_trained]
    return model, SelectiveUpdate(torch.optim.AdamW(params, lr=LR), **CASES[case])


@pytest.mark.parametrize("only_trained", [False, True], ids=["all-parameters", "trainable-ones"])
@pytest.mark.parametrize("case", CASES)
def test_frozen_weights_stay_and_a_lora_run_resumes(case: str, only_trained: bool, tmp_path: Any) -> None:
    model, optimizer = lora(case, only_trained)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    run(model, optimizer, 0, 3)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "at-3.pt")
    run(model, optimizer, 3, 6)
    twin, resumed = lora(case, only_trained)
    saved = torch.load(tmp_path / "at-3.pt", weights_only=True)
    twin.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    run(twin, resumed, 3, 6)
    assert_same((twin, resumed), (model, optimizer))
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert not torch.equal(model[2].lora_b, torch.zeros_like(model[2].lora_b))
    with_gradient = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(with_gradient) == 4 and len(frozen) == 4
