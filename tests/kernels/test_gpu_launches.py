"""The launches of a step do not depend on the number of groups: the table in docs/internals/gpu-kernels.md."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from selective import MeanPreserving, NormPreserving, Policy, SelectiveUpdate, TopK
from selective.kernels import use_backend
from selective.kernels.gpu import configure, launch

# without statistics; with them there is one more, `report_kernel`
LAUNCHES = {
    "CautiousMGUP": 2, "Cautious": 4, "AlphaConsistency": 6, "MGUP": 11, "top-K and mean": 11, "top-K and norm": 13,
    "top-K and gradient's norm": 14,
}  # fmt: skip
PAIRS = {
    "top-K and mean": Policy(selection=TopK(), strength=MeanPreserving()),
    "top-K and norm": Policy(selection=TopK(), strength=NormPreserving()),
    "top-K and gradient's norm": Policy(selection=TopK(), strength=NormPreserving(of="gradient")),
}


def optimizer_of(policy: str, groups: int, statistics: bool, device: str) -> SelectiveUpdate:
    """A large and a small tensor in each group, which differ in their numbers."""
    made: list[dict[str, Any]] = []
    for group in range(groups):
        params = [torch.nn.Parameter(torch.zeros(n, device=device)) for n in (600, 20 + group)]
        made.append({"params": params, "lr": 0.01 * (group + 1), "weight_decay": 0.1 * (group % 2)})
    return SelectiveUpdate(torch.optim.AdamW(made), policy=PAIRS.get(policy, policy), statistics=statistics)


def step(optimizer: SelectiveUpdate) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    with use_backend("gpu"):
        optimizer.step()


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("policy", LAUNCHES)
def test_four_groups_take_as_many_launches_as_one(policy: str, statistics: bool, device: str, monkeypatch) -> None:
    monkeypatch.setattr(configure, "FEWEST_SAMPLES", 256)  # so that 600 elements have a bracket
    names: list[str] = []

    def counted(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        if programs > 0:
            names.append(kernel.fn.__name__)

    monkeypatch.setattr(launch, "run", counted)
    for groups in (1, 4):
        optimizer = optimizer_of(policy, groups, statistics, device)
        for _ in range(3):
            names.clear()
            step(optimizer)
            assert len(names) == LAUNCHES[policy] + statistics, Counter(names)


def test_a_group_whose_policy_changes_its_kind_moves_to_another_batch(device: str, monkeypatch) -> None:
    names: list[str] = []
    monkeypatch.setattr(launch, "run", lambda kernel, *rest, **constants: names.append(kernel.fn.__name__))
    optimizer = optimizer_of("CautiousMGUP", 3, False, device)
    counts = []
    for number in range(5):
        if number == 2:
            optimizer.policy_groups[1].policy = "Cautious"
        if number == 3:
            optimizer.policy_groups[1].policy = "CautiousMGUP"
        names.clear()
        step(optimizer)
        counts.append(names.count("selective_step_kernel"))
    assert counts == [1, 1, 2, 1, 1]
