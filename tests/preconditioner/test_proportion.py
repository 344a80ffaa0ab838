"""Sides that are not worth a basis: which they are, the memory that they take, warnings, and runs that have them."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selective import AdaDiag, Cautious, Eigenbasis, SelectiveUpdate, Soap
from selective.preconditioner import LargeSide, Preconditioner

BOTH = ("rows", "columns")
THIN = (4, 96)  # as thin as it needs to be: with averages, the long side keeps 48 times the matrix


@pytest.mark.parametrize(
    ("space", "shape", "rotated"),
    [
        (Soap(), (4096, 4096), BOTH),
        (Soap(), (1024, 4096), BOTH),  # an MLP
        (Soap(), (5632, 2048), BOTH),  # a gated one
        (Soap(), (512, 4096), BOTH),  # keys of 8 heads of 64
        (Soap(), (256, 4096), BOTH),  # keys of 2 heads of 128
        (Soap(), (512, 4608), BOTH),  # a 3 x 3 convolution
        (Soap(), (255, 4096), ("rows",)),
        (Soap(), (8, 4096), ("rows",)),  # an adapter of rank 8
        (Soap(), (4096, 8), ("columns",)),
        (Soap(), (64, 4096), ("rows",)),
        (Soap(), (2, 3000), ("rows",)),
        (Soap(), (1, 3000), ()),
        (Soap(sides="columns"), (8, 4096), ()),
        (Soap(sides="one"), (8, 4096), ("rows",)),
        (AdaDiag(sides="two"), (128, 4096), BOTH),  # which has no averages
        (AdaDiag(sides="two"), (127, 4096), ("rows",)),
        (Soap(max_state_ratio=None), (8, 4096), BOTH),
        (Soap(max_state_ratio=2000), (8, 4096), BOTH),
        (Soap(max_state_ratio=1), (64, 64), ()),
    ],
    ids=repr,
)
def test_which_sides_are_rotated(space: Eigenbasis, shape: tuple[int, int], rotated: tuple[str, ...]) -> None:
    assert space.sides_of((1, *shape)) == space.sides_of((5, *shape)) == rotated  # matrices in a stack are judged alone
    assert space.takes((1, *shape)) is bool(rotated)


@settings(max_examples=50)
@given(
    st.integers(2, 60), st.integers(2, 60), st.sampled_from(["ema", "gradient"]), st.floats(0.5, 40) | st.none()
)  # fmt: skip
def test_what_is_kept_is_within_the_limit_and_the_rest_is_counted(
    rows: int, columns: int, statistic: Any, ratio: float | None
) -> None:
    space, shape = Eigenbasis(statistic=statistic, max_state_ratio=ratio), (1, rows, columns)
    kept = space.init_state(torch.empty(shape))
    whole = space.model_copy(update={"max_state_ratio": None}).init_state(torch.empty(shape))
    sides = space.sides_of(shape)
    assert [name.removesuffix("_basis") for name in kept if name.endswith("_basis")] == list(sides)
    for side in sides:
        elements = sum(value.numel() for name, value in kept.items() if name.startswith(f"{side}_"))
        assert ratio is None or elements <= ratio * rows * columns
    left_out = space.left_out(shape)
    assert {*sides, *(side.side for side in left_out)} == {*BOTH}
    saved = sum(value.nbytes for value in whole.values()) - sum(value.nbytes for value in kept.values())
    noise = 4 * (not sides and statistic == "gradient")  # kept only where there is a basis
    assert sum(side.bytes for side in left_out) == saved - noise
    assert all(side.length == {"rows": rows, "columns": columns}[side.side] for side in left_out)


def made(space: Any, shape: tuple[int, ...] = THIN) -> tuple[torch.nn.Parameter, SelectiveUpdate]:
    p = torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    base = torch.optim.AdamW([("lora_A", p)], lr=1e-2, weight_decay=0.1)
    return p, SelectiveUpdate(base, policy=Cautious(), preconditioner=space)


def as_asked(space: Any, shape: tuple[int, ...] = THIN) -> tuple[torch.nn.Parameter, SelectiveUpdate]:
    """The same with the warning that a limit of the user's gets."""
    with pytest.warns(UserWarning, match="out of proportion"):
        return made(space, shape)


def train(p: torch.nn.Parameter, optimizer: SelectiveUpdate, first: int, last: int) -> None:
    for step in range(first, last):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()


def bytes_of_bases(p: torch.nn.Parameter, optimizer: SelectiveUpdate) -> int:
    return sum(x.nbytes for name, x in optimizer.state[p].items() if name.endswith(("_basis", "_gram")))


def test_memory_of_an_adapter_before_and_after() -> None:
    """Of rank 8 in a model of width 512: 2 MiB for 16 KiB, and half a KiB."""
    before, after = as_asked(Soap(max_state_ratio=None), (8, 512)), made(Soap(), (8, 512))
    for p, optimizer in (before, after):
        train(p, optimizer, 0, 2)
    assert bytes_of_bases(*before) == 4 * 2 * (8**2 + 512**2)
    assert bytes_of_bases(*after) == 4 * 2 * 8**2
    assert Soap().left_out((1, 8, 4096)) == [LargeSide("columns", 4096, 134_217_728, "max_state_ratio=32")]


def test_a_thin_matrix_is_stepped_as_one_whose_short_side_is_asked_for() -> None:
    (p, ours), (q, asked) = made(Soap()), made(Soap(sides="rows"))
    for one in ((p, ours), (q, asked)):
        train(*one, 0, 4)
    assert torch.equal(p, q)


def test_a_matrix_without_a_side_is_stepped_as_without_a_preconditioner() -> None:
    (p, ours), (q, plain) = made(Soap(sides="columns")), made(None)
    for one in ((p, ours), (q, plain)):
        train(*one, 0, 3)
    assert torch.equal(p, q)
    reason = "lora_A: its columns (96) are left out by max_state_ratio=32, which saves 73,728 bytes"
    assert reason in ours.explain()


def test_whoever_insists_is_told_the_bytes() -> None:
    said = (
        r"^SelectiveUpdate: Soap\(max_state_ratio=None\) rotates sides that are out of proportion to their matrices, "
        r"which keeps 73,728 bytes: the columns of 'lora_A' \(96\) keep 73,728 bytes, 48 times its matrix\. The "
        r"default of max_state_ratio leaves them out$"
    )
    with pytest.warns(UserWarning, match=said) as warned:
        p, optimizer = made(Soap(max_state_ratio=None))
    assert [w.filename for w in warned] == [__file__]
    others = [torch.nn.Parameter(torch.ones(shape)) for shape in [(96, 2), (2, 96), (2, 90), (6, 6), (7,)]]
    names = [(f"more.{i}", p) for i, p in enumerate(others)]
    said = r"212,256 bytes: .*'more.0' \(96\).*'more.2' \(90\) keep 64,800 bytes, 90 t"
    with pytest.warns(UserWarning, match=said) as warned:
        optimizer.add_param_group({"params": names, "preconditioner": Eigenbasis(max_state_ratio=500)})
    assert [w.filename for w in warned] == [__file__]
    train(p, optimizer, 0, 2)  # and never again


def test_so_is_who_sets_the_limit_later() -> None:
    p, optimizer = made(Soap())
    optimizer.preconditioner_groups[0]["max_state_ratio"] = None
    with pytest.warns(UserWarning, match=r"rotates sides that are out of proportion .*which keeps 73,728 bytes"):
        train(p, optimizer, 0, 1)
    train(p, optimizer, 1, 3)  # once


def test_a_limit_that_rotates_nothing_more_is_no_matter() -> None:
    made(Soap(max_state_ratio=None), (24, 96))
    made(Soap(max_state_ratio=40))


def test_a_change_in_a_run_is_refused() -> None:
    p, optimizer = made(Soap())
    train(p, optimizer, 0, 2)
    optimizer.preconditioner_groups[0]["max_state_ratio"] = None
    with pytest.raises(ValueError, match=r"Soap\(max_state_ratio=None\) now \(of matrices .*something else would be"):
        train(p, optimizer, 2, 3)


# Runs that go on


def through_a_file(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def text_of(saved: dict[str, Any]) -> str:
    return bytes(saved["state"][0]["selective/preconditioner"].tolist()).decode()


def saved_without_limit(sides: str) -> tuple[torch.nn.Parameter, SelectiveUpdate, Any, torch.Tensor]:
    """A run as it was before there was a limit, what it saved after three steps, and its parameter then."""
    p, before = as_asked(Soap(sides=sides, refresh_every=2, max_state_ratio=None))
    train(p, before, 0, 3)
    saved = through_a_file(before.state_dict())
    assert "max_state_ratio" not in text_of(saved)  # as it was then
    return p, before, saved, p.detach().clone()


@pytest.mark.parametrize("sides", ["two", "columns"])
def test_a_run_from_before_goes_on_bit_for_bit_and_says_so(sides: str) -> None:
    p, before, saved, then = saved_without_limit(sides)
    q, resumed = made(Soap(sides=sides, refresh_every=2))
    with torch.no_grad():
        q.copy_(then)
    with pytest.warns(UserWarning, match="goes on as it was: .* the columns of 'lora_A' .*73,728 bytes.*begins anew"):
        resumed.load_state_dict(copy.deepcopy(saved))
    assert resumed.preconditioner_groups[0]["max_state_ratio"] is None
    again = through_a_file(resumed.state_dict())
    assert text_of(again) == text_of(saved)
    for one in ((p, before), (q, resumed)):
        train(*one, 3, 7)
    assert torch.equal(p, q)


def test_a_run_with_a_limit_goes_on_with_it() -> None:
    p, before = made(Soap(refresh_every=2))
    train(p, before, 0, 3)
    saved, then = through_a_file(before.state_dict()), p.detach().clone()
    assert '"max_state_ratio":32.0' in text_of(saved)
    q, resumed = as_asked(Soap(refresh_every=2, max_state_ratio=None))
    with torch.no_grad():
        q.copy_(then)
    resumed.load_state_dict(saved)
    assert resumed.preconditioner_groups[0].preconditioner == Soap(refresh_every=2)
    for one in ((p, before), (q, resumed)):
        train(*one, 3, 7)
    assert torch.equal(p, q)


def test_without_the_checkpoints_limit_it_would_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, saved, _ = saved_without_limit("two")
    _, resumed = made(Soap(refresh_every=2))
    monkeypatch.setattr(Eigenbasis, "with_limits_of", Preconditioner.with_limits_of)
    with pytest.raises(ValueError, match="of parameter 'lora_A' it has columns_basis"):
        resumed.load_state_dict(saved)


def test_the_field_is_in_json_and_only_a_checkpoint_leaves_it_out() -> None:
    for space in (Soap(), Soap(max_state_ratio=None), AdaDiag(max_state_ratio=5)):
        assert Preconditioner.from_data(space.model_dump_json()) == space
        assert Preconditioner.from_saved(space.to_saved()) == space
    assert Preconditioner.from_data('{"kind": "Soap"}') == Soap()
    assert Preconditioner.from_saved('{"kind": "Soap"}') == Soap(max_state_ratio=None)


# Shards


def test_shards_are_judged_by_the_whole_matrix() -> None:
    whole, kept = (1, 96, 4), frozenset({"columns"})  # cut by rows, whatever is left of them on a rank
    space = Soap().on_shards(whole, kept)
    assert isinstance(space, Soap) and space.sides_of(whole) == ("columns",)  # nothing to gather
    assert "would gather it" in str(Soap(max_state_ratio=None).on_shards(whole, kept))
    unsharded = Eigenbasis(sides="unsharded").on_shards((1, 4, 96), kept)
    assert isinstance(unsharded, Eigenbasis) and not unsharded.takes((1, 4, 96))
