"""`param_groups_for`: settings by kind, what the model is asked for, and weights that are taken apart by themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from selective import Cautious, SelectiveUpdate, Soap, param_groups_for
from selective.param_groups.settings import KINDS, MATRICES, MISSING, for_each_kind


def names(groups: Any) -> dict[str, list[str]]:
    return {group["name"]: [name for name, _ in group["params"]] for group in groups}


def model() -> nn.ModuleDict:
    return nn.ModuleDict(
        {"embed": nn.Embedding(6, 4), "conv": nn.Conv1d(4, 4, 3), "up": nn.Linear(4, 8), "head": nn.Linear(8, 6)}
    )


def test_settings_by_kind_are_keys_of_the_groups() -> None:
    groups = param_groups_for(
        model(), lr={"conv": 1e-4, "matrices": 1e-3, "rest": 1e-2}, policy="cautious",
        preconditioner={"matrices": {"kind": "soap", "beta": 0.9}, "conv": None},
    )  # fmt: skip
    found = {g["name"]: (g["lr"], g["policy"], g["preconditioner"]) for g in groups}
    assert found == {
        "matrices": (1e-3, Cautious(), Soap(beta=0.9)), "conv": (1e-4, Cautious(), None),
        "embeddings": (1e-2, None, None), "head": (1e-2, None, None), "vectors": (1e-2, None, None),
    }  # fmt: skip
    opt = SelectiveUpdate(torch.optim.AdamW(groups), policy="mgup")
    assert [group.policy.kind for group in opt.policy_groups] == ["Cautious", "Cautious", "Dense", "Dense", "Dense"]
    for group in param_groups_for(model()):  # a call without them has none of them
        assert {"lr", "policy", "weight_decay"}.isdisjoint(group)
    with pytest.raises(ValueError, match=r"lr has no value for 'embeddings' \(embed\.weight\); add 'embeddings', or"):
        param_groups_for(model(), lr={"matrices": 1e-3, "head": 1e-2, "vectors": 1e-2})


@given(
    mapping=st.dictionaries(st.sampled_from([*KINDS, "rest"]), st.integers(0, 9), min_size=1), of_matrices=st.booleans()
)
@settings(max_examples=60)
def test_own_name_then_matrices_then_rest(mapping: dict[str, int], of_matrices: bool) -> None:
    found = for_each_kind("caller", "setting", mapping, of_matrices=of_matrices)
    for kind in KINDS:
        named = [name for name in (kind, "matrices" if kind in MATRICES else kind, "rest") if name in mapping]
        expected = mapping[named[0]] if named else None if of_matrices else MISSING
        assert found[kind] == expected, kind


@given(of_matrices=st.booleans(), value=st.one_of(st.integers(), st.just({"kind": "MGUP"})))
@settings(max_examples=20)
def test_one_value(of_matrices: bool, value: Any) -> None:
    found = for_each_kind("caller", "setting", value, of_matrices=of_matrices)
    assert {kind for kind in KINDS if found[kind] == value} == set(MATRICES if of_matrices else KINDS)


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 4, bias=False), nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.gate_bias = nn.Parameter(torch.zeros(2, 8))


class Asked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.moe, self.mlp = (
            nn.Linear(9, 8, bias=False),
            Router(),
            nn.ModuleDict({"gate": nn.Linear(8, 8)}),
        )
        self.router = nn.ModuleDict({"classifier": nn.Linear(8, 4, bias=False)})
        self.logits = nn.Linear(8, 9, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.logits

    def get_classifier(self) -> nn.Module:
        raise NotImplementedError

    def no_weight_decay(self) -> list[str]:
        return ["tokens.weight"]


def test_the_model_is_asked_if_you_say_so() -> None:
    asked = Asked()
    groups = param_groups_for(asked, weight_decay=0.1, ask=True)
    assert names(groups) == {
        "matrices": ["moe.experts.0.weight", "moe.experts.1.weight", "mlp.gate.weight"],
        "embeddings, no decay": ["tokens.weight"],
        "head": ["logits.weight"],
        "routers": ["moe.gate.weight", "router.classifier.weight"],
        "vectors": ["moe.gate_bias", "moe.experts.0.bias", "moe.experts.1.bias", "mlp.gate.bias"],
    }
    assert {g["name"]: g["weight_decay"] for g in groups}["embeddings, no decay"] == 0.0
    assert all(g["preconditioner"] is None for g in groups[1:])
    table = groups.table()
    assert "the model's get_input_embeddings(); no decay: the model's no_weight_decay()" in table
    assert "gate, beside experts" in table and "a stack of biases" in table
    before = names(param_groups_for(asked))  # as it was: by names and layers alone
    assert before["head"] == ["router.classifier.weight"] and "tokens.weight" in before["matrices"]
    named = param_groups_for(asked, ask=True, head=["tokens"], embeddings=["logits"])  # you know better
    assert names(named)["head, no decay"] == ["tokens.weight"]
    assert names(named)["embeddings"] == ["logits.weight"]


class Conv1D(nn.Module):  # as transformers calls it: [in, out]
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inside, outside))


class Stacked(nn.Module):
    """Experts with gates and values in one: [e, out, in] (Mixtral) or [e, in, out] (Llama 4)."""

    def __init__(self, gate_up: tuple[int, ...], down: tuple[int, ...]) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(gate_up)), nn.Parameter(torch.randn(down))


class GptOssExperts(Stacked):  # gates and values take turns
    pass


class CodeGenAttention(nn.Module):  # queries, values and keys take turns by blocks
    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj = nn.Linear(8, 24, bias=False)


class Adapter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lora_A, self.lora_B = nn.Linear(8, 2, bias=False), nn.Linear(2, 32, bias=False)


def linear(inside: int, outside: int) -> nn.Linear:
    return nn.Linear(inside, outside, bias=False)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.ModuleDict({"qkv": linear(8, 24)}), {"rows:3": ["qkv.weight"]}),  # timm
        (nn.ModuleDict({"c_attn": linear(8, 24)}), {"rows:3": ["c_attn.weight"]}),  # nanoGPT
        (nn.ModuleDict({"Wqkv": linear(8, 24)}), {"rows:3": ["Wqkv.weight"]}),  # ModernBERT
        (nn.ModuleDict({"c_attn": Conv1D(8, 24)}), {"columns:3": ["c_attn.weight"]}),  # GPT-2
        (nn.ModuleDict({"c_attn": Conv1D(8, 16)}), {"columns:2": ["c_attn.weight"]}),  # ... its cross-attention
        (nn.ModuleDict({"c_proj": Conv1D(8, 24)}), {"matrices": ["c_proj.weight"]}),
        (nn.ModuleDict({"qkv_proj": linear(8, 12)}), {"matrices": ["qkv_proj.weight"]}),  # fewer key heads
        (nn.ModuleDict({"query_key_value": linear(8, 24)}), {"matrices": ["query_key_value.weight"]}),  # GPT-NeoX
        (nn.ModuleDict({"gate_up_proj": linear(8, 32)}), {"rows:2": ["gate_up_proj.weight"]}),  # Phi 3
        (nn.ModuleDict({"w12": linear(8, 5)}), {"matrices": ["w12.weight"]}),
        (Stacked((3, 12, 4), (3, 4, 6)), {"rows:2": ["gate_up_proj"], "experts": ["down_proj"]}),
        (Stacked((3, 4, 12), (3, 6, 4)), {"columns:2": ["gate_up_proj"], "experts": ["down_proj"]}),
        (Stacked((3, 4, 12), (3, 5, 4)), {"experts": ["gate_up_proj", "down_proj"]}),
        (GptOssExperts((3, 4, 12), (3, 6, 4)), {"experts": ["gate_up_proj", "down_proj"]}),
        (CodeGenAttention(), {"matrices": ["qkv_proj.weight"]}),
        (nn.ModuleDict({"gate_up_proj": Adapter()}), {"matrices": [f"gate_up_proj.lora_{x}.weight" for x in "AB"]}),
        (nn.GRU(5, 7, bias=False), {"rows:3": ["weight_ih_l0", "weight_hh_l0"]}),
        (nn.LSTM(5, 7, bias=False), {"rows:4": ["weight_ih_l0", "weight_hh_l0"]}),
        (nn.MultiheadAttention(8, 2, bias=False), {"matrices": ["out_proj.weight"], "rows:3": ["in_proj_weight"]}),
    ],
)  # fmt: skip
def test_parts_auto(layer: nn.Module, expected: dict[str, list[str]]) -> None:
    inside = nn.ModuleDict({"0": layer})
    with_path = {kind: [f"0.{name}" for name in of_kind] for kind, of_kind in expected.items()}
    assert names(param_groups_for(layer, parts="auto")) == expected
    assert names(param_groups_for(inside, parts="auto")) == with_path
    joined = {kind: of_kind for kind, of_kind in with_path.items() if ":" in kind}
    assert set(joined).isdisjoint(names(param_groups_for(inside)))  # unasked, none is taken apart


def test_a_checkpoint_of_another_view_is_refused() -> None:
    grad = torch.randn(8, 24, generator=torch.Generator().manual_seed(0))

    def stepped(view: Any) -> SelectiveUpdate:
        p = nn.Parameter(torch.zeros(8, 24))
        opt = SelectiveUpdate(torch.optim.AdamW([p]), preconditioner=Soap(), matrix_view=view)
        for _ in range(2):
            p.grad = grad.clone()
            opt.step()
        return opt

    by_columns = stepped("columns:3")
    for other in ("matrices", "columns:2", "rows:2"):
        with pytest.raises(ValueError, match=r"was rotated as \(3, 8, 8\), here it would be"):
            stepped(other).load_state_dict(by_columns.state_dict())
    stepped("columns:3").load_state_dict(by_columns.state_dict())
    with pytest.raises(ValueError, match=r"or 'columns:2', 'columns:3' or 'columns:4' \(\[m, k \* n\]"):
        stepped("columns:5")
