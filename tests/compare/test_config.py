"""A comparison is described in one place, and what is wrong in it is named by its path."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from compare_helpers import tiny

from selective import MGUP, AlphaConsistency
from selective.compare import ConfigError, build
from selective.compare import config as configuration
from selective.compare.contenders import base_class, contenders, longest_first, make, runs, written
from selective.compare.extras import MissingExtra, require
from selective.compare.model import GPT
from selective.compare.setup import prepare


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"polices": ["MGUP"]}, "polices: unknown key; known here: base,"),
        ({"model": {"widht": 3}}, "model.widht: unknown key; known here: layers, width"),
        ({"policies": ["MGUP", {"kind": "MGUP", "tau": 3}]}, "policies.1.tau: Input should be less than or equal to 1"),
        ({"policies": ["magama"]}, "policies.0: policy: kind 'magama' is not known"),
        ({"policies": [{"kind": "MGUP", "tu": 0.3}]}, "policies.0.tu: unknown key"),
        ({"model": {"width": 30, "heads": 4}}, "model: width is 30, heads is 4"),
        ({"seeds": 0}, "seeds: 0 seeds"),
        ({"seeds": [1, 1]}, "seeds has 1 more than once"),
        ({"policies": [MGUP(tau=0.5), MGUP(tau=0.5)]}, "more than once"),
        ({"lr": [-1]}, "lr.0: Input should be greater than 0"),
        ({"steps": "many"}, "steps: Input should be a valid integer"),
    ],
)
def test_a_mistake_is_named_by_its_path(data, says):
    with pytest.raises(ConfigError, match=r"is not a comparison") as caught:
        build(data, "mine.yaml")
    assert "mine.yaml" in str(caught.value)
    assert says in str(caught.value)


def test_survives_json():
    config = build({"policies": ["MGUP", AlphaConsistency(momentum="current")], "seeds": 2, "lr": [1e-3]})
    assert config.seeds == (0, 1)
    assert build(configuration.dump(config)) == config


def test_labels_and_files_do_not_depend_on_how_a_policy_was_written():
    config = build({"policies": [{"kind": "MGUP", "tau": 0.5, "alpha": 3.0}]})
    again = build(configuration.dump(config))
    assert written(config.policies[0]) == "MGUP(alpha=3.0)"
    assert [c.label for c in contenders(config)] == [c.label for c in contenders(again)]
    assert [run.key for run in runs(config)] == [run.key for run in runs(again)]
    assert len({run.key for run in runs(config)}) == len(runs(config))


def test_each_policy_beside_its_control_where_there_is_one():
    config = build({"policies": ["MGUP", "RandomMask", "Magma", "Dense"]})
    assert [c.role for c in contenders(config)] == ["baseline", "policy", "control", "policy", "policy", "policy"]
    assert contenders(config)[1].of == 2
    assert contenders(config)[2].of == 1
    assert [c.role for c in contenders(build({"policies": ["MGUP"], "controls": False}))] == ["baseline", "policy"]


def test_seeds_are_outermost():
    config = build({"policies": ["MGUP"], "seeds": [3, 4], "lr": [1e-3, 1e-2]})
    assert [run.seed for run in runs(config)] == [3] * 6 + [4] * 6


def test_workers_take_the_longest_runs_of_a_seed_first():
    """Else the last run of all may be a long one, for which the other cores wait."""
    data = {"policies": ["MGUP"], "preconditioners": ["soap"], "optimizers": ["SGD"], "lr": [1e-3], "seeds": [4, 3]}
    listed = runs(build(data))
    taken = longest_first(listed)
    assert set(taken) == set(listed)
    assert [run.seed for run in taken] == [4] * 7 + [3] * 7
    assert [run.contender.label for run in taken[:7]] == [
        "SGD", "AdamW in Soap()", "random like MGUP() in Soap()", "MGUP() in Soap()",
        "random like MGUP()", "MGUP()", "AdamW",
    ]  # fmt: skip
    left = listed[5:]  # after an interruption
    assert longest_first(left) == [run for run in taken if run in left]


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_files(tmp_path, suffix):
    path = tmp_path / f"mine.{suffix}"
    path.write_text('{"steps": 7, "lr": [0.001, 0.01]}')
    assert configuration.read(path) == {"steps": 7, "lr": [0.001, 0.01]}
    path.write_text("{")
    with pytest.raises(ConfigError, match="is not valid"):
        configuration.read(path)
    path.write_text("[1, 2]")
    with pytest.raises(ConfigError, match="holds a list"):
        configuration.read(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        configuration.read(tmp_path / "missing.yaml")


def test_merging_and_differences():
    merged = configuration.merge({"steps": 1, "model": {"width": 8, "heads": 2}}, {"model": {"width": 16}})
    assert merged == {"steps": 1, "model": {"width": 16, "heads": 2}}
    assert configuration.merge({"base_options": {"a": 1}}, {"base_options": {"b": 2}}) == {"base_options": {"b": 2}}
    assert configuration.differences({"model": {"width": 8}}, {"model": {"width": 16}}) == [
        "model.width: 8 before, 16 now"
    ]
    assert configuration.differences({"a": 1}, {"a": 1}) == []


def test_names_in_any_case():
    config = build({"base": "nadam", "policies": ["mgup", {"kind": "random-mask"}], "preconditioners": ["ADADIAG++"]})
    assert [c.label for c in contenders(config)][:2] == ["nadam", "MGUP()"]
    assert config.policies[1].kind == "RandomMask"
    assert build(configuration.dump(config)) == config


def test_bases(tmp_path):
    assert base_class("AdamW").__module__.startswith("torch.optim")
    assert base_class("torch.optim.sgd:SGD").__name__ == "SGD"
    assert base_class("adamw") is base_class("AdamW")
    with pytest.raises(ConfigError, match="no optimizer 'AdamWW'"):
        base_class("AdamWW")
    with pytest.raises(ConfigError, match="not an optimizer class"):
        base_class("pathlib:Path")
    config = tiny(tmp_path, base_options={"btas": [0.9, 0.9]})
    with pytest.raises(ConfigError, match=r"refuses.*btas.*it takes"):
        make(prepare(config), runs(config)[0], GPT(config.model, 0))


def test_a_policy_that_the_base_cannot_serve_is_refused_with_the_reason(tmp_path):
    config = tiny(tmp_path, base="RMSprop", policies=["AlphaConsistency"])
    with pytest.raises(ConfigError, match=r"AlphaConsistency.*momentum_beta"):
        make(prepare(config), runs(config)[1], GPT(config.model, 0))


def test_matrices_are_decayed_and_vectors_not(tmp_path):
    config = tiny(tmp_path)
    optimizer = make(prepare(config), runs(config)[0], GPT(config.model, 0))
    decay = [(p.ndim, group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]]
    assert set(decay) == {(2, 0.1), (1, 0.0)}
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)


def test_a_missing_package_says_how_to_get_it(monkeypatch):
    assert require("rich").__name__ == "rich"
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # how Python is told that a package is not there
    with pytest.raises(MissingExtra, match=r'pip install "selective-update\[compare\]"'):
        require("matplotlib.figure")


def example(name):
    path = Path(__file__).parents[2] / "examples" / name
    return build(configuration.read(path), str(path))


def test_the_demo_is_a_comparison():
    """The one that was promised: AdamW between its rates, one policy with its control, a rotation, five seeds."""
    config = example("demo.yaml")
    assert [(c.role, c.label, len(c.rates)) for c in contenders(config)] == [
        ("baseline", "AdamW", 3), ("policy", "Cautious()", 1), ("control", "random like Cautious()", 1),
        ("rotation", "AdamW in Soap()", 1),
    ]  # fmt: skip
    below, middle, above = config.lr
    assert below < middle < above
    assert config.rates == {"policy": (2e-3,), "control": (middle,), "rotation": (4e-3,)}
    assert config.seeds == (0, 1, 2, 3, 4)
    assert not set(config.seeds) & set(range(100, 105))  # on which its settings were fixed
    quick = example("demo-quick.yaml")
    assert [c.label for c in contenders(quick)] == [c.label for c in contenders(config)]
    assert len(runs(quick)) == 4
    assert len(quick.seeds) == 1
    assert quick.model == config.model


def test_rates_of_a_role_take_the_place_of_lr():
    data = {"policies": ["MGUP"], "preconditioners": ["soap"], "lr": [1e-3, 2e-3], "rates": {"rotation": [4e-3]}}
    config = build({**data, "seeds": 1})
    assert {c.role: c.rates for c in contenders(config)} == {
        "baseline": (1e-3, 2e-3), "policy": (1e-3, 2e-3), "control": (1e-3, 2e-3), "rotation": (4e-3,)
    }  # fmt: skip
    assert len(runs(config)) == 2 * 5 + 1
    apart = build({**data, "policies_in_spaces": False})
    assert [c.role for c in contenders(apart)] == ["baseline", "policy", "control", "rotation"]
    assert build(configuration.dump(config)) == config


@pytest.mark.parametrize(
    ("rates", "says"),
    [
        ({"baseline": [1e-3]}, "rates.baseline"),
        ({"policy": []}, "rates.policy"),
        ({"policy": [1e-3, 1e-3]}, "rates.policy has 0.001 more than once"),
        ({"control": [-1.0]}, "rates.control"),
    ],
)
def test_rates_that_are_none(rates, says):
    with pytest.raises(ConfigError, match=says):
        build({"rates": rates})
