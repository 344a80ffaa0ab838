"""`SelectiveUpdate.for_model`: layers whose weights have unusual names, and models that answer in unusual ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from selective import SelectiveUpdate, param_groups_for


def kinds(model: nn.Module) -> dict[str, str]:
    opt = SelectiveUpdate.for_model(model, lr=1e-3, policy="mgup")
    return {name: group["name"] for group in opt.param_groups for name in group["param_names"]}


def test_a_parametrized_weight_is_of_the_layer_that_it_belongs_to() -> None:
    model = nn.Sequential(
        weight_norm(nn.Conv1d(4, 8, 3)), weight_norm(nn.Linear(8, 8)), weight_norm(nn.Embedding(6, 4))
    )
    found = kinds(model)
    assert found["0.parametrizations.weight.original1"] == "conv"
    assert found["1.parametrizations.weight.original1"] == "matrices"
    assert found["2.parametrizations.weight.original1"] == "embeddings"
    assert found["0.parametrizations.weight.original0"] == "vectors"
    assert kinds(weight_norm(nn.Conv1d(4, 8, 3)))["parametrizations.weight.original1"] == "conv"


def test_the_projection_of_an_lstm_is_one_matrix() -> None:
    found = kinds(nn.LSTM(8, 8, proj_size=4))
    assert found["weight_ih_l0"] == found["weight_hh_l0"] == "rows:4"
    assert found["weight_hr_l0"] == "matrices"


def test_tables_of_position_biases_and_rates_of_state_spaces_are_no_matrices() -> None:
    model = nn.Module()
    model.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))  # as in Swin
    model.A_log = nn.Parameter(torch.zeros(8, 4))  # as in Mamba
    model.proj = nn.Linear(4, 4, bias=False)
    model.proj.weight._no_weight_decay = True  # type: ignore[assignment]
    assert kinds(model) == {
        "relative_position_bias_table": "embeddings", "A_log": "vectors", "proj.weight": "matrices, no decay",
    }  # fmt: skip


class Answers(nn.Module):
    no_weight_decay: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def get_classifier(self, which: str) -> nn.Module:
        return getattr(self, which)

    def get_output_embeddings(self) -> None:
        raise RuntimeError("not made yet")


@pytest.mark.parametrize(
    ("answer", "apart"),
    [
        (None, []), (lambda _: None, []), (lambda _, prefix: {prefix}, []), ({"first.weight"}, ["first.weight"]),
        (lambda _: "first.weight", ["first.weight"]), (lambda _: ["second.weight"], ["second.weight"]),
    ],
)  # fmt: skip
def test_questions_that_a_model_does_not_answer_are_left_out(answer: Any, apart: list[str]) -> None:
    model = type("Model", (Answers,), {"no_weight_decay": answer})()
    found = kinds(model)
    assert set(found) == {"first.weight", "second.weight"}
    assert [name for name, kind in found.items() if kind == "matrices, no decay"] == apart


@pytest.mark.parametrize("options", [{"lr": -1}, {"lr": {"rest": "x"}}, {"lr": float("nan")}, {"weight_decay": True}])
def test_what_is_no_rate_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"param_groups_for: (lr|weight_decay) is .*, must be a number of at least 0"):
        param_groups_for(nn.Linear(4, 4), **options)


def test_heads_that_take_turns_are_not_taken_apart() -> None:
    """GPTBigCode's c_attn has queries, keys and values of one head side by side, unlike GPT-2's."""
    attention = type("GPTBigCodeAttention", (nn.Module,), {})()
    attention.c_attn, attention.c_proj = nn.Linear(8, 24, bias=False), nn.Linear(8, 8, bias=False)
    assert set(kinds(attention).values()) == {"matrices"}
