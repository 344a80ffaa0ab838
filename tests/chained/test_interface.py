"""`ChainedOptimizer` as an optimizer: its groups, its state, schedules, hooks, and what it refuses."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from chains import equal, give_gradients, muon_and_adamw, net, parts_of, train, two_adamw, values
from torch.optim import SGD, AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, OneCycleLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from selective import Cautious, ChainedOptimizer, SelectiveUpdate, Soap, watch


def test_it_is_an_optimizer_over_its_members_groups() -> None:
    opt = muon_and_adamw(net())
    muon, adamw = opt.members
    assert isinstance(opt, Optimizer)
    assert [id(group) for group in opt.param_groups] == [id(g) for one in (muon, adamw) for g in one.param_groups]
    assert opt.param_groups is opt.param_groups
    opt.param_groups[0]["lr"] = 0.5
    assert muon.base.param_groups[0]["lr"] == 0.5
    assert opt.names == ("matrices", "rest") and opt.member("rest") is adamw is opt.member(1)
    only = ChainedOptimizer([SelectiveUpdate(AdamW(net().parameters()))])
    assert only.param_groups is only.members[0].param_groups and only.names == ("0",)


def test_the_list_of_groups_says_that_it_follows_the_members() -> None:
    opt = muon_and_adamw(net())
    for change in (
        lambda groups: groups.append({}),
        lambda groups: groups.pop(),
        lambda groups: groups.__setitem__(0, {}),
        lambda groups: groups.__delitem__(1),
    ):
        with pytest.raises(TypeError, match=r"del opt\.members\[i\]\.param_groups\[j\]"):
            change(opt.param_groups)
    copied = copy.deepcopy(opt.param_groups)
    copied.pop()
    assert type(copied) is list and len(opt.param_groups) == 2
    del opt.members[1].param_groups[0]
    assert len(opt.param_groups) == 1


def test_groups_that_are_set_reach_the_members() -> None:
    opt = muon_and_adamw(net())
    opt.param_groups = [{**group, "lr": 0.125} for group in opt.param_groups]
    assert [one.param_groups[0]["lr"] for one in opt.members] == [0.125, 0.125]
    with pytest.raises(ValueError, match="set to 1 groups, and the members have 2"):
        opt.param_groups = [opt.param_groups[0]]


@pytest.mark.parametrize("key", ["rest", 1])
def test_a_group_is_added_to_the_member_that_it_names(key: Any) -> None:
    model = net()
    opt = muon_and_adamw(model)
    extra = torch.nn.Parameter(torch.ones(3))
    opt.add_param_group({"params": [extra], "lr": 0.5, "member": key})
    assert [len(one.param_groups) for one in opt.members] == [1, 2]
    assert "member" not in opt.param_groups[2] and opt.param_groups[2]["lr"] == 0.5
    extra.grad = torch.ones(3)
    train(model, opt, [0])
    assert not torch.equal(extra, torch.ones(3))


def test_a_group_without_a_member_or_with_anothers_parameter_is_refused() -> None:
    model = net()
    opt = muon_and_adamw(model)
    matrices, rest = parts_of(model)
    with pytest.raises(ValueError, match=r"add the key 'member'.*'matrices' \(SelectiveUpdate over Muon\), 'rest'"):
        opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    with pytest.raises(ValueError, match="there is no member 'embeddings'"):
        opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], "member": "embeddings"})
    with pytest.raises(ValueError, match="in member 'matrices' and in param_groups"):
        opt.add_param_group({"params": [matrices[0]], "member": "rest"})
    wrapped: Any = ChainedOptimizer({"rest": AdamW(rest), "matrices": SelectiveUpdate(AdamW(matrices))})
    with pytest.raises(ValueError, match="in member 'rest'"):
        wrapped.add_param_group({"params": [rest[0]], "member": "matrices"})
    assert [len(group["params"]) for group in opt.param_groups] == [2, 2]
    assert len(wrapped.members[1].policy_groups) == 1
    only = ChainedOptimizer([SelectiveUpdate(AdamW(matrices))])
    only.add_param_group({"params": rest})  # there is no choice
    assert len(only.param_groups) == 2


def test_what_is_no_list_of_apart_optimizers_is_refused() -> None:
    matrices, rest = parts_of(net())
    adamw = AdamW(rest)
    for members, error, match in [
        ([], ValueError, "no optimizer was given"),
        (adamw, TypeError, "pass a list of optimizers, not one AdamW"),
        (3, TypeError, "members is a int"),
        ([adamw, "muon"], TypeError, "member '1' is a str"),
        ([adamw, AdamW], TypeError, "member '1' is a type"),
        ([adamw, adamw], ValueError, "given twice"),
        ({"a/b": adamw}, TypeError, "without '/'"),
        ([adamw, AdamW([*matrices, rest[0]])], ValueError, r"in member '0' and in param_groups\[0\] of member '1'"),
        ([torch.optim.LBFGS(rest)], ValueError, r"'0' \(LBFGS\) requires a closure"),
        ([ChainedOptimizer([adamw])], TypeError, "member '0' is a ChainedOptimizer itself; pass its members"),
    ]:
        with pytest.raises(error, match=match):
            ChainedOptimizer(members)


def test_members_that_share_memory_are_refused_if_one_is_masked() -> None:
    p = torch.nn.Parameter(torch.ones(4, 3))
    view = torch.nn.Parameter(p.detach()[:2])
    ChainedOptimizer([AdamW([p]), AdamW([view])])  # torch steps them one after the other
    with pytest.raises(ValueError, match=r"'0/param_groups\[0\]\[0\]'.* share memory"):
        ChainedOptimizer([SelectiveUpdate(AdamW([p]), policy=Cautious()), AdamW([view])])


def test_selective_update_names_it() -> None:
    matrices, rest = parts_of(net())
    both = [Muon(matrices), AdamW(rest)]
    for collection in (both, tuple(both), dict(enumerate(both))):
        with pytest.raises(TypeError, match=r"ChainedOptimizer\(\[SelectiveUpdate\(first"):
            SelectiveUpdate(collection)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="base is a ChainedOptimizer; wrap its members instead"):
        SelectiveUpdate(ChainedOptimizer(both))
    with pytest.raises(TypeError, match="base is a list, must be"):
        SelectiveUpdate([torch.ones(1)])  # type: ignore[arg-type]


def sgd_twice(model: Any) -> ChainedOptimizer:
    return ChainedOptimizer([SGD(part, lr=0.1, momentum=0.9) for part in parts_of(model)])


@pytest.mark.parametrize(("make", "key"), [(two_adamw, "betas"), (sgd_twice, "momentum")])
def test_one_cycle_cycles_what_all_members_have(make: Any, key: str) -> None:
    model = net()
    opt = make(model)
    schedule = OneCycleLR(opt, max_lr=0.1, total_steps=8)
    alone = make(net())
    expected = [OneCycleLR(one, max_lr=0.1, total_steps=8) for one in alone.members]
    for step in range(4):
        train(model, opt, [step])
        schedule.step()
        for one, its in zip(alone.members, expected, strict=True):
            one.step()
            its.step()
        for group, theirs in zip(opt.param_groups, alone.param_groups, strict=True):
            assert (group["lr"], group[key]) == (theirs["lr"], theirs[key])
    assert opt.param_groups[1][key] not in (0.9, (0.9, 0.999))


def test_one_cycle_over_muon_and_adamw_names_its_option() -> None:
    """torch asks `defaults` once for all groups: it can't cycle `betas` in some and `momentum` in others."""
    opt = muon_and_adamw(net())
    keys = [set(group) for group in opt.param_groups]
    with pytest.raises(ValueError, match=r"all members must have 'betas', .*; pass cycle_momentum=False"):
        OneCycleLR(opt, max_lr=0.1, total_steps=8)
    with pytest.raises(ValueError, match="pass cycle_momentum=False"):
        CyclicLR(copy.deepcopy(opt), base_lr=0.1, max_lr=0.2)
    assert "betas" not in opt.defaults  # nobody else is told
    assert type(copy.deepcopy(opt.defaults)) is dict
    OneCycleLR(opt, max_lr=[0.1, 0.2], total_steps=8, cycle_momentum=False)
    assert all("betas" in group or "momentum" in group for group in opt.param_groups)
    assert [{"betas", "momentum"} & set(group) for group in opt.param_groups] == [{"momentum"}, {"betas"}]
    assert all(keys < set(group) for keys, group in zip(keys, opt.param_groups, strict=True))


def test_a_schedule_of_one_member_leaves_the_others() -> None:
    model = net()
    opt = muon_and_adamw(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # torch warns if it does not see `step` being called
        schedule = LambdaLR(opt.members[0], lambda step: 0.5**step)
        inner = LambdaLR(opt.members[1], lambda step: 0.1**step)
        for step in range(2):
            train(model, opt, [step])
            schedule.step()
            inner.step()
    assert [group["lr"] for group in opt.param_groups] == pytest.approx([0.005, 0.0001])


def test_global_hooks_fire_once_and_the_members_own_once() -> None:
    model = net()
    opt = muon_and_adamw(model)
    seen: list[str] = []
    start, after = values(model), []

    def note(name: str) -> Any:
        def hook(optimizer: Any, args: Any, kwargs: Any) -> None:
            seen.append(name)
            after.append(equal(values(model), start))

        return hook

    muon, adamw = opt.members
    targets = {"chain": opt, "muon": muon, "its base": muon.base, "adamw": adamw}
    for name, one in targets.items():
        one.register_step_pre_hook(note(f"{name} pre"))
        one.register_step_post_hook(note(f"{name} post"))
    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    try:
        train(model, opt, [0])
    finally:
        for handle in handles:
            handle.remove()
    assert sorted(seen) == sorted(f"{name} {when}" for name in [*targets, "global"] for when in ("pre", "post"))
    unmoved = dict(zip(seen, after, strict=True))
    assert all(unmoved[name] for name in seen if name.endswith("pre"))
    assert not any(unmoved[name] for name in seen if name.endswith("post") and name != "its base post")


def test_state_is_the_members_own() -> None:
    model = net()
    opt = muon_and_adamw(model)
    assert not opt.state
    train(model, opt, range(2))
    matrices, rest = parts_of(model)
    assert set(opt.state[rest[0]]) == {"step", "exp_avg", "exp_avg_sq"}
    assert "selective/step" in opt.state[matrices[0]] and len(opt.state) == 4
    opt.state[rest[0]]["exp_avg"].zero_()
    assert not opt.members[1].state[rest[0]]["exp_avg"].any()
    stored = opt.state.pop(rest[0])
    assert rest[0] not in opt.state and rest[0] not in opt.members[1].state
    opt.state[rest[0]] = stored
    assert opt.members[1].state[rest[0]] is stored
    assert opt.state.get(torch.ones(1)) is None
    with pytest.raises(ValueError, match="in no member's groups"):
        opt.state[torch.ones(1)] = {}
    before = {p: dict(entries) for p, entries in opt.state.items()}
    opt.state = before
    train(model, opt, [2])
    assert int(opt.state[rest[0]]["step"]) == 3 == int(opt.state[matrices[0]]["selective/step"])
    opt.state.clear()
    assert not opt.members[1].state and not opt.members[0].state


def pickled(pair: Any) -> Any:
    return pickle.loads(pickle.dumps(pair))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_copies_go_on_apart(copied: Any) -> None:
    model = net()
    opt = two_adamw(model, policy="RandomMask")
    train(model, opt, range(2))
    twin_model, twin = copied((model, opt))
    train(model, opt, range(2, 4))
    start = values(twin_model)
    train(twin_model, twin, range(2, 4))
    assert not equal(start, values(twin_model)) and equal(values(model), values(twin_model))
    assert twin.names == opt.names and twin.param_groups[0] is twin.members[0].param_groups[0]


def test_a_pickle_of_another_version_is_refused() -> None:
    opt = muon_and_adamw(net())
    state = {key: value for key, value in opt.__getstate__().items() if key != "version"}
    with pytest.raises(ValueError, match="only the version that made a pickle"):
        opt.__setstate__(state)
    with pytest.raises(ValueError, match="__setstate__ got 'groups'"):
        opt.__setstate__({"groups": []})


class WithModes(AdamW):
    mode = ""

    def train(self) -> None:
        self.mode = "train"

    def eval(self) -> None:
        self.mode = "eval"


def test_modes_reach_the_members_that_have_them() -> None:
    matrices, rest = parts_of(net())
    opt = ChainedOptimizer([WithModes(rest), SelectiveUpdate(WithModes(matrices)), AdamW([torch.ones(1)])])
    opt.eval()
    assert opt.members[0].mode == opt.members[1].base.mode == "eval"
    opt.train()
    assert opt.members[0].mode == opt.members[1].base.mode == "train"
    assert not hasattr(muon_and_adamw(net()), "train")
    assert not hasattr(opt, "mode")


def test_policies_are_listed_by_group() -> None:
    matrices, rest = parts_of(net())
    wrapped = SelectiveUpdate(AdamW(matrices), policy="MGUP", preconditioner=Soap())
    opt: Any = ChainedOptimizer([wrapped, AdamW(rest)])
    assert opt.policy_groups == (opt.members[0].policy_groups[0], None)
    opt.policy_groups[0]["alpha"] = 1.5
    assert opt.members[0].policy_groups[0].policy.alpha == 1.5
    assert opt.preconditioner_groups == (opt.members[0].preconditioner_groups[0], None)


def test_explain_has_each_member_under_its_name() -> None:
    opt = muon_and_adamw(net())
    text = opt.explain()
    assert "member 'matrices', param_groups[0] of the chain\n  SelectiveUpdate over torch.optim" in text
    assert "    policy    MGUP()" in text
    assert "member 'rest', param_groups[1] of the chain\n  torch.optim.adamw.AdamW, stepped as it is" in text
    assert "  param_groups[0]: 2 tensors, 10 elements" in text


def test_statistics_have_unique_names() -> None:
    model = net()
    opt = two_adamw(model)
    train(model, opt, [0])
    names = [f"{member}/param_groups[0][{i}]" for member in "01" for i in range(2)]
    assert list(opt.statistics()) == names
    named = [[(name, p) for name, p in model.named_parameters() if (p.ndim == 2) == (kind == 2)] for kind in (2, 1)]
    opt = ChainedOptimizer([SelectiveUpdate(AdamW(part), "MGUP") for part in named])
    train(model, opt, [0])
    assert sorted(opt.statistics()) == sorted(name for name, _ in model.named_parameters())
    clash = [[("w", named[0][0][1])], [("w", named[1][0][1])], [("0/w", named[0][1][1])]]
    opt = ChainedOptimizer([SelectiveUpdate(AdamW(part), "MGUP") for part in clash])
    train(model, opt, [0])
    assert list(opt.statistics()) == ["0/w", "1/w", "2/0/w"]
    with pytest.raises(RuntimeError, match="wrap a member"):
        sgd_twice(model).statistics()


def test_it_is_watched() -> None:
    model = net()
    opt, samples = muon_and_adamw(model), []
    with watch(opt, samples.append, every=2, model=model):
        train(model, opt, range(4))
    assert [sample.step for sample in samples] == [2, 4]
    assert set(samples[0].values) == {"0.weight", "2.weight"} and 0 < samples[0].overview()["share"] < 1
    with pytest.raises(TypeError, match="found no SelectiveUpdate in ChainedOptimizer"):
        watch(sgd_twice(model), samples.append)


def test_init_state_makes_that_of_all_members_and_moves_nothing() -> None:
    model = net()
    opt = muon_and_adamw(model)
    start = values(model)
    opt.init_state()
    assert equal(values(model), start) and len(opt.state) == 4
    assert {int(entries["step"]) for entries in opt.members[1].state.values()} == {0}
    plain = net()
    other = muon_and_adamw(plain)
    train(plain, other, range(3))
    train(model, opt, range(3))
    assert equal(values(model), values(plain))


def test_zero_grad_reaches_all() -> None:
    model = net()
    opt = muon_and_adamw(model)
    give_gradients(model, 0)
    opt.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    opt.zero_grad()
    assert all(p.grad is None for p in model.parameters())
