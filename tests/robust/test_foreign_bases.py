"""Checkpoints of another base: refused where that can be told, and not where they are of the same one after all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import optimi
import pytest
import pytorch_optimizer
import torch
from base_optimizers import BASES, build, give_grads, make_params
from torch import Tensor
from torch.optim import Optimizer
from whole_bytes import difference, everything, model_bytes, through_a_file

from selective import MGUP, Dense, Policy, RandomMask, SelectiveUpdate, base_part
from selective.base.same_class import class_names
from selective.state.entries import POLICY, decode_note

t = torch.optim
Make = Callable[..., Optimizer]


class OwnAdamW(t.AdamW):
    """Somebody's own, as it stands in a training script."""


class Renamed(OwnAdamW):
    pass


class AdamW(OwnAdamW):
    """Of torch's name, from another module, and keeps the same."""


class Forgetful(t.AdamW):
    """Inherits, and keeps more: its own step would not find that in AdamW's checkpoint."""

    def step(self, closure: Any = None) -> Any:
        found = super().step(closure)
        for entries in self.state.values():
            entries.setdefault("more", torch.zeros(3))
        return found


def _adamw8bit(params: Any, lr: float) -> Optimizer:
    return pytest.importorskip("torchao.optim").AdamW8bit(params, lr=lr)


def wrapped(base: Make, policy: Policy | None = None) -> SelectiveUpdate:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (5,))]
    return SelectiveUpdate(base(params, lr=0.01), policy=MGUP() if policy is None else policy)


def train(optimizer: Any, first: int, last: int) -> Any:
    for step in range(first, last):
        give_grads([p for group in optimizer.param_groups for p in group["params"]], step)
        optimizer.step()
    return optimizer


def saved(base: Make, policy: Policy | None = None) -> dict[str, Any]:
    return through_a_file(train(wrapped(base, policy), 0, 2).state_dict())


def without_class(state: dict[str, Any]) -> dict[str, Any]:
    """As checkpoints were before the class was saved."""
    state = copy.deepcopy(state)
    for entries in state["state"].values():
        data = entries[POLICY]
        end = bytes(data.tolist()).index(b"\0")
        data[end:] = 0
    return state


def refused(base: Make, state: dict[str, Any], says: str, policy: Policy | None = None) -> None:
    target = train(wrapped(base, policy), 5, 7)
    before = everything(target)
    with pytest.raises(ValueError, match=rf"(?s)^SelectiveUpdate: .*{says}.*nothing was loaded"):
        target.load_state_dict(copy.deepcopy(state))
    assert difference(before, everything(target)) is None
    train(target, 7, 8)


OTHERS: list[tuple[Make, Make]] = [
    (t.Adam, t.Adamax),  # lacks an entry of Adamax
    (t.Adam, t.RAdam),  # has the same entries and options
    (t.RAdam, t.AdamW),
    (t.NAdam, t.RAdam),  # has one more
    (t.RMSprop, t.Adadelta),
    (pytorch_optimizer.Lion, pytorch_optimizer.Tiger),  # of a common parent, which is nobody's base
    (t.AdamW, _adamw8bit),
]


@pytest.mark.parametrize(("theirs", "ours"), OTHERS, ids=lambda make: make.__name__.strip("_"))
def test_another_class_is_refused_by_its_name(theirs: Make, ours: Make) -> None:
    with torch.compiler.set_stance("force_eager"):
        name = class_names(wrapped(theirs).base).split()[0]
        refused(ours, saved(theirs), f"it was made with {name}")


SAME: list[tuple[Make, Make]] = [
    (t.Adam, t.AdamW),  # which inherits, and does the same without decay
    (t.AdamW, t.Adam),
    (t.AdamW, OwnAdamW),
    (OwnAdamW, t.AdamW),
    (t.Adam, Renamed),
    (t.AdamW, AdamW),
    (AdamW, t.AdamW),
]


@pytest.mark.parametrize(("theirs", "ours"), SAME, ids=lambda make: f"{make.__module__}.{make.__name__}")
def test_the_same_class_is_not_refused(theirs: Make, ours: Make) -> None:
    state = saved(theirs)
    target = wrapped(ours)
    target.load_state_dict(copy.deepcopy(state))
    train(target, 2, 4)
    assert all(entries["step"] == 4 for entries in target.base.state.values())


def test_a_parameter_whose_entries_are_all_gone_is_noticed() -> None:
    """One entry less is, in `test_refused_checkpoints`; with all of one parameter's the others would go on."""
    state = saved(t.AdamW)
    for key in [key for key in state["state"][1] if str(key).startswith("selective/")]:
        del state["state"][1][key]
    refused(t.AdamW, state, "entries of ours for 1 of the 2 parameters")
    wrapped(t.AdamW).load_state_dict(base_part(saved(t.AdamW)))  # the twin: of none


@pytest.mark.parametrize("policy", [MGUP(), Dense()], ids=repr)
def test_decay_in_the_gradient_is_not_decoupled_without_a_word(policy: Policy) -> None:
    """torch's AdamW sets the option to True whatever was loaded. The other way Adam keeps what was saved."""

    def decaying(base: Make) -> Make:
        return lambda params, lr: base(params, lr=lr, weight_decay=0.5)

    refused(decaying(t.AdamW), saved(decaying(t.Adam), policy), "would decouple it", policy)
    target = wrapped(decaying(t.Adam), policy)
    target.load_state_dict(copy.deepcopy(saved(decaying(t.AdamW), policy)))
    assert target.param_groups[0]["decoupled_weight_decay"] is True


@pytest.mark.parametrize("policy", [MGUP(), Dense()], ids=repr)
@pytest.mark.parametrize(
    ("theirs", "ours", "says"),
    [
        (t.Adam, t.Adamax, "not of Adamax: a parameter's state has .*exp_avg_sq.*and not 'exp_inf'"),
        (t.RMSprop, t.Adadelta, "not of Adadelta"),
        (t.AdamW, optimi.AdamW, "and not 'kahan_comp'"),  # it would have begun its moments anew, without a word
        (t.AdamW, Forgetful, "and not 'more'"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_entries_tell_where_no_class_was_saved(theirs: Make, ours: Make, says: str, policy: Policy) -> None:
    """By Dense() groups, which have nothing of ours, by plain bases and before there were any names."""
    policy = RandomMask() if theirs is t.RMSprop and not isinstance(policy, Dense) else policy
    state = saved(theirs, policy)
    plain = base_part(state)
    refused(ours, plain, says, policy)
    if not isinstance(policy, Dense):
        refused(ours, without_class(state), says, policy)


def test_classes_of_one_name_are_told_apart_by_what_they_keep() -> None:
    refused(optimi.AdamW, saved(t.AdamW), "and not 'kahan_comp'")


@pytest.mark.parametrize(("theirs", "ours"), [(t.AdamW, _adamw8bit), (t.Adam, t.RAdam)], ids=["8-bit", "radam"])
def test_the_way_out_for_who_means_it(theirs: Make, ours: Make) -> None:
    """AdamW in 8 bits goes on from AdamW's moments, and RAdam from Adam's: the base's part, under the own options."""
    with torch.compiler.set_stance("force_eager"):
        state, target = base_part(saved(theirs)), wrapped(ours)
        moments = [entries["exp_avg"].clone() for entries in state["state"].values()]
        target.load_state_dict({**state, "param_groups": target.state_dict()["param_groups"]})
        for p, moment in zip(target.param_groups[0]["params"], moments, strict=True):
            assert torch.equal(target.base.state[p]["exp_avg"], moment)
        train(target, 2, 4)


def test_checkpoints_from_before_the_names_load() -> None:
    state = saved(t.AdamW)
    (note,) = {decode_note(entries[POLICY]) for entries in state["state"].values()}
    assert note == "torch.AdamW torch.Adam"
    old = without_class(state)
    assert {decode_note(entries[POLICY]) for entries in old["state"].values()} == {""}
    targets = [wrapped(t.AdamW) for _ in range(2)]
    for target, one in zip(targets, (state, old), strict=True):
        target.load_state_dict(one)
        train(target, 2, 4)
    assert model_bytes(targets[0]) == model_bytes(targets[1])
    # torch.distributed.checkpoint reads into what is there: an entry must not be longer than it was
    sizes = {entries[POLICY].numel() for one in (state, old) for entries in one["state"].values()}
    assert sizes == {512}


def test_a_policy_that_leaves_no_room_is_saved_without_the_names() -> None:
    class Full(Policy):
        text: str = "x"

        def mask(self, view: Any) -> Tensor:
            return torch.ones(())

    # With its kind and field the JSON is as long as `text` and this much more: it ends right before the next block.
    around = len(Full(text="").model_dump_json())
    for room, expected in ((0, ""), (22, ""), (23, "torch.AdamW torch.Adam")):
        policy = Full(text="x" * (512 - around - room))
        state = saved(t.AdamW, policy)
        found = [(decode_note(e[POLICY]), e[POLICY].numel()) for e in state["state"].values()]
        assert found == [(expected, 512)] * 2, room
        wrapped(t.AdamW, policy).load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BASES)
def test_no_base_refuses_its_own(name: str, dtype: torch.dtype) -> None:
    """Without names, from the plain base and from a masked run: what its first step makes is there."""
    base = BASES[name]
    if dtype == torch.bfloat16 and not base.low:
        pytest.skip("not in low precision")
    with torch.compiler.set_stance("force_eager"):
        plain = train(build(base, make_params(base, dtype)), 0, 3)
        masked = train(SelectiveUpdate(build(base, make_params(base, dtype)), policy=RandomMask()), 0, 3)
        for state in (plain.state_dict(), base_part(masked.state_dict()), masked.state_dict()):
            target = SelectiveUpdate(build(base, make_params(base, dtype)), policy=RandomMask())
            target.load_state_dict(state)
            train(target, 3, 4)


def test_without_the_check_another_class_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The failing twin: RAdam would have gone on from Adam's moments, and nobody would have known."""
    monkeypatch.setattr("selective.checkpoint.matches_base.check_class", lambda names, base: True)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        refused(t.RAdam, saved(t.Adam), "it was made with")
