"""Crowds: many equal scores at the threshold, as those of an embedding's rows that have no gradient, which are all 0.

They are what is expensive to count one by one, and what a list of undecided elements can't hold.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_support import F32, copied, few_samples, gpu, made, short_lists

from selective.kernels import AdamRule, Draw, Item, LionRule, Selection, Strength, selective_step
from selective.kernels.gpu.device import config
from selective.kernels.gpu.launch import Step

ADAM, LION = AdamRule(0.5, 0.9, 0.99, 1e-8), LionRule(0.5, 0.9, 0.99)
ZERO = 0x80000000  # the key of a score of 0
K = Selection("top_k", fraction=0.4)
STRENGTHS = {
    "one pass": (ADAM, Strength("fixed", 1.0, 0.0)),
    "one pass that forms sums": (ADAM, Strength("norm_preserving", cap=1e9)),
    "two passes": (LION, Strength("fixed", 1.0, 0.0)),
    "two passes, a mean": (LION, Strength("mean_preserving", cap=1e9)),
}


@pytest.fixture
def before_repair(monkeypatch) -> list[torch.Tensor]:
    """The table of ranks of each step, as it is before tensors are repaired."""
    few_samples(monkeypatch)
    found: list[torch.Tensor] = []
    repair = Step._repair

    def noted(self: Step, *arguments: Any) -> None:
        found.append(self.tables.ranks.cpu().view(-1, config.RANKS.value).clone())
        repair(self, *arguments)

    monkeypatch.setattr(Step, "_repair", noted)
    return found


def item_of(rule: Any, like: str, device: str, address: int = 5) -> Item:
    item = made(rule, (60, 50), (F32, F32, F32), seed=address)
    if like == "untouched rows":
        item.grad[:55] = 0
    elif like == "constant":
        for x in (item.grad, *(value for name, value in item.state.items() if name != "step")):
            x.fill_(0.5)
    elif like == "ten values":
        for x in (item.grad, *(value for name, value in item.state.items() if name != "step")):
            x.fill_(0.5)
        item.grad *= 1 + torch.arange(item.grad.numel()).view(item.grad.shape) % 10
    return copied(item, device)


@pytest.mark.parametrize("way", STRENGTHS)
@pytest.mark.parametrize("like", ["normal", "untouched rows", "constant"])
def test_the_kth_score_of_a_crowd_is_known_before_the_repair(way, like, device, before_repair):
    rule, strength = STRENGTHS[way]
    item = item_of(rule, like, device)
    gpu(item, rule, selection=K, strength=strength)
    (ranks,) = before_repair
    row = ranks[0]
    crowd, tie = int(row[config.CROWD.value]), int(row[config.TIE.value])
    if like == "normal":
        assert (crowd, tie) == (0, -1)
    else:
        assert crowd == tie and (tie == ZERO) == (like == "untouched rows")


def test_known_and_unknown_thresholds_take_turns(device, before_repair, monkeypatch):
    """Tensors that need a search and tensors that need none share one launch, and each is as if it were alone.

    Of ten values, each of a tenth of the elements, the K-th score is the last of the fourth: a bracket spans two, and
    either fills lists of 16.
    """
    short_lists(monkeypatch)
    kinds = ["ten values", "untouched rows", "ten values", "ten values", "constant", "untouched rows", "ten values"]
    items = [item_of(ADAM, like, device, address) for address, like in enumerate(kinds)]
    for item in items:
        item.param.zero_()  # so that only what is selected moves
    alone = [copied(item) for item in items]
    how = {"rule": ADAM, "selection": K, "strength": Strength("fixed", 1.0, 0.0), "draw": Draw(7, 3), "backend": "gpu"}
    selective_step(items, **how)
    (ranks,) = before_repair
    known = (ranks[: len(kinds), config.TIE.value] >= 0).tolist()
    assert known == [like != "ten values" for like in kinds]
    assert (ranks[: len(kinds), config.CRITICAL.value] == -1).all()
    for item, other in zip(items, alone, strict=True):
        selective_step([other], **how)
        assert torch.equal(item.param, other.param)
        assert int(item.param.count_nonzero()) == int(0.4 * item.param.numel())
