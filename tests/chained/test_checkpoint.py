"""A chain's checkpoint: torch's flat form, and a load into all members or into none."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from typing import Any

import pytest
import torch
from chains import equal, muon_and_adamw, net, parts_of, train, two_adamw, values
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from selective import ChainedOptimizer, SelectiveUpdate, Soap


def saved(opt: Optimizer) -> Any:
    """`state_dict()` as it comes back from a file."""
    buffer = io.BytesIO()
    torch.save(opt.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_parameters_are_counted_on_over_all_members() -> None:
    model = net()
    opt = muon_and_adamw(model)
    train(model, opt, range(2))
    state = opt.state_dict()
    assert set(state) == {"state", "param_groups"}
    assert [group["params"] for group in state["param_groups"]] == [[0, 1], [2, 3]]
    assert {index: set(entries) for index, entries in state["state"].items()} == {
        **{index: {"momentum_buffer", "selective/step", "selective/seed", "selective/policy"} for index in (0, 1)},
        **{index: {"step", "exp_avg", "exp_avg_sq"} for index in (2, 3)},
    }
    for group, live in zip(state["param_groups"], opt.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in live.items() if k != "params"}


def rotated(model: nn.Module) -> ChainedOptimizer:
    matrices, rest = parts_of(model)
    first = SelectiveUpdate(AdamW(matrices, lr=0.01), policy="RandomMask", preconditioner=Soap(refresh_every=2))
    return ChainedOptimizer([first, SelectiveUpdate(torch.optim.SGD(rest, lr=0.1, momentum=0.9), policy="Cautious")])


@pytest.mark.parametrize("make", [muon_and_adamw, two_adamw, rotated])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_run_goes_on_bit_for_bit(make: Any, steps: int) -> None:
    model = net()
    opt = make(model)
    train(model, opt, range(steps))
    fresh = copy.deepcopy(model)
    resumed = make(fresh)
    resumed.param_groups[1]["lr"] = 0.5
    resumed.load_state_dict(saved(opt))
    for one, its in ((model, opt), (fresh, resumed)):
        train(one, its, range(steps, steps + 3))
    assert equal(values(model), values(fresh))
    assert resumed.param_groups[1]["lr"] == opt.param_groups[1]["lr"]


def everything(opt: Optimizer) -> list[Any]:
    """Copies of all state, and all of the groups."""
    state = [v.clone() if isinstance(v, Tensor) else v for e in opt.state.values() for v in e.values()]
    return [state, [{k: v for k, v in group.items() if k != "params"} for group in opt.param_groups]]


def same(first: list[Any], second: list[Any]) -> bool:
    pairs = zip(first[0], second[0], strict=True)
    return first[1] == second[1] and all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs)


class Reluctant(AdamW):
    """Refuses to load, half-way through."""

    refuses = True

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        self.param_groups[0]["lr"] = 7.0
        if self.refuses:
            raise OSError("no more today")


def test_loading_is_all_or_nothing_over_all_members() -> None:
    """The last of three members refuses: a wrapped one and a bare one before it are put back."""

    def make(model: nn.Module, rate: float) -> ChainedOptimizer:
        matrices, rest = parts_of(model)
        muon = SelectiveUpdate(Muon(matrices, lr=rate), policy="MGUP")
        return ChainedOptimizer({"muon": muon, "bias": AdamW(rest[:1], lr=rate), "last": Reluctant(rest[1:], lr=rate)})

    model, other = net(), net(1)
    opt, theirs = make(model, 0.01), make(other, 0.02)
    train(model, opt, range(2))
    train(other, theirs, range(4))
    before, params = everything(opt), values(model)
    checkpoint = saved(theirs)
    with pytest.raises(ValueError, match=r"into member 'last' \(OSError: no more today\); nothing was loaded"):
        opt.load_state_dict(checkpoint)
    assert same(everything(opt), before) and not same(everything(theirs), before)
    twin = copy.deepcopy((model, opt))
    train(model, opt, range(2, 4))
    train(*twin, range(2, 4))
    assert equal(values(model), values(twin[0])) and not equal(values(model), params)
    opt.members[2].refuses = False  # type: ignore[attr-defined]
    opt.load_state_dict(checkpoint)
    assert [group["lr"] for group in opt.param_groups] == [0.02, 0.02, 7.0]


def test_a_checkpoint_that_does_not_fit_is_refused_by_the_members_name() -> None:
    model = net()
    opt = muon_and_adamw(model)
    train(model, opt, range(2))
    checkpoint, before = saved(opt), everything(opt)
    matrices, rest = parts_of(model)
    cautious = SelectiveUpdate(Muon(matrices), policy="Cautious")
    wrapped = SelectiveUpdate(AdamW(rest), policy="MGUP")
    for members, match in [
        ({"m": cautious, "r": AdamW(rest)}, "member 'm': .*has the policy Cautious.*made with MGUP"),
        ({"m": Muon(matrices), "r": AdamW(rest)}, "member 'm': the checkpoint has this member wrapped"),
        ([AdamW(rest)], "2 parameter groups, the optimizer 1"),
        ([SelectiveUpdate(Muon(matrices), policy="MGUP"), torch.optim.SGD(rest)], "the checkpoint is not of SGD"),
        ([wrapped, AdamW(matrices)], "member '0': "),
    ]:
        fresh = ChainedOptimizer(members)
        start = everything(fresh)
        with pytest.raises(ValueError, match=match) as error:
            fresh.load_state_dict(checkpoint)
        assert "nothing was loaded" in str(error.value).lower()
        assert same(everything(fresh), start)
    stray = {**checkpoint, "state": {**checkpoint["state"], 9: {}}}
    with pytest.raises(ValueError, match="has a parameter 9, its groups don't"):
        opt.load_state_dict(stray)
    with pytest.raises(ValueError, match="has no 'state'"):
        opt.load_state_dict({"param_groups": []})
    assert same(everything(opt), before)


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("make", [AdamW, torch.optim.NAdam])
def test_state_of_another_shape_or_without_an_entry_is_refused_for_a_bare_member(make: Any, fresh: bool) -> None:
    """torch loads it, and the next step would fail after wrapped members have moved."""

    def chain(model: nn.Module) -> ChainedOptimizer:
        matrices, rest = parts_of(model)
        return ChainedOptimizer([SelectiveUpdate(Muon(matrices), policy="MGUP"), make(rest)])

    model = net()
    opt = chain(model)
    train(model, opt, range(2))
    checkpoint, target = saved(opt), chain(net()) if fresh else opt
    last = max(checkpoint["state"])
    before = everything(target)
    spoilt, lacking = copy.deepcopy(checkpoint), copy.deepcopy(checkpoint)
    spoilt["state"][last]["exp_avg"] = torch.zeros(99)
    for entries in lacking["state"].values():
        entries.pop("exp_avg_sq", None)
    refused = (
        [(lacking, "exp_avg_sq")] if make is torch.optim.NAdam and fresh else [(spoilt, "99"), (lacking, "exp_avg_sq")]
    )
    for wrong, match in refused:  # what NAdam keeps is not known before its first step
        with pytest.raises(ValueError, match=f"member '1': .*{match}"):
            target.load_state_dict(wrong)
        assert same(everything(target), before)
    target.load_state_dict(checkpoint)


def test_a_member_that_was_bare_may_be_wrapped_later() -> None:
    model = net()
    opt = muon_and_adamw(model)
    train(model, opt, range(2))
    matrices, rest = parts_of(model)
    both = [SelectiveUpdate(Muon(matrices), policy="MGUP"), SelectiveUpdate(AdamW(rest), policy="MGUP")]
    fresh = ChainedOptimizer(both)
    fresh.load_state_dict(saved(opt))
    assert int(fresh.state[rest[0]]["step"]) == 2
    train(model, fresh, [2])


def test_state_that_was_replaced_is_not_kept() -> None:
    model = net()
    opt = two_adamw(model)
    train(model, opt, range(2))  # both members share a kernel call, and its list of items
    checkpoint = saved(opt)
    old = weakref.ref(next(iter(opt.state.values()))["exp_avg"])
    opt.load_state_dict(checkpoint)
    gc.collect()
    assert old() is None


class Lookalike(AdamW):
    """Has something in its checkpoint that torch's form has no place for."""

    slow = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "slow": self.slow}

    def load_state_dict(self, state_dict: Any) -> None:
        self.slow = state_dict["slow"]
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "slow"})


def test_what_else_a_member_saves_comes_back() -> None:
    model = net()
    matrices, rest = parts_of(model)
    opt = ChainedOptimizer({"a": AdamW(matrices), "b": Lookalike(rest)})
    opt.members[1].slow = 3.0  # type: ignore[attr-defined]
    opt.members[1].state["count"] = torch.tensor(5)  # type: ignore[index]
    state = saved(opt)
    assert state["members"] == {"b": {"slow": 3.0, "state": {"count": torch.tensor(5)}}}
    fresh = ChainedOptimizer({"a": AdamW(matrices), "b": Lookalike(rest)})
    fresh.load_state_dict(state)
    assert fresh.members[1].slow == 3.0 and int(fresh.members[1].state["count"]) == 5  # type: ignore


def test_dtypes_of_bare_members_are_kept_exactly() -> None:
    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    opt = ChainedOptimizer([AdamW([p]), AdamW([nn.Parameter(torch.ones(2))])])
    p.grad = torch.ones_like(p)
    opt.step()
    opt.state[p]["exp_avg"] = torch.full((4,), 0.1, dtype=torch.float32)
    state = saved(opt)
    fresh = ChainedOptimizer([AdamW([p]), AdamW([nn.Parameter(torch.ones(2))])])
    fresh.load_state_dict(state)
    assert torch.equal(fresh.state[p]["exp_avg"], opt.state[p]["exp_avg"])


def test_hooks_of_checkpoints_fire_once_and_what_they_return_is_used() -> None:
    opt, fired = muon_and_adamw(net()), []
    opt.register_state_dict_pre_hook(lambda _: fired.append("save"))
    opt.register_state_dict_post_hook(lambda _, state: {**state, "mark": 1})
    opt.register_load_state_dict_pre_hook(lambda _, state: fired.append(state["mark"]))
    opt.register_load_state_dict_post_hook(lambda _: fired.append("loaded"))
    opt.members[1].register_load_state_dict_post_hook(lambda _: fired.append("member"))
    opt.load_state_dict(opt.state_dict())
    assert fired == ["save", 1, "member", "loaded"]
