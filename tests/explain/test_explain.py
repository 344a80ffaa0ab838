"""The lines of `explain()` about memory, alike groups, the learning rate, and facts that were measured."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from selective import (
    MGUP,
    AdaDiag,
    AlphaConsistency,
    Cautious,
    CautiousDecay,
    CautiousMGUP,
    Dense,
    Eigenbasis,
    Grams,
    Magma,
    Policy,
    RandomDecay,
    RandomMask,
    SelectiveUpdate,
    SkipUpdate,
    Soap,
    param_groups_for,
)
from selective.explain.rate import mean_multiplier

SHAPES = {"a": (12, 8), "b": (12, 8), "c": (6, 4), "bias": (8,)}


def params(*names: str) -> list[tuple[str, nn.Parameter]]:
    return [(name, nn.Parameter(torch.ones(SHAPES[name]))) for name in names or SHAPES]


def step(optimizer: SelectiveUpdate) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()


def lines_of(optimizer: SelectiveUpdate, name: str) -> list[str]:
    """The texts under one name, with those of the lines below that have no name."""
    texts, inside = [], False
    for line in optimizer.explain().splitlines():
        inside = line.startswith(f"  {name} ") or (inside and line.startswith("            "))
        texts += [line[12:]] if inside else []
    return texts


def bytes_that_last(optimizer: SelectiveUpdate) -> list[int]:
    said = re.findall(r"([\d,]+) bytes that last[,:]", optimizer.explain().partition("all groups:")[0])
    return [int(number.replace(",", "")) for number in said]


# Memory


@pytest.mark.parametrize("space", [Soap(), AdaDiag(), Eigenbasis(sides="one")], ids=repr)
def test_a_rotation_s_memory_is_said_once_and_is_what_is_kept(space: Eigenbasis) -> None:
    optimizer = SelectiveUpdate(torch.optim.AdamW(params("a", "c")), preconditioner=space, policy=Cautious())
    before = optimizer.explain()
    step(optimizer)
    kept = [
        value.nbytes
        for p in optimizer.param_groups[0]["params"]
        for name, value in optimizer.state[p].items()
        if name.startswith("selective/basis/")
    ]
    assert bytes_that_last(optimizer) == [sum(kept)]
    assert optimizer.explain() == before  # what the first step will make is what it has made
    (memory,) = lines_of(optimizer, "memory")
    assert "none" not in memory  # all are rotated


def test_those_that_are_not_rotated_are_told_apart() -> None:
    optimizer = SelectiveUpdate(torch.optim.AdamW(params()), preconditioner=Soap(), policy=Cautious())
    rotated, others = lines_of(optimizer, "memory")
    assert "a parameter: the bases of rotated ones; during the step their float32 gradients" in rotated
    assert others == "of the others: none that lasts; during the step at most a few times the largest tensor"


class RemembersTheUpdate(Policy):
    """A policy with state of its own."""

    def init_state(self, view: Any) -> dict[str, torch.Tensor]:
        return {"seen": torch.zeros_like(view.param), "count": torch.zeros(())}

    def mask(self, view: Any) -> torch.Tensor:
        return torch.ones_like(view.update)


@pytest.mark.parametrize(
    ("policy", "beta", "each", "kinds"),
    [
        (Cautious(), 0.9, 4 * 224, ["a momentum of our own"]),
        (Magma(), 0.9, 4 * 224 + 4 * 4, ["a momentum of our own", "state of the policy"]),
        (RemembersTheUpdate(), None, 4 * 224 + 4 * 4, ["state of the policy"]),
        (RemembersTheUpdate(), 0.9, 8 * 224 + 4 * 4, ["a momentum of our own", "state of the policy"]),
        (Cautious(), None, None, []),
        (Dense(), None, None, []),
    ],
    ids=repr,
)
def test_what_the_wrapper_keeps_is_counted(policy: Policy, beta: Any, each: int | None, kinds: list[str]) -> None:
    optimizer = SelectiveUpdate(torch.optim.RMSprop(params()), policy=policy, momentum_beta=beta, capture="scratch")
    for _ in range(2):  # before the first step, and after
        assert bytes_that_last(optimizer) == ([] if each is None else [each])
        said = optimizer.explain()
        assert all(kind in said for kind in kinds)
        assert each is None or "none that lasts" not in said
        step(optimizer)


def test_the_last_line_adds_up() -> None:
    groups = [{"params": params("a")}, {"params": params("b", "bias"), "policy": Magma(), "preconditioner": "AdaDiag"}]
    optimizer = SelectiveUpdate(torch.optim.AdamW(groups), policy=Cautious(), preconditioner=Soap())
    parts = bytes_that_last(optimizer)
    assert len(parts) == 3  # two bases, and the second group's policy
    assert optimizer.explain().endswith(f"\nall groups: {sum(parts):,} bytes that last, beside the base's state")


def test_sides_that_are_left_out_are_said_with_their_bytes() -> None:
    adapters = [(f"layers.{i}.lora_A", nn.Parameter(torch.ones(4, 96))) for i in range(8)]
    optimizer = SelectiveUpdate(torch.optim.AdamW(adapters), preconditioner=Soap())
    (said,) = lines_of(optimizer, "left out")
    assert said == (
        "the columns of layers.0.lora_A, layers.1.lora_A, layers.2.lora_A, layers.3.lora_A, layers.4.lora_A, "
        "layers.5.lora_A and 2 more (96), by max_state_ratio=32: saves 589,824 bytes that would last"
    )
    with pytest.warns(UserWarning, match="out of proportion"):
        whole = SelectiveUpdate(torch.optim.AdamW(adapters), preconditioner=Soap(max_state_ratio=None))
    assert bytes_that_last(whole)[0] - bytes_that_last(optimizer)[0] == 589_824
    assert lines_of(whole, "left out") == []
    long = SelectiveUpdate(torch.optim.AdamW(params("a")), preconditioner=Soap(max_dim=8))
    assert lines_of(long, "left out") == ["the rows of a (12), by max_dim=8: saves 1,152 bytes that would last"]


# Groups


def test_groups_of_which_the_same_is_to_be_said_share_a_paragraph() -> None:
    groups = [{"params": [pair], "lr": 1e-3 * 0.9**i} for i, pair in enumerate(params())]
    groups.append({"params": [("other", nn.Parameter(torch.ones(3)))], "policy": MGUP()})
    groups.append({"params": [("last", nn.Parameter(torch.ones(2, 5)))]})
    optimizer = SelectiveUpdate(torch.optim.AdamW(groups), policy=Cautious(), preconditioner=Soap())
    titles = [line for line in optimizer.explain().splitlines() if line.startswith("param_groups")]
    assert titles == [
        "param_groups[0] to [2], [5]: 4 tensors, 226 elements",
        "param_groups[3]: 1 tensor, 8 elements",  # which has nothing to rotate
        "param_groups[4]: 1 tensor, 3 elements",
    ]
    assert "  rotated   a, b as 12 x 8; c as 6 x 4; last as 2 x 5, by Soap()" in optimizer.explain()


@pytest.mark.parametrize(
    "change", [{"policy": MGUP()}, {"preconditioner": None}, {"preconditioner": AdaDiag()}, {"amsgrad": True, "x": 1}],
    ids=str,
)  # fmt: skip
def test_groups_that_differ_do_not(change: dict[str, Any]) -> None:
    groups: list[dict[str, Any]] = [{"params": params("a")}, {"params": params("b"), **change}]
    optimizer = SelectiveUpdate(torch.optim.AdamW(groups), policy=Cautious(), preconditioner=Soap())
    assert optimizer.explain().count("param_groups[") == 2


class SmallViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 16))
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 64) for _ in range(2))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 10)


def test_a_small_vit_fits_a_screen() -> None:
    groups = param_groups_for(SmallViT(), weight_decay=0.1, head=["head"])
    optimizer = SelectiveUpdate(torch.optim.AdamW(groups), policy=MGUP(), preconditioner=Soap())
    said = optimizer.explain()
    assert len(groups) == 5 and said.count("\n") < 24
    assert "param_groups[0], [1] (matrices, conv): 9 tensors" in said
    assert "param_groups[2] to [4] (embeddings, head, vectors): " in said


# The learning rate


@pytest.mark.parametrize(
    ("policy", "mean", "said"),
    [
        (MGUP(), 1.25, "the mean multiplier is 1.25: begin with the rate that is tuned for the base, divided by 1.25"),
        (MGUP(alpha=1.5, gamma=0.5), 1.0, "the mean multiplier is 1: begin with the rate that is tuned for the base"),
        (Cautious(), 1.0, "the mean multiplier is 1: begin"),
        (RandomMask(selected=1.0), 0.5, "the mean multiplier is 0.5: begin .* the base, multiplied by 2$"),
        (RandomMask.matching(MGUP()), None, "as for its policy: the mean multiplier is 1.25"),
        (SkipUpdate(), 1.0, "the mean multiplier is 1:"),
        (CautiousMGUP(), None, "between 0.5 and 2, by how much agrees: sweep it"),
        (Grams(), None, "move as far as the base's, some the other way: begin"),
        (AlphaConsistency(), None, "the norm of the momentum is kept: begin"),
        (Magma(), None, "about 0.25: .* multiplied by 4, and sweep it"),
        (RemembersTheUpdate(), None, "how far RemembersTheUpdate goes, its own code decides"),
    ],
    ids=repr,
)
def test_what_a_policy_does_to_the_rate(policy: Policy, mean: float | None, said: str) -> None:
    assert mean_multiplier(policy) == mean
    optimizer = SelectiveUpdate(torch.optim.AdamW(params()), policy=policy)
    (rate,) = lines_of(optimizer, "rate")
    assert re.search(said, rate), rate


@pytest.mark.parametrize("policy", [MGUP(), MGUP(tau=0.25), RandomMask(), RandomMask(probability=0.3, rest=0.5)])
def test_the_mean_multiplier_is_that_of_a_step(policy: Policy) -> None:
    """The coins of 40,000 coordinates: their mean is within 5 standard deviations, each at most the distance / 2."""
    p = nn.Parameter(torch.zeros(200, 200))
    optimizer = SelectiveUpdate(torch.optim.SGD([p], lr=1.0, momentum=0.9), policy=policy)
    step(optimizer)
    expected = mean_multiplier(policy)
    assert expected is not None
    values = -p.detach()
    spread = 5 * float(values.max() - values.min()) / 2 / 200 if isinstance(policy, RandomMask) else 1e-6
    assert abs(float(values.mean()) - expected) <= spread


@pytest.mark.parametrize(
    ("space", "said"),
    [(Soap(), "2 to 4 times"), (Eigenbasis(), "2 to 4 times"), (AdaDiag(), "1 to 2 times")],
    ids=repr,
)
def test_what_a_rotation_does_to_the_rate(space: Eigenbasis, said: str) -> None:
    optimizer = SelectiveUpdate(torch.optim.AdamW(params()), preconditioner=space)
    assert lines_of(optimizer, "rate") == [
        f"rotated, the best rates were {said} those of the base in our runs: sweep it"
    ]
    both = SelectiveUpdate(torch.optim.AdamW(params()), policy=MGUP(), preconditioner=space)
    (rate,) = lines_of(both, "rate")
    assert "divided by 1.25; rotated, " in rate
    none = SelectiveUpdate(torch.optim.AdamW(params("bias")), preconditioner=space)
    assert lines_of(none, "rate") == []  # nothing is rotated, and nothing masked


# Facts


class NobodyKnows(torch.optim.SGD):
    """A class that is in no table."""


def test_a_known_class_with_a_strange_option_is_not_called_unknown() -> None:
    groups = [{"params": params("a"), "alpha": 1.2}, {"params": params("b")}]
    optimizer = SelectiveUpdate(torch.optim.AdamW(groups), policy=Cautious())
    assert lines_of(optimizer, "note") == [
        "AdamW is known, but this group has 'alpha', which the class may read or not: measured by steps of a small "
        "stand-in"
    ]
    assert "unknown" not in optimizer.explain()
    other = SelectiveUpdate(NobodyKnows(params("a"), lr=0.1, momentum=0.9), policy=Cautious())
    assert lines_of(other, "note") == ["NobodyKnows is an unknown class: measured by steps of a small stand-in"]


@pytest.mark.parametrize(
    "decay,words",
    [
        (CautiousDecay(), "where the update moves it towards 0 or is 0, × 1 elsewhere"),
        (CautiousDecay(strict=True), "where the update moves it towards 0, × 1 elsewhere"),
        (CautiousDecay(of="masked"), "where the masked update moves it towards 0 or is 0, × 1 elsewhere"),
        (RandomDecay(), "at random coordinates, at as many as CautiousDecay would decay, × 1 elsewhere"),
    ],
)
def test_a_selective_decay_says_where_it_decays(decay: CautiousDecay | RandomDecay, words: str) -> None:
    base = torch.optim.AdamW([torch.nn.Parameter(torch.ones(4, 3))], weight_decay=0.1)
    assert f"(1 - lr*weight_decay) {words}" in SelectiveUpdate(base, decay=decay).explain()


def test_a_row_is_a_vector() -> None:
    base = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1, 40))])
    assert "not       param_groups[0][0]: 1 x 40, a vector" in SelectiveUpdate(base, preconditioner="Soap").explain()
