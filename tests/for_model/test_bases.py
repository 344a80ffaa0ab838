"""`SelectiveUpdate.for_model`: how the base is named, where options go, and what is said of mistakes."""

from __future__ import annotations

import importlib.util
import sys
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from optional import missing
from torch import nn

from selective import MGUP, Cautious, Dense, SelectiveUpdate, Soap
from selective.base.by_name import SLOW_PLACES, optimizer_class


def small() -> nn.Module:
    model = nn.ModuleDict({"embed": nn.Embedding(6, 4), "up": nn.Linear(4, 8), "down": nn.Linear(8, 4)})
    model["head"] = nn.Linear(4, 6)
    return model


def stepped(opt: Any, model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters after three steps on gradients that are the same for every optimizer."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        opt.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture(autouse=True)
def _seeded() -> Any:
    with torch.random.fork_rng(devices=[]):
        yield


def seeded() -> nn.Module:
    torch.manual_seed(0)
    return small()


def test_it_is_what_one_would_write_by_hand() -> None:
    model, twin = seeded(), seeded()
    opt = SelectiveUpdate.for_model(
        model, "adamw", lr=1e-2, weight_decay=0.1, policy="mgup", preconditioner=Soap(refresh_every=2), seed=7,
        betas=(0.8, 0.9), mask_space="original",
    )  # fmt: skip
    matrices = [twin["up"].weight, twin["down"].weight]
    vectors = [twin[name].bias for name in ("up", "down", "head")]
    groups = [
        {"params": matrices, "weight_decay": 0.1, "policy": MGUP(), "preconditioner": Soap(refresh_every=2)},
        {"params": [twin["embed"].weight], "weight_decay": 0.1},
        {"params": [twin["head"].weight], "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    base = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.9))
    by_hand = SelectiveUpdate(base, policy=Dense(), seed=7, mask_space="original")
    ours, theirs = stepped(opt, model), stepped(by_hand, twin)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert type(opt.base) is torch.optim.AdamW and opt.count.seed == 7


@pytest.mark.parametrize(
    "base",
    ["adamw", "AdamW", "ADAMW", "torch.optim:AdamW", torch.optim.AdamW, lambda groups: torch.optim.AdamW(groups)],
    ids=["lower", "exact", "upper", "path", "class", "factory"],
)
def test_ways_to_name_a_base(base: Any) -> None:
    opt = SelectiveUpdate.for_model(small(), base, lr=3e-3, weight_decay=0.2, policy="cautious")
    assert type(opt.base) is torch.optim.AdamW
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in opt.param_groups] == [
        ("matrices", 3e-3, 0.2), ("embeddings", 3e-3, 0.2), ("head", 3e-3, 0.2), ("vectors", 3e-3, 0.0),
    ]  # fmt: skip
    assert [name for g in opt.param_groups for name in g["param_names"]] == [
        "up.weight", "down.weight", "embed.weight", "head.weight", "up.bias", "down.bias", "head.bias",
    ]  # fmt: skip


def test_what_is_not_said_is_left_to_the_base() -> None:
    opt = SelectiveUpdate.for_model(small(), torch.optim.SGD, policy="cautious", momentum=0.9, no_decay=["vectors"])
    assert {g["lr"] for g in opt.param_groups} == {1e-3}
    assert {g["weight_decay"] for g in opt.param_groups} == {0}
    opt = SelectiveUpdate.for_model(small(), policy="cautious", no_decay=["vectors"])
    assert {g["name"]: g["weight_decay"] for g in opt.param_groups} == {
        "matrices": 0.01, "embeddings": 0.01, "head": 0.01, "vectors": 0.0,
    }  # fmt: skip
    opt = SelectiveUpdate.for_model(small(), torch.optim.Rprop, policy="cautious", lr=0.1)  # it has no decay
    assert all("weight_decay" not in g for g in opt.param_groups)


def test_other_packages_are_looked_through_after_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = ModuleType("lion_pytorch")
    theirs.__spec__ = importlib.util.spec_from_loader("lion_pytorch", loader=None)

    class LionOfSomebody(torch.optim.SGD):
        pass

    class AdamW(torch.optim.SGD):  # torch's class of that name is taken
        pass

    class LIONOFOTHERS(torch.optim.SGD):
        pass

    vars(theirs).update(
        LionOfSomebody=LionOfSomebody, AdamW=AdamW, LionOfOthers=LionOfSomebody, LIONofOthers=LIONOFOTHERS
    )
    monkeypatch.setitem(sys.modules, "lion_pytorch", theirs)
    monkeypatch.setattr("selective.base.by_name.PLACES", ("torch.optim", "lion_pytorch"))
    assert optimizer_class("lion_of_somebody") is LionOfSomebody
    assert optimizer_class("adamw") is torch.optim.AdamW
    assert optimizer_class("LionOfOthers") is LionOfSomebody  # the exact name first
    with pytest.raises(ValueError, match=r"'lionofothers' can be .*LIONOFOTHERS, .*LionOfSomebody of lion_pytorch"):
        optimizer_class("lionofothers")
    assert all(name not in vars(torch.optim) for names in SLOW_PLACES.values() for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("place", SLOW_PLACES)
def test_slow_packages_have_the_classes_that_they_are_asked_for(place: str) -> None:
    """A twin in the ordinary suite needs no import: none of these names is torch's."""
    if missing([place.partition(".")[0]]):
        pytest.skip(f"needs {place}")
    for name in SLOW_PLACES[place]:
        assert optimizer_class(name.lower()).__module__.startswith(place.partition(".")[0])


def test_a_path_suggests_and_forgives() -> None:
    assert optimizer_class("torch.optim:adamw") is torch.optim.AdamW
    with pytest.raises(ValueError, match=r"no optimizer 'torch.optim:AdamX' \(did you mean 'torch.optim:Adam"):
        optimizer_class("torch.optim:AdamX")
    with pytest.raises(ValueError, match=r"looked in torch.optim \(not an optimizer class\)"):
        optimizer_class("torch.optim:lr_scheduler")


def test_a_package_that_cant_be_imported_is_named(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_package.py").write_text("raise RuntimeError('needs a newer torch')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("selective.base.by_name.PLACES", ("torch.optim", "broken_package"))
    with pytest.raises(ValueError, match=r"broken_package \(its import fails: RuntimeError: needs a newer torch\)"):
        optimizer_class("adamww")


def test_a_factory_sees_the_groups_and_its_own_options() -> None:
    seen: list[Any] = []

    def factory(groups: list[dict[str, Any]], momentum: float) -> torch.optim.Optimizer:
        seen.extend(dict(group) for group in groups)
        return torch.optim.SGD(groups, momentum=momentum)

    opt = SelectiveUpdate.for_model(small(), factory, lr=0.1, policy="cautious", momentum=0.7)
    assert [group["name"] for group in seen] == ["matrices", "embeddings", "head", "vectors"]
    assert all(isinstance(p, nn.Parameter) for group in seen for p in group["params"])  # no pairs: any class takes them
    assert {(group["lr"], group["momentum"]) for group in opt.param_groups} == {(0.1, 0.7)}
    opt = SelectiveUpdate.for_model(small(), lambda groups, lr: torch.optim.SGD(groups, lr=lr), lr=0.2, policy="mgup")
    assert {group["lr"] for group in opt.param_groups} == {0.2}
    with pytest.raises(TypeError, match=r"returned None, which is no torch\.optim\.Optimizer"):
        SelectiveUpdate.for_model(small(), lambda groups: None, policy="cautious")  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    ("base", "options", "error", "said"),
    [
        ("adamww", {}, ValueError, r"for_model: no optimizer 'adamww' \(did you mean 'AdamW'\?\)"),
        ("adamw", {"beta": (0.9, 0.9)}, TypeError, r"nobody takes 'beta' \(did you mean 'betas'\?\)"),
        ("adamw", {"momentum_bta": 0.9}, TypeError, r"did you mean 'momentum_beta'\?"),
        ("rprop", {"weight_decay": 0.1}, ValueError, "Rprop has no weight_decay, and got 0.1; leave it out"),
        ("muon", {}, ValueError, r"Muon refuses: .*matrices='Muon', rest='adamw'"),
        ("adamw", {"eps": -1.0}, ValueError, r"AdamW refuses: Invalid epsilon value: -1.0$"),
        ("adamw", {"lr": {"matrices": 0.1, "rest": -1}}, ValueError, "for_model: lr is -1, must be a number"),
        ("adamw", {"lr": "1e-3"}, ValueError, "for_model: lr is '1e-3', must be a number of at least 0"),
        ("adamw", {"weight_decay": {"matrices": 0.1}}, ValueError, "must be a number .*; no_decay names the kinds"),
        ("lbfgs", {}, ValueError, r"LBFGS refuses: LBFGS doesn't support per-parameter options \(parameter groups\)$"),
        ("adamw", {"policy": "mgupp"}, ValueError, r"'mgupp' is not known \(did you mean 'MGUP'\?\)"),
        ("adamw", {"policy": {"matrixes": "mgup"}}, ValueError, r"policy has 'matrixes' .*mean 'matrices'\?"),
        ("adamw", {"preconditioner": {"heads": "soap"}}, ValueError, r"preconditioner has 'heads' .*mean 'head'\?"),
        ("adamw", {"lr": {"matrices": 0.1}}, ValueError, r"no value for 'embeddings' .*; add .* or 'rest'"),
        ("adamw", {"head": ["tail"]}, ValueError, "for_model: head names 'tail', which trains nothing"),
        ("adamw", {"parts": {"qkv": 3}}, ValueError, "for_model: parts names 'qkv', and no matrix is called so"),
        (3, {}, TypeError, r"base is 3; write a name"),
        (nn.Linear, {}, TypeError, r"write a name \('adamw'\), an optimizer class"),
    ],
)  # fmt: skip
def test_mistakes_are_said(
    base: Any, options: dict[str, Any], error: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selective.base.by_name.PLACES", ("torch.optim",))  # others take seconds to import
    with pytest.raises(error, match=said):
        SelectiveUpdate.for_model(small(), base, **{"policy": "mgup", **options})


def test_nothing_to_do_is_said_with_the_way_out() -> None:
    with pytest.warns(UserWarning, match="neither a policy nor a preconditioner .*policy='dense' if") as told:
        SelectiveUpdate.for_model(small())
    assert [warning.filename for warning in told] == [__file__]  # once, and where it was called
    opt = SelectiveUpdate.for_model(small(), policy="dense")
    assert {group.policy.kind for group in opt.policy_groups} == {"Dense"}
    opt = SelectiveUpdate.for_model(small(), weight_decay=0.1, decay="cautious-decay")  # something to do, with AdamW
    assert {group.decay.kind for group in opt.decay_groups} == {"CautiousDecay"}  # type: ignore[union-attr]


def test_a_function_is_a_policy() -> None:
    model = small()
    opt = SelectiveUpdate.for_model(model, policy=lambda view: view.update * view.grad > 0)
    stepped(opt, model)
    assert set(opt.statistics()) == {"up.weight", "down.weight"}


def test_models_that_cant_be_trained() -> None:
    with pytest.raises(ValueError, match=r"for_model: the model has no parameter that requires .*requires_grad_\(\)"):
        SelectiveUpdate.for_model(small().requires_grad_(False), policy="mgup")
    with pytest.raises(TypeError, match=r"for_model: got an object of type generator.*pass the model itself"):
        SelectiveUpdate.for_model(small().parameters(), policy="mgup")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="exists already; pass its name or its class"):
        SelectiveUpdate.for_model(small(), torch.optim.AdamW(small().parameters()))  # type: ignore[arg-type]


def test_it_prints_what_it_decided(capsys: pytest.CaptureFixture[str]) -> None:
    opt = SelectiveUpdate.for_model(small(), lr=1e-2, policy="cautious", preconditioner="soap", verbose=True)
    said = capsys.readouterr().out
    lines = [line.split() for line in said.splitlines()]
    assert ["group", "tensors", "elements", "lr", "weight_decay", "policy", "preconditioner"] in lines
    assert ["matrices", "2", "64", "0.01", "0.01", "Cautious()", "Soap()"] in lines
    assert ["vectors", "3", "18", "0.01", "0", "-", "-"] in lines
    assert ["head", "head.weight", "6", "x", "4", "called", "so"] in lines
    assert said.rstrip().endswith(opt.explain())
    SelectiveUpdate.for_model(small(), policy="cautious")
    assert capsys.readouterr().out == ""


def assert_resumes(**made: Any) -> None:
    """Two steps, and one step and another after a load, end at the same bits."""
    through, halves = seeded(), seeded()
    opt = SelectiveUpdate.for_model(through, **made)
    stepped(opt, through)
    stepped(opt, through)
    first = SelectiveUpdate.for_model(halves, **made)
    stepped(first, halves)
    again = SelectiveUpdate.for_model(halves, **made)
    again.load_state_dict(first.state_dict())
    stepped(again, halves)
    assert all(torch.equal(p, q) for p, q in zip(through.parameters(), halves.parameters(), strict=True))


def test_a_resumed_run_goes_on_bit_for_bit() -> None:
    assert_resumes(lr=1e-2, policy="randommask", preconditioner=Soap(refresh_every=2), seed=3)


# --- two bases ---


class Mixed(nn.Module):
    """Matrices, a convolution, and a stack of experts that is joined; a group "rows:2" of 2-D and 3-D weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv2d(2, 4, 3), nn.Linear(4, 8)
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 6))
        self.down_proj = nn.Parameter(torch.randn(3, 6, 4))
        self.w12 = nn.Linear(4, 8, bias=False)


def test_muon_for_matrices_and_adamw_for_the_rest() -> None:
    model = Mixed()
    opt = SelectiveUpdate.for_model(
        model, matrices="muon", rest="adamw", lr={"matrices": 0.02, "rest": 3e-4}, weight_decay=0.1, betas=(0.9, 0.95)
    )
    muon, adamw = opt.members
    assert (type(muon), type(adamw)) == (torch.optim.Muon, torch.optim.AdamW)  # without a policy nothing is wrapped
    names = [[name for group in member.param_groups for name in group["param_names"]] for member in opt.members]
    assert names[0] == ["up.weight", "w12.weight"]
    assert (
        set(names[0]) | set(names[1]) == {name for name, _ in model.named_parameters()} and "gate_up_proj" in names[1]
    )
    assert {group["lr"] for group in muon.param_groups} == {0.02}
    assert {group["lr"] for group in adamw.param_groups} == {3e-4}  # of stacks and convolutions, too
    assert {group["betas"] for group in adamw.param_groups} == {(0.9, 0.95)}
    assert all("matrix_view" not in group and "policy" not in group for group in opt.param_groups)
    before = [p.detach().clone() for p in model.parameters()]
    stepped(opt, model)
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_two_bases_with_a_policy() -> None:
    opt = SelectiveUpdate.for_model(Mixed(), "adamw", matrices="muon", lr=1e-3, policy="cautious")
    muon, adamw = opt.members  # the second one has convolutions and stacks, and those are matrices
    assert isinstance(muon, SelectiveUpdate) and isinstance(adamw, SelectiveUpdate)
    assert {repr(g.policy) for g in muon.policy_groups} == {"Cautious()"}
    opt = SelectiveUpdate.for_model(small(), "adamw", matrices="muon", lr=1e-3, policy="cautious")
    muon, adamw = opt.members
    assert isinstance(muon, SelectiveUpdate) and type(adamw) is torch.optim.AdamW
    opt = SelectiveUpdate.for_model(small(), "adamw", matrices="muon", policy="cautious", on_nonfinite="skip")
    assert all(isinstance(member, SelectiveUpdate) for member in opt.members)


def test_a_partial_has_options_of_its_own() -> None:
    muon = partial(torch.optim.Muon, momentum=0.8)
    opt = SelectiveUpdate.for_model(small(), matrices=muon, rest=torch.optim.SGD, lr=0.1, momentum=0.5)
    assert {group["momentum"] for group in opt.members[1].param_groups} == {0.5}
    assert {group["momentum"] for group in opt.members[0].param_groups} == {0.8}
    opt = SelectiveUpdate.for_model(small(), matrices="muon", rest=torch.optim.SGD, lr=0.1, momentum=0.5)
    assert {group["momentum"] for group in opt.param_groups} == {0.5}  # both take it


def test_two_bases_resume_bit_for_bit() -> None:
    assert_resumes(matrices="muon", rest="adamw", lr=1e-2, policy="randommask", seed=3)


def test_two_bases_that_are_one() -> None:
    with pytest.raises(ValueError, match="base is 'lion', and matrices and rest name all optimizers already"):
        SelectiveUpdate.for_model(small(), "lion", matrices="muon", rest="adamw")
    opt = SelectiveUpdate.for_model(small(), "adamw", matrices=torch.optim.AdamW, policy=Cautious())
    assert isinstance(opt, SelectiveUpdate)
    for model, matrices in ((nn.LayerNorm(4), "muon"), (nn.Linear(4, 4, bias=False), torch.optim.SGD)):
        opt = SelectiveUpdate.for_model(model, "adamw", matrices=matrices, policy={"vectors": "cautious"})
        assert isinstance(opt, SelectiveUpdate)
        assert type(opt.base) is (torch.optim.AdamW if matrices == "muon" else torch.optim.SGD)


def test_stacks_have_no_rate_of_their_own() -> None:
    with pytest.raises(ValueError, match=r"'rows:2' \(gate_up_proj\) goes to the rest.s optimizer, and lr has no"):
        SelectiveUpdate.for_model(Mixed(), matrices="muon", rest="adamw", lr={"matrices": 0.02, "vectors": 3e-4})
