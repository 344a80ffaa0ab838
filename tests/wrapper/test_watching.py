"""`selective.watch`: which steps are sampled, what writers get, and that nobody waits."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from stack_loops import CASES, LR, assert_same, by_hand, net, train, wrap

from selective import MGUP, AlphaConsistency, Cautious, Policy, SelectiveUpdate, watch
from selective.watching import OVERVIEW, Sample, _Copy, tensorboard


class Board:
    """A SummaryWriter, as far as it is needed."""

    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.append((tag, value, step))


def watched(case: str, every: int = 2, steps: int = 7, **options: Any) -> tuple[Any, Any, list[Sample]]:
    model = net()
    optimizer = wrap(model, case)
    samples: list[Sample] = []
    with watch(optimizer, samples.append, every=every, **options):
        train(model, optimizer, range(steps))
    return model, optimizer, samples


def test_every_nth_step_is_handed_out_with_what_statistics_said() -> None:
    model, expected = net(), {}
    optimizer = wrap(model, "mgup-eigenbasis")
    for step in range(7):
        train(model, optimizer, [step])
        expected[step + 1] = copy.deepcopy(optimizer.statistics())
    _, _, samples = watched("mgup-eigenbasis")
    assert [one.step for one in samples] == [2, 4, 6]
    for one in samples:
        assert list(one.values) == list(expected[one.step])
        for who, found in one.values.items():
            assert found.items() >= {name: float(v) for name, v in expected[one.step][who].items()}.items()


@pytest.mark.parametrize("case", [case for case in CASES if case != "dense"])
def test_watching_changes_nothing(case: str) -> None:
    model, optimizer, samples = watched(case, every=1)
    assert len(samples) == 7
    assert_same((model, optimizer), by_hand(case, 7))


def test_names_are_the_models() -> None:
    model = net()
    optimizer = wrap(model, "mgup")
    for given, expected in ((model, ["0.weight", "0.bias", "2.weight", "2.bias"]), (None, list_of_groups())):
        samples: list[Sample] = []
        with watch(optimizer, samples.append, every=1, model=given):
            train(model, optimizer, [0])
        assert list(samples[0].values) == expected


def list_of_groups() -> list[str]:
    return [f"param_groups[0][{number}]" for number in range(4)]


def test_what_is_derived() -> None:
    model = net()
    for policy, caps in ((AlphaConsistency(), True), (Cautious(cap=1.01), True), (MGUP(), False)):
        optimizer = SelectiveUpdate(torch.optim.AdamW(model.parameters(), lr=LR), policy=policy)
        samples: list[Sample] = []
        with watch(optimizer, samples.append, every=1):
            train(model, optimizer, range(4))
        for one in (found for sample in samples for found in sample.values.values()):
            assert one["norm_ratio"] == pytest.approx(one["norm_after"] / one["norm_before"])
            assert ("capped" in one) == caps
            if caps:
                cap = policy.parts()[1].cap  # type: ignore[index]
                assert one["capped"] == (one["strength_selected"] == torch.tensor(cap).item())
        if isinstance(policy, Cautious):
            assert 0 < samples[-1].overview()["capped"] <= 1


def test_the_overview_is_the_mean_over_tensors_that_have_a_number() -> None:
    sample = Sample(5, {"a": {"share": 0.25, "cosine": math.nan}, "b": {"share": 0.75, "cosine": 0.5}, "c": {}})
    assert sample.overview() == {"share": 0.5, "cosine": 0.5}
    assert sample.scalars(each=True).keys() == {"share", "cosine", "share/a", "cosine/a", "share/b", "cosine/b"}
    assert Sample(1, {}).scalars() == {}
    sample = Sample(5, {"a": {"kept": 1.0, "refreshes": 3.0}, "b": {"kept": 2.0, "basis_skipped": 0.0}, "c": {}})
    assert sample.overview() == {"kept": 3.0, "basis_skipped": 0.0}  # sums: what went wrong counts


@pytest.mark.parametrize("each", [False, True])
def test_tensorboard_gets_one_scalar_a_number(each: bool) -> None:
    board, model = Board(), net()
    optimizer = SelectiveUpdate(torch.optim.AdamW(model.parameters(), lr=LR), policy=AlphaConsistency())
    with watch(optimizer, tensorboard(board, each=each), every=2, model=model):
        train(model, optimizer, range(4))
    tags = [tag for tag, _, step in board.scalars if step == 4]
    assert tags[: len(OVERVIEW)] == [f"selective/{name}" for name in OVERVIEW]
    assert ("selective/share/0.weight" in tags) == each
    assert {step for _, _, step in board.scalars} == {2, 4}


def test_a_step_that_was_skipped_or_made_state_is_not_sampled() -> None:
    model = net()
    base = torch.optim.AdamW(model.parameters(), lr=0.0)
    optimizer = SelectiveUpdate(base, policy=MGUP(), on_nonfinite="skip")
    samples: list[Sample] = []
    with watch(optimizer, samples.append, every=1):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()  # as torch.distributed.checkpoint makes state
        base.param_groups[0]["lr"] = LR
        train(model, optimizer, [0])
        for p in model.parameters():
            p.grad = torch.full_like(p, math.nan)
        optimizer.step()
        optimizer.zero_grad()
        train(model, optimizer, [1])
    assert [one.step for one in samples] == [1, 2]


def test_steps_go_on_counting_after_a_resume_and_end_with_close() -> None:
    model, optimizer, _ = watched("mgup", steps=5)
    saved = copy.deepcopy(optimizer.state_dict())
    resumed = wrap(model, "mgup")
    samples: list[Sample] = []
    watching = watch(resumed, samples.append, every=3)
    resumed.load_state_dict(saved)
    train(model, resumed, range(5, 10))
    watching.close()
    train(model, resumed, range(10, 13))
    assert [one.step for one in samples] == [6, 9]


def test_samples_that_are_on_their_way_come_later_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    arrived: set[int] = set()
    monkeypatch.setattr(_Copy, "is_done", lambda self: self.step in arrived)
    model = net()
    optimizer = wrap(model, "mgup")
    samples: list[Sample] = []
    watching = watch(optimizer, samples.append, every=1)
    train(model, optimizer, range(3))
    assert samples == []
    arrived |= {2}  # the first is not there yet
    train(model, optimizer, [3])
    assert samples == []
    arrived |= {1}
    train(model, optimizer, [4])
    assert [one.step for one in samples] == [1, 2]
    watching.flush()
    assert [one.step for one in samples] == [1, 2, 3, 4, 5]
    monkeypatch.undo()
    assert samples == watched("mgup", every=1, steps=5)[2]


def test_a_policy_of_ones_own_and_dense_groups() -> None:
    class Halves(Policy):
        kind = "watched-halves"

        def mask(self, view: Any) -> Any:
            return torch.where(view.update > 0, 1.0, 0.5)

    model = net()
    groups = [{"params": [model[0].weight]}, {"params": [model[2].weight], "policy": None}]
    optimizer = SelectiveUpdate(torch.optim.AdamW(groups, lr=LR), policy=Halves())
    samples: list[Sample] = []
    with watch(optimizer, samples.append, every=1, model=model):
        train(model, optimizer, [0])
    (values,) = (one.values for one in samples)
    assert list(values) == ["0.weight"]
    assert "capped" not in values["0.weight"]


def test_what_cannot_be_watched_is_refused_with_the_reason() -> None:
    params = list(net().parameters())
    quiet = SelectiveUpdate(torch.optim.AdamW(params), policy=MGUP(), statistics=False)
    loud = SelectiveUpdate(torch.optim.AdamW(params), policy=MGUP())
    for arguments, error, words in (
        ((quiet, print), ValueError, "statistics=True"),
        ((loud,), ValueError, "no writer"),
        ((loud, 3), ValueError, "3 is no writer.*every="),
        ((torch.optim.AdamW(params), print), TypeError, "no SelectiveUpdate in AdamW"),
    ):
        with pytest.raises(error, match=words):
            watch(*arguments)
    for every in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="every is"):
            watch(loud, print, every=every)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("policy", [MGUP(), AlphaConsistency()], ids=repr)
def test_watching_waits_for_no_gpu(policy: Policy) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)).cuda()
    optimizer = SelectiveUpdate(torch.optim.AdamW(model.parameters(), lr=LR), policy=policy)
    samples: list[Sample] = []
    grads = [torch.randn_like(p) for p in model.parameters()]
    for p, grad in zip(model.parameters(), grads, strict=True):
        p.grad = grad
    watching = watch(optimizer, samples.append, every=1)
    optimizer.step()  # makes state and tables
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            optimizer.step()
        with pytest.raises(RuntimeError, match="synchroniz"):
            grads[0].sum().item()  # the guard is on
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    watching.close()
    assert [one.step for one in samples] == [1, 2, 3, 4, 5, 6]
    assert all(0 < one["share"] <= 1 for sample in samples for one in sample.values.values())
