"""`SelectiveUpdate.for_model(recipe=...)`: what a recipe makes, what stands in its place, and what it rests on."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from selective import RECIPES, Cautious, ChainedOptimizer, NormControl, Recipe, SelectiveUpdate, Soap, param_groups_for
from selective.compare.config import ConfigError, build
from selective.compare.optimizers import call_maker
from selective.compare.setup import prepare
from selective.for_model.recipes import OPTIMIZERS

ROOT = Path(__file__).parents[2]


def small() -> nn.Module:
    model = nn.ModuleDict({"embed": nn.Embedding(6, 4), "up": nn.Linear(4, 8), "down": nn.Linear(8, 4)})
    model["head"] = nn.Linear(4, 6)
    return model


def facts(opt: Any) -> list[tuple[Any, ...]]:
    return [(g["name"], g["lr"], g["weight_decay"], g.get("betas")) for g in opt.param_groups]


def test_a_recipe_is_what_one_would_write_by_hand() -> None:
    ours = SelectiveUpdate.for_model(small(), recipe="soap-cautious")
    theirs = SelectiveUpdate.for_model(
        small(), "adamw", lr=6e-3, weight_decay=0.1, betas=(0.95, 0.95), policy="cautious", preconditioner="soap"
    )
    assert facts(ours) == facts(theirs)
    assert str(ours.explain()) == str(theirs.explain())
    assert type(ours.base) is torch.optim.AdamW
    assert ours.policy_groups[0].policy == Cautious()
    assert ours.param_groups[0]["lr"] == 6e-3


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_steps(name: str) -> None:
    model = small()
    opt = SelectiveUpdate.for_model(model, recipe=name.upper().replace("-", "_"))
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):  # a rotation begins with the second step
        for p in model.parameters():
            p.grad = torch.ones_like(p) + 0.1 * torch.arange(p.numel()).view_as(p)
        opt.step()
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert isinstance(opt, ChainedOptimizer if name == "muon" else SelectiveUpdate)


def test_what_you_give_stands_in_the_place_of_the_recipe_s() -> None:
    opt = SelectiveUpdate.for_model(
        small(), recipe="soap-cautious", lr=1e-2, weight_decay=0.0, policy="mgup", betas=(0.8, 0.9), seed=3,
        no_decay=["vectors", "embeddings"],
    )  # fmt: skip
    assert {g["lr"] for g in opt.param_groups} == {1e-2}
    assert {g["betas"] for g in opt.param_groups} == {(0.8, 0.9)}
    assert str(opt.policy_groups[0].policy) == "MGUP()"
    assert isinstance(opt.preconditioner_groups[0].preconditioner, Soap)
    assert opt.count.seed == 3
    muon = SelectiveUpdate.for_model(small(), recipe="muon", policy="cautious", lr={"matrices": 0.02, "rest": 1e-3})
    assert [type(member) for member in muon.members] == [SelectiveUpdate] * 2
    assert [(g["name"], g["lr"]) for g in muon.param_groups][:2] == [("matrices", 0.02), ("embeddings", 1e-3)]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"recipe": "soap_cautous"}, r"no recipe 'soap_cautous' \(did you mean 'soap-cautious'\?\); the recipes are"),
        ({"recipe": "adagrad"}, f"the recipes are {', '.join(RECIPES)}"),
        ({"recipe": 3}, "no recipe 3; the recipes are"),
        ({"recipe": "soap", "base": "lion"}, "base is 'lion', and the recipe 'soap' names its optimizers"),
        ({"recipe": "soap", "matrices": "muon"}, "matrices is 'muon', and the recipe"),
    ],
)  # fmt: skip
def test_mistakes_are_said(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SelectiveUpdate.for_model(small(), **given)


def rates_of(recipe: Recipe) -> tuple[float, ...]:
    lr = recipe.settings["lr"]
    return tuple(lr.values()) if isinstance(lr, Mapping) else (lr,)


def shown(recipe: Recipe) -> list[dict[str, Any]]:
    """The records of the runs that a recipe names. Raises if a pattern fits none."""
    files = [sorted(ROOT.glob(pattern)) for pattern in recipe.evidence]
    assert all(files), recipe.evidence
    return [json.loads(file.read_text()) for mine in files for file in mine]


@pytest.mark.parametrize("name", RECIPES)
def test_the_evidence_is_there_and_has_the_recipe_s_rate(name: str) -> None:
    recipe = RECIPES[name]
    runs = shown(recipe)
    assert {(run["lr"], *[rest for rest in [run["rest_lr"]] if rest is not None]) for run in runs} == {rates_of(recipe)}
    assert {run["seed"] for run in runs} == ({0} if "one seed" in recipe.says else {0, 1, 2})
    page = (ROOT / "docs" / "evidence.md").read_text()  # tests/evidence/test_page.py computes its figures again
    assert all(f"{figure} ±" in page for figure in re.findall(r"(\d+\.\d+) times", recipe.says))
    known = inspect.signature(SelectiveUpdate.for_model).parameters
    assert {"lr", "weight_decay"} <= recipe.settings.keys() <= {*known, "betas", "capture"}
    assert OPTIMIZERS[0] in recipe.settings or set(OPTIMIZERS[1:]) <= recipe.settings.keys()


def row(name: str, recipe: Recipe) -> str:
    """The recipe's line in the guide's table."""
    return f"| `{name}` | {', the rest '.join(f'{rate:g}' for rate in rates_of(recipe))} | {recipe.says} |"


def test_the_guide_has_a_row_for_every_recipe() -> None:
    page = (ROOT / "docs" / "guides" / "pretraining.md").read_text()
    table = page.partition("<!-- recipes -->")[2].partition("\n\nAll were")[0].strip().splitlines()
    assert table[2:] == [row(name, recipe) for name, recipe in RECIPES.items()]
    assert row("soap", RECIPES["soap-cautious"]) not in table


def test_evidence_that_is_missing_is_noticed() -> None:
    with pytest.raises(AssertionError, match="no-such-run"):
        shown(Recipe({}, "nothing", ("docs/measurements/gain/no-such-run-seed*.json",)))


def test_a_recipe_can_be_compared() -> None:
    """Its optimizer gets the rate of each run, and the second one for what is no matrix."""
    names = ["recipe:soap-cautious", "recipe:muon"]
    setup = prepare(build({"optimizers": names, "lr": [2e-3], "rest_lr": [1e-3]}, "this test"))
    for name in names:
        for rest_lr in (None, 1e-3):
            opt = call_maker(name, setup.makers[name], small(), [], 2e-3, rest_lr, 0)
            assert [g["lr"] for g in opt.param_groups] == [2e-3, *[rest_lr or 2e-3] * 3]
    with pytest.raises(
        ConfigError, match=r"optimizer recipe:sop: for_model: there is no recipe 'sop' \(did you mean 'soap'"
    ):
        prepare(build({"optimizers": ["recipe:sop"]}, "this test"))


def test_weight_decay_is_the_same_as_of_param_groups_for() -> None:
    opt = SelectiveUpdate.for_model(small(), lr=1e-3, weight_decay=0.1, policy="cautious")
    groups = param_groups_for(small(), weight_decay=0.1)
    assert {g["name"]: g["weight_decay"] for g in opt.param_groups} == {g["name"]: g["weight_decay"] for g in groups}
    assert {g["name"]: g["weight_decay"] for g in groups}["embeddings"] == 0.1


def test_a_rate_for_everything_beside_norm_control_is_warned_of() -> None:
    """Also where it takes the place of a recipe's two; not where two are given, or a scale says what it is for."""
    recipe, says = "soap-cautious-norm-control", r"lr is 0\.003 for everything"
    with pytest.warns(UserWarning, match=says):
        SelectiveUpdate.for_model(small(), recipe=recipe, lr=3e-3)
    with pytest.warns(UserWarning, match=says):
        SelectiveUpdate.for_model(small(), lr=3e-3, norm={"matrices": NormControl()})
    SelectiveUpdate.for_model(small(), recipe=recipe, lr={"matrices": 0.02, "rest": 3e-3})
    SelectiveUpdate.for_model(small(), lr=3e-3, norm=NormControl(scale=6))


def test_muon_s_recipe_on_a_model_that_has_only_matrices_or_none_warns_of_nothing() -> None:
    for model in (torch.nn.Linear(6, 6, bias=False), torch.nn.Embedding(6, 4)):
        SelectiveUpdate.for_model(model, recipe="muon")


def test_the_hint_begins_with_what_was_given() -> None:
    with pytest.raises(ValueError, match="did you mean 'soap-cautious-norm-control'"):
        SelectiveUpdate.for_model(small(), recipe="soap-cautious-norm")
