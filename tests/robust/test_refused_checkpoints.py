"""Checkpoints that are not whole or not ours: refused with the reason, never half-loaded, and the run goes on."""

from __future__ import annotations

import copy
import io
import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from tampered import copied, spoilt_entries, spoilt_frames
from whole_bytes import difference, everything, model_bytes, through_a_file

from selective import MGUP, AdaDiag, Dense, Eigenbasis, Magma, Preconditioner, RandomMask, SelectiveUpdate, Soap

SHAPES = ((4, 3), (5,), (3, 4))
SETTINGS: dict[str, dict[str, Any]] = {
    "magma-eigenbasis": {"policy": Magma(), "preconditioner": Eigenbasis(refresh_every=2)},
    "dense-adadiag": {"policy": Dense(), "preconditioner": AdaDiag(refresh_every=2)},
    "mgup-own-momentum": {"policy": MGUP(), "momentum_beta": 0.9},
}


def make(base: Any = torch.optim.AdamW, shapes: Any = SHAPES, groups: int = 2, **options: Any) -> SelectiveUpdate:
    params = [
        torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(i)))
        for i, shape in enumerate(shapes)
    ]
    layout = [{"params": params[:2]}, {"params": params[2:]}] if groups == 2 else [{"params": params}]
    return SelectiveUpdate(base(layout, lr=0.1), **options)


def train(optimizer: SelectiveUpdate, first: int, last: int) -> SelectiveUpdate:
    for step in range(first, last):
        for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
        optimizer.step()
    return optimizer


def saved(**options: Any) -> dict[str, Any]:
    return through_a_file(train(make(seed=5, **options), 0, 3).state_dict())


def outcome(target: SelectiveUpdate, broken: Any) -> str:
    """Load it: "refused", with nothing moved and a reason of ours, or "loaded", and then training and saving work."""
    before, reason = everything(target), None
    try:
        target.load_state_dict(broken)
    except ValueError as error:
        reason = str(error)
    if reason is not None:
        assert reason.startswith("SelectiveUpdate: "), reason
        assert "othing was loaded" in reason or "construct the optimizer" in reason, reason
        assert difference(before, everything(target)) is None, "half-loaded"
        return "refused"
    train(target, 3, 5).state_dict()
    return "loaded"


# Spoilt, and yet nothing that we could know: another number in the right place, or another type of the same one.
HARMLESS = (
    "int64", "float64", "bfloat16", "uint8", "no dimension", "one dimension more", "boolean", "number",
    "largest", "negative", "minus one", "huge", "zero", "infinite", "random bytes",
)  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow, id="all"), pytest.param(5, id="a fifth")])
def test_every_entry_of_ours_spoilt_in_every_way(setting: str, every: int) -> None:
    """The fifth has each entry and, because 5 is no divisor of the number of ways, nearly each way."""
    options = SETTINGS[setting]
    state = saved(**options)
    counts: Counter[str] = Counter()
    target = train(make(**options), 10, 12)
    for name, broken in itertools.islice(spoilt_entries(state), 0, None, every):
        found = outcome(target, broken)
        counts[found] += 1
        if found == "loaded":
            assert any(word in name for word in HARMLESS), name
            target = train(make(**options), 10, 12)
    assert counts["refused"] > 100 / every, counts
    assert counts["loaded"] > 30 / every, counts
    twin = train(make(**options), 10, 12)
    assert model_bytes(train(target, 20, 24)) == model_bytes(train(twin, 20, 24))  # as if nothing had happened


@pytest.mark.parametrize("setting", SETTINGS)
def test_everything_around_the_entries_spoilt(setting: str) -> None:
    options = SETTINGS[setting]
    target = train(make(**options), 10, 12)
    for name, broken in spoilt_frames(saved(**options)):
        found = outcome(target, broken)
        # torch's optimizers add flags that older checkpoints of theirs did not have
        flag = name.endswith("gone from a group") and name.split()[0] not in ("lr", "betas", "eps", "weight_decay")
        assert (found == "loaded") <= flag, name
        if found == "loaded":
            target = train(make(**options), 10, 12)
    twin = train(make(**options), 10, 12)
    assert model_bytes(train(target, 20, 24)) == model_bytes(train(twin, 20, 24))


@pytest.mark.parametrize(
    ("theirs", "ours", "says"),
    [
        ({"base": torch.optim.NAdam}, {}, "not of AdamW"),
        ({}, {"base": torch.optim.NAdam}, "not of NAdam: it was made with torch.AdamW"),
        ({"base": torch.optim.RMSprop, "policy": Dense()}, {"base": torch.optim.Adagrad, "policy": Dense()}, "Adagrad"),
        ({"shapes": ((3, 4), (5,), (4, 3))}, {}, r"has shape \(3, 4\), the parameter \(4, 3\)"),
        ({"shapes": (*SHAPES, (3,))}, {}, "has 2 parameters in the checkpoint, 1 in"),
        ({"groups": 1}, {}, "has 1 parameter groups, the optimizer 2"),
        ({"policy": RandomMask()}, {}, "the checkpoint was made with RandomMask"),
        ({"preconditioner": Soap()}, {"preconditioner": Eigenbasis()}, "Soap is another kind than Eigenbasis"),
        ({"preconditioner": Soap()}, {}, "has the preconditioner None"),
        ({"momentum_beta": 0.9}, {}, "was made with momentum_beta"),
        ({}, {"momentum_beta": 0.9}, "was not made with momentum_beta"),
    ],
)
def test_foreign_checkpoints(theirs: Any, ours: Any, says: str) -> None:
    theirs, ours = {"policy": MGUP(), **theirs}, {"policy": MGUP(), **ours}
    state = saved(**theirs)
    target = train(make(**ours), 10, 12)
    with pytest.raises(ValueError, match=f"(?s){says}"):
        copy.deepcopy(target).load_state_dict(copied(state))
    assert outcome(target, state) == "refused"
    assert model_bytes(train(target, 12, 14)) == model_bytes(train(make(**ours), 10, 14))


def test_a_file_that_was_cut_off_reaches_nobody() -> None:
    buffer = io.BytesIO()
    torch.save(train(make(policy=Magma()), 0, 2).state_dict(), buffer)
    whole = buffer.getvalue()
    for length in range(0, len(whole), 97):
        # torch's own, of several kinds, before there is anything that could be loaded
        with pytest.raises((RuntimeError, EOFError, ValueError, OSError)):
            torch.load(io.BytesIO(whole[:length]), weights_only=True)
    torch.load(io.BytesIO(whole), weights_only=True)


class FailsWhenEntered(Preconditioner):
    """Raises when a moment is taken into its basis: in the middle of a load, after the base has loaded."""

    def project_in(self, states, xs):
        if xs[0].abs().max() > 100:
            raise RuntimeError("too large for me")
        return [x.clone() for x in xs]

    project_out = project_in


class Hesitant(torch.optim.SGD):
    """A base that finds out half-way that it does not want a checkpoint, when it has written into its dictionaries."""

    def load_state_dict(self, state_dict: Any) -> None:
        for entry in self.state.values():
            entry.clear()
        self.param_groups[0]["lr"] = 3.0
        super().load_state_dict(state_dict)
        raise KeyError("momentum_buffer")


def test_what_fails_half_way_is_put_back() -> None:
    plain = saved(policy=MGUP())
    for entries in plain["state"].values():
        entries["exp_avg"] *= 1e6
    with_rotation = {"policy": MGUP(), "preconditioner": FailsWhenEntered()}
    target = train(make(**with_rotation), 10, 12)
    with pytest.raises(ValueError, match=r"too large for me.*nothing was loaded"):
        copy.deepcopy(target).load_state_dict(copied(plain))
    assert outcome(target, plain) == "refused"
    assert model_bytes(train(target, 12, 14)) == model_bytes(train(make(**with_rotation), 10, 14))

    def hesitant(params: Any, lr: float) -> Hesitant:
        return Hesitant(params, lr=lr, momentum=0.9)

    target = train(make(hesitant, policy=MGUP()), 10, 12)
    with pytest.raises(ValueError, match=r"KeyError: 'momentum_buffer'.*nothing was loaded"):
        target.load_state_dict(copied(train(make(hesitant, policy=MGUP()), 0, 2).state_dict()))
    assert model_bytes(train(target, 12, 14)) == model_bytes(train(make(hesitant, policy=MGUP()), 10, 14))


def test_a_load_that_stays_half_done_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: without putting back, the comparison above finds what the base has loaded already."""
    from contextlib import nullcontext

    plain = saved(policy=MGUP())
    for entries in plain["state"].values():
        entries["exp_avg"] *= 1e6
    target = train(make(policy=MGUP(), preconditioner=FailsWhenEntered()), 10, 12)
    monkeypatch.setattr("selective.checkpoint.load.rollback", lambda *ignored: nullcontext())
    before = everything(target)
    with pytest.raises(RuntimeError, match=r"too large"):
        target.load_state_dict(plain)
    assert difference(before, everything(target)) is not None
