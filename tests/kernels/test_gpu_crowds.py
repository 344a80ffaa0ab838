"""Crowds: many equal scores at the threshold, as those of an embedding's rows that have no gradient, which are all 0.

They are what is expensive to count one by one, and what a list of undecided elements can't hold.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from gpu_support import F32, copied, few_samples, gpu, made, short_lists

from selective.kernels import AdamRule, Draw, GivenRule, Item, LionRule, Selection, Strength, selective_step
from selective.kernels.gpu.device import config
from selective.kernels.gpu.device.top_k import repair
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["one pass", "two passes"])
def test_a_crowd_above_the_kth_score_counts_once(dtype, device, before_repair):
    """The crowd, of 500, ends 10 places above the K-th score. So its number decides where that is."""
    scores = torch.rand(3000, generator=torch.Generator().manual_seed(1)) * 0.9
    scores[torch.randperm(3000, generator=torch.Generator().manual_seed(2))[:1190]] += 1.0
    scores[(scores >= 1.0).nonzero().view(-1)[:500]] = 1.0
    param = torch.zeros(3000, dtype=dtype)
    item = copied(Item(param, scores, {"update": torch.ones(3000, dtype=dtype), "start": param}, 5), device)
    gpu(item, GivenRule(), selection=K, strength=Strength("fixed", 1.0, 0.0))
    (ranks,) = before_repair
    assert int(ranks[0][config.CROWD.value]) == 0x80000000 | 0x3F800000
    assert int(ranks[0][config.TIE.value]) == -1
    wanted = torch.zeros(3000)
    wanted[scores.topk(1200).indices] = -1
    assert torch.equal(item.param.cpu().float(), wanted)


@triton.jit
def keys_of_table(keys_ptr, row, offs, mask, FAST: tl.constexpr, CFG: tl.constexpr):
    key = tl.load(keys_ptr + offs, mask=mask, other=0).to(tl.uint32, bitcast=True)
    return key, key, key, key


@triton.jit
def count_kernel(equals_ptr, keys_ptr, numel, wanted, programs, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    each = tl.cdiv(tl.cdiv(numel, BLOCK), programs) * BLOCK
    start = pid * each
    equal = repair._equal(keys_ptr, 0, start, tl.minimum(start + each, numel), numel, wanted, BLOCK, 0)
    tl.store(equals_ptr + pid, equal)


@triton.jit
def count_again_kernel(
    equals_ptr, keys_ptr, numel, wanted, left, programs, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr
):
    pid = tl.program_id(0)
    begin, stop, _ = repair._share(equals_ptr, left, pid, numel, programs, PROGRAMS, BLOCK)
    tl.store(equals_ptr + programs + pid, repair._equal(keys_ptr, 0, begin, stop, numel, wanted, BLOCK, 0))


@triton.jit
def place_kernel(
    found_ptr, equals_ptr, keys_ptr, numel, wanted, left, programs, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr
):
    pid = tl.program_id(0)
    begin, stop, left = repair._share(equals_ptr, left, pid, numel, programs, PROGRAMS, BLOCK)
    owner, left = repair._owner(equals_ptr + programs, left, programs, PROGRAMS)
    if owner == pid:
        tl.store(found_ptr, repair._place(keys_ptr, 0, begin, stop, numel, wanted, left, BLOCK, 0))
        tl.atomic_add(found_ptr + 1, 1)


@pytest.mark.parametrize("programs", [1, 2, 5, 16])
@pytest.mark.parametrize("numel", [1, 17, 256, 1000])
def test_all_programs_together_find_the_last_tie(numel, programs, device, monkeypatch):
    """The repair's search, with a launch for each of its parts: an interpreter can't run programs at the same time.

    On a GPU the repair itself has many programs, and a compiled function can't be given another `keys_at`.
    """
    if device != "cpu":
        pytest.skip("interpreted only")
    monkeypatch.setattr(repair, "keys_at", keys_of_table)
    keys = torch.randint(3, (numel,), generator=torch.Generator().manual_seed(numel), dtype=torch.int32).to(device)
    wanted, how = int(keys[numel // 2]), {"PROGRAMS": triton.next_power_of_2(programs), "BLOCK": 16}
    places = (keys == wanted).nonzero().view(-1)
    for left in {1, len(places) // 2 + 1, len(places)}:
        equals = torch.full((2 * programs,), -99, dtype=torch.int64, device=device)
        found = torch.zeros(2, dtype=torch.int64, device=device)
        count_kernel[(programs,)](equals, keys, numel, wanted, programs, BLOCK=16)
        count_again_kernel[(programs,)](equals, keys, numel, wanted, left, programs, **how)
        place_kernel[(programs,)](found, equals, keys, numel, wanted, left, programs, **how)
        assert found.tolist() == [int(places[left - 1]), 1]


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
