"""A chain's step: all members or none, one closure, draws of its own for each member, shared kernel calls."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from chains import equal, give_gradients, muon_and_adamw, net, parts_of, train, two_adamw, values
from torch import Tensor, nn
from torch.optim import AdamW, Muon

from selective import MGUP, ChainedOptimizer, Policy, PolicyError, RandomMask, SelectiveUpdate, Soap
from selective.capture import kernel_calls


def test_members_step_as_they_do_apart() -> None:
    """Muon, a wrapped AdamW, a rotated one and a bare one: each moves its parameters as it does without the others."""

    def members(model: nn.Module) -> list[Any]:
        first, *rest = parts_of(model)[0]
        vectors = parts_of(model)[1]
        return [
            SelectiveUpdate(Muon([first], lr=0.02), policy="MGUP"),
            SelectiveUpdate(AdamW(rest, lr=0.01), policy="Cautious", preconditioner=Soap(refresh_every=2)),
            SelectiveUpdate(AdamW(vectors[:1], lr=0.01), policy="Grams"),
            AdamW(vectors[1:], lr=0.01),
        ]

    model, alone = net(), net()
    opt, apart = ChainedOptimizer(members(model)), members(alone)
    for step in range(5):
        give_gradients(model, step)
        give_gradients(alone, step)
        opt.step()
        for one in apart:
            one.step()
        assert equal(values(model), values(alone)), step


def test_the_closure_runs_once_before_anything_moves() -> None:
    model, by_hand = net(), net()
    opt, other = muon_and_adamw(model), muon_and_adamw(by_hand)
    x, calls = torch.ones(3, 6), []

    def loss_of(net: nn.Module) -> Tensor:
        return net(x).square().sum()

    def closure() -> Tensor:
        calls.append(equal(values(model), values(by_hand)))
        opt.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    for _ in range(3):
        with torch.no_grad():
            returned = opt.step(closure)
        other.zero_grad()
        expected = loss_of(by_hand)
        expected.backward()
        other.step()
        assert torch.equal(returned, expected)
    assert calls == [True] * 3 and equal(values(model), values(by_hand))


def state_of(opt: ChainedOptimizer) -> list[Tensor]:
    return [v.clone() for entries in opt.state.values() for v in entries.values() if isinstance(v, Tensor)]


@pytest.mark.parametrize("which", [0, 1, 2, 3], ids=["first", "of the bare one", "second", "of the one that ignores"])
def test_a_gradient_that_is_not_finite_skips_all_members(which: int) -> None:
    model = net()
    matrices, rest = parts_of(model)
    opt = ChainedOptimizer(
        [
            *(SelectiveUpdate(AdamW([p], lr=0.01), policy="MGUP", on_nonfinite="skip") for p in matrices),
            AdamW(rest[:1], lr=0.01),
            SelectiveUpdate(AdamW(rest[1:], lr=0.01), policy="MGUP"),
        ]
    )
    train(model, opt, range(2))
    params, state = values(model), state_of(opt)
    give_gradients(model, 2)
    gradient = list(model.parameters())[which].grad
    assert gradient is not None
    gradient.view(-1)[0] = float("nan")
    opt.step()
    assert equal(values(model), params) and equal(state_of(opt), state)
    train(model, opt, [3])
    assert not any(torch.equal(p, q) for p, q in zip(values(model), params, strict=True))


@pytest.mark.parametrize(
    ("which", "name"),
    [(0, r"'param_groups\[0\]\[0\]'"), (1, r"'0/param_groups\[0\]\[0\]'")],
    ids=["its own", "of another"],
)
def test_a_member_that_raises_names_the_parameter(which: int, name: str) -> None:
    model = net()
    matrices, rest = parts_of(model)
    raises = SelectiveUpdate(AdamW(matrices, lr=0.01), policy="MGUP", on_nonfinite="raise")
    opt = ChainedOptimizer([AdamW(rest, lr=0.01), raises])
    before = values(model)
    give_gradients(model, 0)
    gradient = list(model.parameters())[which].grad
    assert gradient is not None
    gradient.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match=name):
        opt.step()
    assert equal(values(model), before)


def test_without_a_member_that_asks_nobody_looks() -> None:
    model = net()
    opt = muon_and_adamw(model)
    give_gradients(model, 0)
    list(model.parameters())[1].grad[0] = float("nan")  # type: ignore[index]
    opt.step()
    moved = [p.isnan().any() for p in model.parameters()]
    assert moved == [False, True, False, False]


def test_a_scaler_that_finds_an_overflow_skips_all_members() -> None:
    model, plain = net(), net()
    opt, other = muon_and_adamw(model), muon_and_adamw(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for step in range(4):
        give_gradients(model, step)
        for p in model.parameters():
            assert p.grad is not None
            p.grad.mul_(scaler.get_scale())
        if step == 2:
            list(model.parameters())[1].grad[0] = float("inf")
        else:
            train(plain, other, [step])
        scaler.scale(torch.ones(()))  # a scaler that has scaled nothing refuses to unscale
        scaler.step(opt)
        scaler.update()
        assert equal(values(model), values(plain)), step
    assert scaler.get_scale() == 128.0


class FailsInAChain(Policy):
    def mask(self, view: Any) -> Tensor:
        raise ZeroDivisionError("not this one")


def test_nobody_has_moved_where_a_policy_raises() -> None:
    model = net()
    matrices, rest = parts_of(model)
    opt = ChainedOptimizer(
        [
            AdamW(rest[:1], lr=0.01),
            SelectiveUpdate(AdamW(matrices, lr=0.01), policy="MGUP"),
            SelectiveUpdate(AdamW(rest[1:], lr=0.01), policy=FailsInAChain()),
        ]
    )
    before = values(model)
    with pytest.raises(PolicyError, match=r"FailsInAChain failed in step 0.*not this one"):
        train(model, opt, [0])
    assert equal(values(model), before)
    opt.members[2].policy_groups[0].policy = MGUP()  # type: ignore[union-attr]
    train(model, opt, [1])
    assert not any(torch.equal(p, q) for p, q in zip(values(model), before, strict=True))


def moved(members: Callable[[list[nn.Parameter]], list[Any]], steps: int = 1) -> list[Tensor]:
    """The places at which two equal vectors with equal gradients are changed, each a member of its own."""
    vectors = [nn.Parameter(torch.zeros(64)) for _ in range(2)]
    opt = ChainedOptimizer(members(vectors))
    for _ in range(steps):
        for p in vectors:
            p.grad = torch.ones(64)
        opt.step()
    return [p.detach() != 0 for p in vectors]


def test_random_policies_of_equal_seeds_draw_apart() -> None:
    def coins(vectors: list[nn.Parameter]) -> list[Any]:
        return [SelectiveUpdate(AdamW([p], lr=0.01), policy=RandomMask(), seed=5) for p in vectors]

    first, second = moved(coins)
    assert first.any() and not torch.equal(first, second)
    whole = nn.Parameter(torch.zeros(64)), nn.Parameter(torch.zeros(64))
    together = SelectiveUpdate(AdamW(whole, lr=0.01), policy=RandomMask(), seed=5)  # what one optimizer draws
    for p in whole:
        p.grad = torch.ones(64)
    together.step()
    assert equal([first, second], [p.detach() != 0 for p in whole])

    def after_a_bare_one(vectors: list[nn.Parameter]) -> list[Any]:
        return [AdamW(vectors[:1]), *coins(vectors[1:])]

    assert torch.equal(moved(after_a_bare_one)[1], second)


def test_draws_are_the_same_after_a_resume() -> None:
    model = net()
    opt = two_adamw(model, policy="RandomMask", seed=5)
    train(model, opt, range(2))
    resumed_model = copy.deepcopy(model)
    resumed = two_adamw(resumed_model, policy="RandomMask", seed=6)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    for one, its in ((model, opt), (resumed_model, resumed)):
        train(one, its, range(2, 5))
    assert equal(values(model), values(resumed_model))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The numbers of tensors that are handed to the kernels together."""
    seen: list[list[int]] = []
    real = kernel_calls.selective_steps

    def counted(calls: Any) -> Any:
        seen.append([len(call.items) for call in calls])
        return real(calls)

    monkeypatch.setattr(kernel_calls, "selective_steps", counted)
    return seen


@pytest.mark.parametrize("policy", ["MGUP", "RandomMask", "Grams"])
def test_members_hand_their_tensors_in_together(policy: str, calls: list[list[int]]) -> None:
    model, alone = net(), net()
    opt, apart = two_adamw(model, policy), two_adamw(alone, policy)
    for step, rate in enumerate([0.01, 0.02, 0.01]):
        for chain in (opt, apart):
            chain.members[1].param_groups[0]["lr"] = rate
        train(model, opt, [step])
        give_gradients(alone, step)
        for one in apart.members:
            one.step()
        assert equal(values(model), values(alone))
    assert calls == [[2, 2], [2], [2]] * 3
    report = [one.statistics() for one in apart.members]
    for name, numbers in opt.statistics().items():
        member, _, inner = name.partition("/")
        assert equal(numbers.values(), report[int(member)][inner].values())


def test_policies_of_two_kinds_are_handed_in_together(calls: list[list[int]]) -> None:
    model, alone = net(), net()
    chains = []
    for one in (model, alone):
        matrices, rest = parts_of(one)
        members = [SelectiveUpdate(AdamW(matrices), "MGUP"), SelectiveUpdate(AdamW(rest), "Cautious")]
        chains.append(ChainedOptimizer(members))
    train(model, chains[0], [0])
    assert calls == [[2, 2]]
    give_gradients(alone, 0)
    for one in chains[1].members:
        one.step()
    assert equal(values(model), values(alone))


def test_a_call_that_fails_moves_nothing_and_lets_gradients_go(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    opt = two_adamw(model)
    train(model, opt, [0])
    before = values(model)
    refused = ValueError("refused")

    def fails(calls: Any) -> Any:
        raise refused

    monkeypatch.setattr(kernel_calls, "selective_steps", fails)
    give_gradients(model, 1)
    with pytest.raises(ValueError, match="refused"):
        opt.step()
    assert equal(values(model), before)
    kept = [items for one in opt.members for plan in one.groups.plans for items in plan.kept._lists]
    assert kept and all(item.grad is None for items in kept for item in items.items)


def test_gradients_are_let_go_after_the_step() -> None:
    model = net()
    opt = two_adamw(model)
    train(model, opt, range(2))
    kept = [items for one in opt.members for plan in one.groups.plans for items in plan.kept._lists]
    assert kept and all(item.grad is None for items in kept for item in items.items)


class Doubles(SelectiveUpdate):
    """A subclass whose step is its own: it is called as it is."""

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(2)


def test_a_subclass_with_a_step_of_its_own_takes_it() -> None:
    model = net()
    matrices, rest = parts_of(model)
    before = values(model)
    opt = ChainedOptimizer([Doubles(AdamW(matrices)), SelectiveUpdate(AdamW(rest), "MGUP")])
    train(model, opt, [0])
    for p, was in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, was * 2) == (p.ndim == 2)
