"""Selective decay in parameter groups, schedules and checkpoints, and where it is refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from pytorch_optimizer import NovoGrad
from torch.optim import SGD, Adam, AdamW

from selective import MGUP, CautiousDecay, RandomDecay, SelectiveUpdate, base_part
from selective.state.entries import DECAY, PREFIX

LR = 1e-2


def parameters(count: int = 2) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(6, 5, generator=generator)) for _ in range(count)]


def train(opt: SelectiveUpdate, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=generator)
        opt.step()


def values(opt: SelectiveUpdate) -> list[torch.Tensor]:
    return [p.detach().clone() for group in opt.param_groups for p in group["params"]]


def made(decay: Any, policy: Any = None, base: Any = None, **options: Any) -> SelectiveUpdate:
    base = AdamW(parameters(), lr=LR, weight_decay=0.1) if base is None else base
    return SelectiveUpdate(base, policy, decay=decay, **options)


# --- groups ---


def test_a_group_overrides_and_is_moved_out() -> None:
    a, b, c, d = parameters(4)
    groups = [
        {"params": [a], "decay": None},
        {"params": [b], "decay": {"kind": "RandomDecay", "strict": True}},
        {"params": [c], "weight_decay": 0.0, "decay": CautiousDecay(weight_decay=0.3)},
        {"params": [d]},
    ]
    opt = made(CautiousDecay(), base=AdamW(groups, lr=LR, weight_decay=0.1))
    found = [group.decay for group in opt.decay_groups]
    assert found == [None, RandomDecay(strict=True), CautiousDecay(weight_decay=0.3), CautiousDecay()]
    assert not any("decay" in group for group in opt.param_groups)
    ways = [plan.capture.way for plan in opt.groups.plans]
    assert ways == ["dense", "fused", "fused", "fused"]
    assert list(opt.decay_groups[0]) == []
    assert dict(opt.decay_groups[2]) == {"weight_decay": 0.3, "of": "update", "strict": False}
    opt.add_param_group({"params": parameters(1), "decay": "RandomDecay"})
    assert opt.decay_groups[4].decay == RandomDecay()
    train(opt, 0, 2)


def test_a_decay_of_the_base_stays_there() -> None:
    class WithDecay(SGD):
        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=LR)
            self.defaults["decay"] = 0.5
            for group in self.param_groups:
                group.setdefault("decay", 0.5)

    opt = made(CautiousDecay(weight_decay=0.1), base=WithDecay([{"params": parameters(), "decay": 0.25}]))
    assert opt.param_groups[0]["decay"] == 0.25
    assert opt.decay_groups[0].decay == CautiousDecay(weight_decay=0.1)


def test_a_hyper_parameter_beside_it_is_refused_and_the_group_is_as_it_was() -> None:
    base = AdamW([{"params": parameters(), "decay": "CautiousDecay", "strict": True}], lr=LR)
    with pytest.raises(ValueError, match="'strict' beside its decay"):
        made(None, base=base)
    assert base.param_groups[0]["decay"] == "CautiousDecay"
    del base.param_groups[0]["strict"]
    assert made(None, base=base).decay_groups[0].decay == CautiousDecay()


def test_a_key_that_comes_late_is_refused() -> None:
    opt = made(None)
    opt.param_groups[0]["decay"] = "CautiousDecay"
    with pytest.raises(ValueError, match=r"param_groups\[0\] got a 'decay' after .* opt.decay_groups\[0\].decay"):
        train(opt, 0, 1)


@pytest.mark.parametrize(
    "wrong,says", [("Cautios", "CautiousDecay"), (MGUP(), "decay"), ({"kind": "RandomDecay", "of": "x"}, "of")]
)
def test_what_is_no_decay_is_refused(wrong: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        made(wrong)


def test_it_can_be_set_and_scheduled_in_mid_run() -> None:
    """A schedule of λ of its own does what one of the base's weight decay does. Switched off, the base steps alone."""
    own = made(CautiousDecay(weight_decay=0.1), base=AdamW(parameters(), lr=LR, weight_decay=0.0))
    taken = made(CautiousDecay())
    for step in range(4):
        own.decay_groups[0]["weight_decay"] = taken.param_groups[0]["weight_decay"] = 0.1 * (step + 1)
        train(own, step, step + 1)
        train(taken, step, step + 1)
    for a, b in zip(values(own), values(taken), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="weight_decay"):
        own.decay_groups[0]["weight_decay"] = -1.0
    with pytest.raises(KeyError, match="no hyper-parameter 'strength'"):
        own.decay_groups[0]["strength"] = 1.0
    taken.decay_groups[0].decay = None
    bare = AdamW(parameters(), lr=LR, weight_decay=0.1)
    for p, q in zip(bare.param_groups[0]["params"], values(taken), strict=True):
        p.data.copy_(q)
    bare.load_state_dict(copy.deepcopy(base_part(taken.state_dict())))
    train(taken, 4, 5)
    for p in bare.param_groups[0]["params"]:
        p.grad = None
    generator = torch.Generator().manual_seed(4)
    for p in bare.param_groups[0]["params"]:
        p.grad = torch.randn(p.shape, generator=generator)
    bare.param_groups[0]["weight_decay"] = taken.param_groups[0]["weight_decay"]
    bare.step()
    for p, q in zip(bare.param_groups[0]["params"], values(taken), strict=True):
        assert torch.equal(p, q)


# --- refusals ---


class NoRate(torch.optim.Optimizer):
    """A base that makes its own learning rate."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": None, "weight_decay": 0.0})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data.mul_(1 - 0.01 * group["weight_decay"]).sub_(0.01 * p.grad)


REFUSED = [
    (lambda p: Adam(p, lr=LR, weight_decay=0.1), CautiousDecay(), "adds its weight decay to the gradient"),
    (lambda p: Adam(p, lr=LR, weight_decay=0.1), CautiousDecay(weight_decay=0.1), "set weight_decay=0 in the group"),
    (lambda p: SGD(p, lr=LR), CautiousDecay(), r"has none; give λ to the decay: CautiousDecay\(weight_decay=...\)"),
    (lambda p: NovoGrad(p, lr=LR, weight_decay=0.1), CautiousDecay(), "has its weight decay in the update"),
    (lambda p: AdamW(p, lr=LR), RandomDecay(weight_decay=0.1), r"weight_decay=0.01, and RandomDecay.* brings its own"),
    (NoRate, CautiousDecay(weight_decay=0.1), "has no lr, because NoRate makes its own"),
]  # fmt: skip


@pytest.mark.parametrize("make,decay,says", REFUSED)
def test_a_decay_that_would_be_wrong_is_refused(make: Any, decay: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        made(decay, base=make(parameters()))


def test_a_base_that_begins_to_decay_is_refused_before_anything_moves() -> None:
    opt = made(CautiousDecay(weight_decay=0.1), base=Adam(parameters(), lr=LR))
    train(opt, 0, 1)
    before = values(opt)
    opt.param_groups[0]["weight_decay"] = 0.1
    with pytest.raises(ValueError, match="adds its weight decay to the gradient"):
        train(opt, 1, 2)
    assert all(torch.equal(a, b) for a, b in zip(values(opt), before, strict=True))


def test_groups_without_decay_are_taken() -> None:
    """The usual split: matrices decay, vectors don't."""
    a, b = parameters(2)
    base = AdamW([{"params": [a]}, {"params": [b], "weight_decay": 0.0}], lr=LR, weight_decay=0.1)
    opt = made(CautiousDecay(), MGUP(), base)
    train(opt, 0, 2)


# --- checkpoints ---


@pytest.mark.parametrize("policy", [None, MGUP()], ids=["dense", "mgup"])
@pytest.mark.parametrize("kind", [CautiousDecay, RandomDecay])
@pytest.mark.parametrize("way", ["fused", "delta"])
def test_a_run_resumes_in_the_middle(way: Any, kind: Any, policy: Any) -> None:
    """The checkpoint's hyper-parameters win."""

    def optimizer(decay: Any) -> SelectiveUpdate:
        return made(decay, policy, AdamW(parameters(), lr=LR, weight_decay=0.0), capture=way, seed=3)

    through = optimizer(kind(weight_decay=0.5, strict=True))
    train(through, 0, 3)
    through.decay_groups[0]["weight_decay"] = 0.7
    saved = copy.deepcopy((through.state_dict(), values(through)))
    train(through, 3, 6)
    resumed = optimizer(kind(weight_decay=0.1))
    for p, value in zip(resumed.param_groups[0]["params"], saved[1], strict=True):
        p.data.copy_(value)
    resumed.load_state_dict(saved[0])
    assert resumed.decay_groups[0].decay == kind(weight_decay=0.7, strict=True)
    train(resumed, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(values(through), values(resumed), strict=True))
    for other in (copy.deepcopy(through), pickle.loads(pickle.dumps(through))):
        assert other.decay_groups[0].decay == kind(weight_decay=0.7, strict=True)
        train(other, 6, 7)
    train(through, 6, 7)
    assert all(torch.equal(a, b) for a, b in zip(values(through), values(other), strict=True))


def test_without_a_decay_a_checkpoint_has_its_old_form() -> None:
    opt = made(None, MGUP())
    train(opt, 0, 2)
    assert not any(key == DECAY for entries in opt.state_dict()["state"].values() for key in entries)
    dense = made(None)
    train(dense, 0, 2)
    assert not any(key.startswith(PREFIX) for entries in dense.state_dict()["state"].values() for key in entries)
    decays = made(CautiousDecay(), MGUP())
    train(decays, 0, 2)
    keys = [set(entries) for entries in decays.state_dict()["state"].values()]
    assert keys == [{*entries, DECAY} for entries in opt.state_dict()["state"].values()]


def test_a_checkpoint_without_a_decay_leaves_the_decay_as_it_is() -> None:
    source = made(None, MGUP())
    train(source, 0, 2)
    for saved in (source.state_dict(), source.base.state_dict()):
        opt = made(CautiousDecay(strict=True), MGUP())
        opt.load_state_dict(copy.deepcopy(saved))
        assert opt.decay_groups[0].decay == CautiousDecay(strict=True)
        train(opt, 2, 3)


@pytest.mark.parametrize("here", [None, RandomDecay()])
def test_a_checkpoint_of_another_decay_is_refused_and_nothing_is_loaded(here: Any) -> None:
    source, target = made(CautiousDecay(), MGUP()), made(here, MGUP())
    train(source, 0, 2)
    train(target, 0, 1)
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(
        ValueError, match=r"has decay=.*, the checkpoint was made with CautiousDecay.*nothing was loaded"
    ):
        target.load_state_dict(source.state_dict())
    torch.testing.assert_close(target.state_dict(), before, rtol=0, atol=0)


def test_what_fails_half_way_puts_the_decay_back(monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = made(CautiousDecay(strict=True)), made(CautiousDecay())
    train(source, 0, 2)
    monkeypatch.setattr("selective.checkpoint.load.place_loaded_bases", lambda *arguments: 1 / 0)
    with pytest.raises(ValueError, match="can't be loaded"):
        target.load_state_dict(source.state_dict())
    assert target.decay_groups[0].decay == CautiousDecay()


def test_a_written_state_sets_it() -> None:
    opt = made(CautiousDecay(), MGUP())
    train(opt, 0, 1)
    p = opt.param_groups[0]["params"][0]
    other = made(CautiousDecay(strict=True), MGUP())
    train(other, 0, 1)
    entry = other.state[other.param_groups[0]["params"][0]][DECAY]
    assert DECAY in opt.state[p]
    opt.state[p][DECAY] = entry
    assert opt.decay_groups[0].decay == CautiousDecay(strict=True)
    assert torch.equal(opt.state[p][DECAY], entry)
    wrong = made(RandomDecay(), MGUP())
    train(wrong, 0, 1)
    with pytest.raises(ValueError, match="another kind"):
        opt.state[p][DECAY] = wrong.state[wrong.param_groups[0]["params"][0]][DECAY]


def test_repr_and_explain_say_it() -> None:
    opt = made(CautiousDecay(strict=True), MGUP())
    assert "decay=CautiousDecay(strict=True)" in repr(opt)
    assert "decay     CautiousDecay(strict=True): the parameter × (1 - lr*weight_decay) where" in opt.explain()
    assert "decay=" not in repr(made(None)).replace("weight_decay=", "")
    assert "dense" not in made(CautiousDecay()).explain()


def test_a_captured_graph_of_a_random_decay_is_refused() -> None:
    from selective.step_count import check_recordable

    with pytest.raises(RuntimeError, match="RandomDecay"):
        check_recordable(AdamW(parameters()), [], "ignore", False, False, True)
    check_recordable(AdamW(parameters()), [], "ignore", False, False, False)
