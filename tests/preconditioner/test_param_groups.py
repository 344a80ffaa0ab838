"""`param_groups_for` on a small GPT with a tied head, a convolutional net, a mixture of experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transforms import Turning

from selective import MGUP, SelectiveUpdate, Soap, param_groups_for


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        h = self.norm(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.down(torch.relu(self.up(x)))


class GPT(nn.Module):
    def __init__(self, tied: bool = True, name: str = "lm_head") -> None:
        super().__init__()
        self.tokens = nn.Embedding(31, 8)
        self.pos_emb = nn.Parameter(torch.zeros(6, 8))
        self.blocks = nn.ModuleList([Block(8), Block(8)])
        setattr(self, name, nn.Linear(8, 31, bias=False))
        if tied:
            getattr(self, name).weight = self.tokens.weight

    def forward(self, ids):
        x = self.tokens(ids) + self.pos_emb
        for block in self.blocks:
            x = block(x)
        return next(m for m in reversed(list(self.children())) if isinstance(m, nn.Linear))(x)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 4, bias=False)
        self.up, self.down = nn.Parameter(torch.randn(4, 8, 16)), nn.Parameter(torch.randn(4, 16, 8))


def names(groups: Any) -> dict[str, list[str]]:
    return {group["name"]: [name for name, _ in group["params"]] for group in groups}


def test_a_gpt_with_a_tied_head() -> None:
    model = GPT()
    groups = param_groups_for(model, weight_decay=0.1)
    found = names(groups)
    assert found["embeddings"] == ["pos_emb", "tokens.weight"] or found["embeddings"] == ["tokens.weight", "pos_emb"]
    assert "head" not in found  # it is the embedding
    assert [n.rpartition("blocks.0.")[2] for n in found["matrices"][:4]] == [
        "attention.in_proj_weight", "attention.out_proj.weight", "up.weight", "down.weight",
    ]  # fmt: skip
    assert all("bias" in n or "norm" in n for n in found["vectors"])
    assert {g["name"]: g["weight_decay"] for g in groups} == {"matrices": 0.1, "embeddings": 0.1, "vectors": 0.0}
    assert {g["name"]: g.get("preconditioner", "the wrapper's") for g in groups} == {
        "matrices": "the wrapper's", "embeddings": None, "vectors": None,
    }  # fmt: skip
    assert sum(len(ns) for ns in found.values()) == len(list(model.parameters()))  # each once
    assert "the weight of an embedding; tied: tokens.weight = lm_head.weight" in groups.table()
    assert str(groups) == groups.table()


@pytest.mark.parametrize("name", ["lm_head", "to_logits"])
def test_a_head_of_its_own_is_found_by_name_and_by_size(name: str) -> None:
    groups = param_groups_for(GPT(tied=False, name=name))
    assert names(groups)["head"] == [f"{name}.weight"]
    assert all("weight_decay" not in group for group in groups)


def test_a_square_last_layer_is_not_taken_for_a_head() -> None:
    model = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8))
    assert names(param_groups_for(model))["matrices"] == ["1.weight"]
    assert names(param_groups_for(model, head=["1"]))["head"] == ["1.weight", "1.bias"]


def test_a_convolutional_net() -> None:
    model = nn.Sequential()
    model.add_module("stem", nn.Conv2d(3, 6, 3))
    model.add_module("norm", nn.BatchNorm2d(6))
    model.add_module("hidden", nn.Linear(6, 9))
    model.add_module("classifier", nn.Linear(9, 4))
    groups = param_groups_for(model)
    assert names(groups) == {
        "matrices": ["hidden.weight"],
        "conv": ["stem.weight"],
        "head": ["classifier.weight"],
        "vectors": ["stem.bias", "norm.weight", "norm.bias", "hidden.bias", "classifier.bias"],
    }
    assert groups[1]["matrix_view"] == "conv"


def test_a_mixture_of_experts() -> None:
    groups = param_groups_for(Experts())
    assert names(groups) == {"matrices": ["router.weight"], "experts": ["up", "down"]}
    assert groups[1]["matrix_view"] == "experts"


def test_joined_projections_are_pointed_out_and_taken_apart_when_asked() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.gate_up_proj = nn.Linear(8, 24, bias=False), nn.Linear(8, 32, bias=False)
            self.w12 = nn.Linear(8, 5, bias=False)  # no two of equal size
            self.qkv_proj = nn.Linear(8, 12, bias=False)  # three, but with fewer key heads: of 8, 2 and 2

    model = Joined()
    said = param_groups_for(model).table()
    assert "several in one? parts={'qkv': 3}" in said
    assert "several in one? parts={'gate_up_proj': 2}" in said
    assert said.count("several") == 2
    groups = param_groups_for(model, parts={"qkv": 3, "gate_up_proj.weight": 2})
    assert [(g["name"], g.get("matrix_view"), g["params"][0][0]) for g in groups] == [
        ("matrices", None, "w12.weight"),
        ("rows:2", "rows:2", "gate_up_proj.weight"),
        ("rows:3", "rows:3", "qkv.weight"),
    ]
    for parts, told in (
        ({"wqkv": 3}, "no matrix is called so: qkv.weight"),
        ({"w12": 2}, "w12.weight has 5 rows"),
        ({"qkv": 5}, "2, 3 or 4"),
        ({"qkv": 3.0}, "2, 3 or 4"),
        (["qkv"], "write a mapping"),
        ({"qkv": 3, "qkv.weight": 4}, "two counts for qkv.weight"),
        ("qkv", "write a mapping from names to counts, {'qkv': 3}, or 'auto'"),
    ):
        with pytest.raises(ValueError, match=told):
            param_groups_for(model, parts=parts)


def test_stacked_experts_are_taken_apart_too() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 6))
            self.down_proj = nn.Parameter(torch.randn(3, 6, 4))

    model = Experts()
    assert "3-D, read as a stack of matrices; several in one? parts={'gate_up_proj': 2}" in str(param_groups_for(model))
    groups = param_groups_for(model, parts={"gate_up_proj": 2})
    assert names(groups) == {"experts": ["down_proj"], "rows:2": ["gate_up_proj"]}
    optimizer = SelectiveUpdate(torch.optim.AdamW(groups, lr=1e-2), preconditioner=Soap())
    said = optimizer.explain()
    assert "gate_up_proj as 6 of 4 x 6" in said and "down_proj as 3 of 6 x 4" in said
    with pytest.raises(ValueError, match="gate_up_proj has 8 rows"):
        param_groups_for(model, parts={"gate_up_proj": 3})


def test_what_may_be_something_else_is_pointed_out() -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 24))

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList([nn.Linear(8, 4), nn.Linear(8, 4)])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.c_attn = nn.ModuleList([Attention()]), Conv1D()
            self.gru, self.lstm, self.rnn = nn.GRU(5, 7), nn.LSTM(5, 7), nn.RNN(5, 7)
            self.head = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 10))

    said = str(param_groups_for(Model()))
    because = {line.split()[1]: line.partition("2-D")[2].strip() for line in said.splitlines() if "2-D" in line}
    assert because["gru.weight_hh_l0"] == "; several in one? parts={'weight_hh_l0': 3}"
    assert because["lstm.weight_ih_l0"] == "; several in one? parts={'weight_ih_l0': 4}"
    assert because["head.1.weight"] == "; of the head? head=['head.1.weight']"
    assert because["c_attn.weight"] == "; several in one? parts={'c_attn': 3}"
    assert because["rnn.weight_ih_l0"] == because["blocks.0.heads.0.weight"] == ""
    groups = names(
        param_groups_for(Model(), head=["head.1.weight"], parts={"gru.weight_hh_l0": 3})
    )  # what it says to write
    assert groups["head"] == ["head.1.weight"] and groups["rows:3"] == ["gru.weight_hh_l0"]
    with pytest.raises(TypeError, match="pass the model itself, not its parameters"):
        param_groups_for(Model().parameters())  # type: ignore[arg-type]


def test_what_is_joined_by_columns_is_taken_apart_by_columns() -> None:
    class Conv1D(nn.Module):  # as transformers calls it
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 24))

    model = nn.ModuleDict({"c_attn": Conv1D(), "emb": nn.Embedding(9, 8), "attn": nn.MultiheadAttention(8, 2)})
    groups = param_groups_for(model, parts={"c_attn": 3, "attn": "rows:3"})
    assert names(groups)["columns:3"] == ["c_attn.weight"] and names(groups)["rows:3"] == ["attn.in_proj_weight"]
    assert groups[2]["matrix_view"] == "columns:3"
    assert names(param_groups_for(model, parts={"c_attn": "rows:2"}))["rows:2"] == ["c_attn.weight"]
    with pytest.raises(ValueError, match=r"'attn': 'columns:3', and attn\.in_proj_weight has 8 columns"):
        param_groups_for(model, parts={"attn": "columns:3"})
    with pytest.raises(ValueError, match=r"'attn': 'columns:5'; it can be 2, 3 or 4 matrices, or one of rows:2"):
        param_groups_for(model, parts={"attn": "columns:5"})


def test_what_is_no_matrix_is_not_taken_apart() -> None:
    model = nn.ModuleDict({"emb": nn.Embedding(9, 8), "attn": nn.MultiheadAttention(8, 2)})
    with pytest.raises(ValueError, match=r"emb\.weight apart, which belongs to 'embeddings'"):
        param_groups_for(model, parts={"emb": 3})
    groups = names(param_groups_for(model, parts={"attn": 3}))  # the projection in, not the one out
    assert groups["rows:3"] == ["attn.in_proj_weight"]


def test_frozen_ones_are_left_out_and_mistakes_are_named() -> None:
    model = nn.Linear(3, 3)
    model.bias.requires_grad_(False)
    assert names(param_groups_for(model)) == {"matrices": ["weight"]}
    with pytest.raises(ValueError, match="embeddings names 'table', which trains nothing; there is weight"):
        param_groups_for(model, embeddings=["table"])
    with pytest.raises(ValueError, match=r"no_decay has \['bias'\]; the kinds are matrices, rows:2"):
        param_groups_for(model, no_decay=["bias"])
    model.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        param_groups_for(model)


@pytest.mark.parametrize("model", [GPT(), GPT(tied=False)], ids=["tied", "not"])
def test_what_it_returns_goes_into_a_base_and_the_wrapper(model: GPT) -> None:
    groups = param_groups_for(model, weight_decay=0.1)
    matrices = set(names(groups)["matrices"])
    optimizer = SelectiveUpdate(torch.optim.AdamW(groups, lr=0.01), policy=MGUP(), preconditioner=Turning(every=2))
    ids = torch.arange(12).reshape(2, 6)
    first = last = None
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        first, last = first or loss.item(), loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert last < first
    rotated = {n for n, p in model.named_parameters() if "selective/basis_steps" in optimizer.state[p]}
    assert rotated == matrices
    text = optimizer.explain()
    assert "blocks.0.up.weight" in text and "param_groups[1]" in text
