"""The table of known classes says what a measurement says, for every entry and every option that matters."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.base.base_facts import BaseFacts, base_facts
from selective.base.known import KNOWN, qualified_name

WHERE = {
    "torch": "torch.optim",
    "pytorch_optimizer": "pytorch_optimizer",
    "optimi": "optimi",
    "transformers": "transformers.optimization",
    "torchao": "torchao.optim",
}
LION = [{}, {"weight_decouple": False}, {"fixed_decay": True}, {"maximize": True}]
PO = [*LION, {"weight_decouple": False, "maximize": True}, {"foreach": False, "weight_decouple": False}]
OPTIMI = [{}, {"decouple_lr": True}, {"kahan_sum": False}]
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "torch.SGD": [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.5, "maximize": True},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "fused": True},
    ],
    "torch.Adam": [{}, {"amsgrad": True}, {"maximize": True}, {"decoupled_weight_decay": True}, {"betas": (0.0, 0.9)}],
    "torch.AdamW": [{}, {"foreach": True}, {"fused": True}, {"amsgrad": True, "maximize": True}],
    "torch.NAdam": [{}, {"maximize": True}, {"decoupled_weight_decay": True}],
    "torch.RAdam": [{}, {"maximize": True}, {"decoupled_weight_decay": True}],
    "torch.Adamax": [{}, {"maximize": True}],
    "torch.RMSprop": [{}, {"momentum": 0.9}, {"centered": True}, {"momentum": 0.9, "centered": True, "maximize": True}],
    "torch.Adagrad": [{}, {"lr_decay": 0.1, "initial_accumulator_value": 0.1}, {"maximize": True}],
    "torch.Adadelta": [{}, {"maximize": True}],
    "torch.Adafactor": [{}, {"maximize": True}],
    "torch.Muon": [{}, {"nesterov": False}, {"adjust_lr_fn": "match_rms_adamw"}],
    "pytorch_optimizer.Lion": PO,
    "pytorch_optimizer.Tiger": PO,
    "pytorch_optimizer.AdEMAMix": [*LION, {"weight_decouple": True}],
    "pytorch_optimizer.CAME": [*PO, {"ams_bound": True}],
    "pytorch_optimizer.Lamb": PO,
    "pytorch_optimizer.StableAdamW": [{}, {"weight_decouple": False}, {"maximize": True}, {"kahan_sum": False}],
    "pytorch_optimizer.SOAP": [{}, {"precondition_frequency": 1}, {"maximize": True}],
    "optimi.Adam": [*OPTIMI, {"decouple_wd": True}],
    "optimi.AdamW": OPTIMI,
    "optimi.Lion": OPTIMI,
    "optimi.SGD": [*OPTIMI, {"momentum": 0.9}, {"momentum": 0.9, "decouple_wd": True}],
    "optimi.StableAdamW": [{"triton": False, **o} for o in OPTIMI],  # left to itself it picks Triton, on a CPU too
    "transformers.Adafactor": [
        {},
        {"warmup_init": True},
        {"scale_parameter": False},
        {"lr": 1e-3, "relative_step": False, "beta1": 0.9},
        {"lr": 1e-3, "relative_step": False, "scale_parameter": False},
    ],
    "torchao.AdamW8bit": [{}],  # amsgrad runs only compiled, so it can be looked up but not measured
}
CASES = [(name, options) for name in KNOWN for options in OPTIONS.get(name, [{}])]


def find(name: str) -> Callable[..., Optimizer]:
    package, _, cls = name.partition(".")
    return getattr(pytest.importorskip(WHERE[package]), cls)


def params(name: str, dtype: torch.dtype) -> Sequence[Tensor]:
    shapes = [(6, 4), (3, 5)] if name == "torch.Muon" else [(6, 4), (7,), (2, 3, 4)]
    return [torch.nn.Parameter(torch.ones(s, dtype=dtype)) for s in shapes]


def build(name: str, options: dict[str, Any], dtype: torch.dtype) -> Optimizer:
    if name.startswith("optimi.") or (name == "torch.SGD"):
        options = {"lr": 0.1, **options}
    return find(name)(params(name, dtype), **options)


def comparable(facts: BaseFacts) -> dict[str, Any]:
    said = {f.name: getattr(facts, f.name) for f in fields(facts) if f.name != "source"}
    return {**said, "refusal": facts.refusal is not None}  # the measured sentence quotes the error


@pytest.mark.filterwarnings("ignore::UserWarning:optimi")  # high weight decay for decouple_lr
@pytest.mark.parametrize(
    "name,options,dtype",
    [
        pytest.param(name, options, dtype, id=f"{name}-{options}-{dtype}", marks=pytest.mark.slow if slow else [])
        for place, (name, options) in enumerate(CASES)
        for dtype, slow in ((torch.float32, False), (torch.bfloat16, place % 2 == 1), (torch.float16, True))
    ],
)
def test_the_table_is_a_cache_of_the_measurement(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    base = build(name, options, dtype)
    assert qualified_name(type(base)) == name
    known = base_facts(base, base.param_groups[0])
    assert known.source == "table"
    measured = base_facts(base, base.param_groups[0], measure=True)
    assert measured.source == "measured"
    assert comparable(known) == comparable(measured)


def test_every_package_of_the_table_can_be_found() -> None:
    assert {name.split(".")[0] for name in KNOWN} == set(WHERE)
    assert set(OPTIONS) <= set(KNOWN)


def test_an_option_that_the_table_does_not_name_is_measured() -> None:
    base = torch.optim.AdamW([torch.nn.Parameter(torch.ones(4))])
    assert base_facts(base, base.param_groups[0]).source == "table"
    base.param_groups[0]["a_new_option"] = True
    assert base_facts(base, base.param_groups[0]).source == "measured"


def test_notes_of_schedulers_do_not_send_a_known_class_to_be_measured() -> None:
    base = torch.optim.AdamW([torch.nn.Parameter(torch.ones(4))])
    torch.optim.lr_scheduler.OneCycleLR(base, max_lr=0.1, total_steps=10)
    assert base_facts(base, base.param_groups[0]).source == "table"


def test_a_subclass_is_not_what_its_parent_is_known_for() -> None:
    class AdamW(torch.optim.AdamW):
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                p.grad.mul_(2)
            return super().step(closure)

    base = AdamW([torch.nn.Parameter(torch.ones(4))])
    facts = base_facts(base, base.param_groups[0])
    assert facts.source == "measured"
    assert facts.writes_grad


def test_classes_that_keep_iterates_are_refused_when_measured() -> None:
    po = importlib.import_module("pytorch_optimizer")
    entries = {
        "Prodigy": "p0",
        "ScheduleFreeAdamW": "z",
        "ScheduleFreeSGD": "z",
        "ScheduleFreeRAdam": "z",
        "MADGRAD": "x0",
        "FTRL": "z",
    }
    for cls, entry in entries.items():
        base = getattr(po, cls)([torch.nn.Parameter(torch.ones(5, 3))])
        facts = base_facts(base, base.param_groups[0])
        assert facts.embeds_param == (entry,), cls
        assert facts.refusal is not None
        assert f"'{entry}'" in facts.refusal
