"""The matched random control in the CPU kernels: the definition's choice bit for bit, its weights to rounding."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy
import pytest
import torch
from torch import Tensor

from selective.kernels import (
    AdamRule,
    Control,
    Decay,
    Draw,
    GivenRule,
    Item,
    Selection,
    SGDRule,
    Shard,
    Strength,
    begin_sharded,
    selective_step,
    uniform_bits,
)
from selective.kernels.cpu import control as cpu_control
from selective.kernels.cpu import draw as cpu_draw
from selective.kernels.cpu import random as numbers
from selective.kernels.cpu.chunks import CHUNK, sum_of_squares
from selective.kernels.reference.control import matched, random_subset
from selective.kernels.reference.random import ranking_bits

EPS = torch.finfo(torch.float32).eps
ADAM = AdamRule(1e-2, 0.9, 0.99, 1e-8, weight_decay=0.1)
SELECTIONS = [
    Selection("everything"),
    Selection("agreement"),
    Selection("agreement", product="previous_momentum"),
    Selection("agreement", strict=False),
    Selection("top_k", fraction=0.3),
    Selection("top_k", score="nesterov"),
    Selection("top_k", quantile="sampled", fraction=0.7),
    Selection("bernoulli", probability=0.3),
    Selection("bernoulli", unit="row"),
]
STRENGTHS = [
    Strength("fixed", 2.0, 0.5),
    Strength("fixed", 1.0, -1.0, still=True),
    Strength("mean_preserving", cap=10.0),
    Strength("mean_preserving", estimate="sampled"),
    Strength("norm_preserving", rest=0.25),
    Strength("norm_preserving", of="momentum"),
    Strength("alignment", rest=0.5),
]
CASES = list(itertools.product(SELECTIONS, STRENGTHS))


def counted(function, name, calls):
    """`function`, which notes `name` in `calls` each time."""

    def noted(*arguments):
        calls.append(name)
        return function(*arguments)

    return noted


@pytest.fixture
def brackets(monkeypatch):
    """Tensors of any size are drawn from by a bracket; counts those that are ranked as a whole all the same."""
    monkeypatch.setattr(cpu_draw, "SMALL", 0)
    whole: list[int] = []
    ranked = cpu_draw._as_a_whole

    def noted(source, target, marks):
        whole.append(target.numel)
        return ranked(source, target, marks)

    monkeypatch.setattr(cpu_draw, "_as_a_whole", noted)
    return whole


@pytest.mark.parametrize("start", [0, 5, 65_530, 2**31 - 10, 2**32 - 70_000, 7 * 2**32 + 65_535])
def test_the_short_hash_is_the_definitions(start: int) -> None:
    for draw, address in ((Draw(0, 0), 0), (Draw(17, 5), 9), (Draw(-3, 2**40), 7)):
        for count in (70_001, 200_001):  # of the second, several blocks are whole
            wanted = uniform_bits(draw, address, count, offset=start)
            assert torch.equal(numbers.finish_(numbers.unfinished(draw, address, start, count).clone()), wanted)


@pytest.mark.parametrize("draw", [Draw(0, 0), Draw(2**63 + 5, 10**9), Draw(-1, 1)])
def test_ranking_numbers_are_the_documented_ones(draw: Draw, transcription) -> None:
    some = [*range(9), 262_143, 262_144, 299_999]
    wanted = [transcription.ranking_bits(draw.seed, draw.step, 9, index) for index in some]
    assert ranking_bits(draw, 9, 300_000)[some].tolist() == wanted


def ranking(draw: Draw, *parts: numbers.Part) -> numbers.Ranking:
    return numbers.Ranking(draw, parts, numbers.owners_of(parts))


@pytest.mark.parametrize("start", [0, 65, 256, 2**16])
def test_ranking_numbers_of_rows_are_the_definitions(start: int) -> None:
    """Of one tensor alone, and of several that are side by side. `start` is a row."""
    draw, row = Draw(17, 5), numbers.ROW
    parts = [(9, start * row, 70), (2**40, 0, 1), (3, 0, 300), (9, start * row, 1)]
    defined = [ranking_bits(draw, address, first + rows * row)[first:] for address, first, rows in parts[:3]]
    defined.append(defined[0][:row])
    for some in (parts[:1], parts[1:2], parts):
        numbers_of = [defined[parts.index(part)] for part in some]
        index = torch.cat([first + torch.arange(rows * row) for _, first, rows in some])
        wanted, chunk = torch.cat(numbers_of), ranking(draw, *some)
        assert torch.equal(chunk.upper.to(torch.int32), wanted >> 16)
        assert torch.equal(numbers.ranking_at(chunk.hashes_at(torch.arange(len(index))), index), wanted)


def test_ranking_numbers_past_two_to_the_34(transcription) -> None:
    """Groups past 2^32 have other keys."""
    draw, row = Draw(3, 1), numbers.ROW
    start = numbers.SAME_KEYS - row
    chunk = ranking(draw, (9, start, 1), (9, start + row, 1))
    places = torch.arange(row - 8, row + 8)
    ours = numbers.ranking_at(chunk.hashes_at(places), places + start)
    assert torch.equal(ours >> 16, chunk.upper[row - 8 : row + 8].to(torch.int32))
    groups = [transcription.hash32(draw.seed, draw.step, 9, (start + int(i)) // 4) for i in places]
    assert (ours >> 16).tolist() == [h >> 8 * (i % 4) & 255 for i, h in enumerate(groups)]


def test_a_piece_ends_where_the_keys_change(monkeypatch) -> None:
    monkeypatch.setattr(cpu_draw, "SAME_KEYS", 8_192)
    targets = [cpu_draw.Target(0, 1_000, 0, 1, 1_000, None), cpu_draw.Target(1, 20_000, 1_024, 1, 20_000, None)]
    parts = [(target.address, a, b) for piece in cpu_draw._pieces(targets, 1 << 22) for target, a, b in piece]
    assert parts == [(0, 0, 1_000), (1, 0, 8_192), (1, 8_192, 16_384), (1, 16_384, 20_000)]


def test_ranking_numbers_are_good_ones() -> None:
    """Bytes, neighbours and the two parts of a number: five standard deviations each."""
    count = 1 << 18
    for address in range(4):
        bits = ranking_bits(Draw(7, 1), address, count)
        for shift in (0, 8, 16):
            counts = torch.bincount((bits >> shift) & 255, minlength=256).double()
            chi = ((counts - count / 256) ** 2 / (count / 256)).sum()
            assert abs(chi - 255) < 5 * (2 * 255) ** 0.5
        upper, lower = (bits >> 16).double() - 127.5, (bits & 0xFFFF).double() - 32_767.5
        whole = bits.double() - (2**24 - 1) / 2
        pairs = [(upper, lower), *((whole[:-lag], whole[lag:]) for lag in (1, 2, 3, 4, 5, 8, 64, 1024))]
        pairs += [(whole[i::4], whole[j::4]) for i in range(4) for j in range(i)]
        for x, y in pairs:
            assert abs((x * y).mean() / (x.std() * y.std())) < 5 / len(x) ** 0.5


def both(item: Item, copy, rule, selection: Selection, strength: Strength):
    other = copy(item)
    kw = {"rule": rule, "selection": selection, "strength": strength, "draw": Draw(3, 4), "statistics": True}
    (ours,) = selective_step([item], backend="cpu", **kw)
    (wanted,) = selective_step([other], backend="reference", **kw)
    return other, ours, wanted


def assert_same(item: Item, copy, rule, selection: Selection, strength: Strength) -> None:
    other, ours, wanted = both(item, copy, rule, selection, strength)
    assert float(ours.selected) == float(wanted.selected)
    # Sums of float32 products chunk by chunk: a relative error of 1e-6 each, see `Totals`; a root of a quotient of two
    torch.testing.assert_close(ours.strength_selected, wanted.strength_selected, rtol=3e-6, atol=1e-12)
    torch.testing.assert_close(ours.masked_sq, wanted.masked_sq, rtol=6e-6, atol=1e-12)
    torch.testing.assert_close(ours.update_sq, wanted.update_sq, rtol=3e-6, atol=1e-12)
    # 8 eps of numbers of this size for each path's own arithmetic, and the 3e-6 of the scale on updates below 0.2
    scale = torch.maximum(item.param.abs(), other.param.abs()) + 0.1
    assert bool(((item.param - other.param).abs() <= 8 * EPS * scale + 6e-7).all())


@pytest.mark.parametrize("control", [Control(), Control(norm=False)], ids=["norm", "no-norm"])
@pytest.mark.parametrize("shape", [(), (1,), (63,), (9, 23)])
def test_every_selection_and_strength_as_the_definition(shape, control, make, copy, small_chunks, brackets) -> None:
    for selection, strength in CASES:
        for rule in (ADAM, SGDRule(0.1, 0.9)):
            item = make(rule, shape, seed=3)
            item.grad.view(-1)[::5] = 0.0  # some stand still
            assert_same(item, copy, rule, replace(selection, control=control), strength)


def test_small_tensors_that_are_ranked_in_order_too(make, copy) -> None:
    for strength, norm, shape in itertools.product(STRENGTHS[:3], (True, False), [(63,), (9, 23), (2_048,)]):
        item = make(ADAM, shape, seed=6)
        item.grad.view(-1)[::5] = 0.0
        assert_same(item, copy, ADAM, Selection("top_k", fraction=0.9, control=Control(norm=norm)), strength)


@pytest.mark.parametrize(
    ("rule", "decay"),
    [
        (GivenRule(), None),
        (GivenRule(), Decay("cautious")),
        (GivenRule(negated=True), None),
        (GivenRule(negated=True), Decay("cautious")),
        (GivenRule(negated=True, offset=1.0), None),
    ],
)
def test_updates_that_are_read_after_the_draw(rule, decay, make, copy, small_chunks) -> None:
    """The mask is multiplied into the update only where nothing reads it again, and never into that of a capture."""
    item = make(rule, (40, 60), seed=2)
    other, update = copy(item), item.state["update"].clone()
    kw = {"rule": replace(rule, factor=0.9), "strength": STRENGTHS[0], "draw": Draw(3, 4), "decay": decay}
    selection = Selection("agreement", control=Control())
    selective_step([item], selection=selection, backend="cpu", **kw)
    selective_step([other], selection=selection, backend="reference", **kw)
    torch.testing.assert_close(item.param, other.param, rtol=3e-6, atol=1e-6)  # see `assert_same`
    assert torch.equal(item.state["update"], update)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_and_more_than_one_chunk(dtype, make, copy) -> None:
    for selection, strength in (
        (SELECTIONS[1], STRENGTHS[0]),
        (SELECTIONS[1], STRENGTHS[1]),
        (SELECTIONS[4], STRENGTHS[2]),
    ):
        item = make(ADAM, (2, 70_001), dtype=dtype, seed=4)
        other, ours, wanted = both(item, copy, ADAM, replace(selection, control=Control()), strength)
        assert float(ours.selected) == float(wanted.selected)
        rtol, atol = {torch.float64: (1e-9, 1e-9), torch.bfloat16: (2**-7, 1e-6)}[dtype]  # one neighbour in bfloat16
        torch.testing.assert_close(item.param, other.param, rtol=rtol, atol=atol)


def chosen_by_cpu(numel: int, count: int, draw: Draw, address: int) -> Tensor:
    """The elements of a tensor that the control of `count` of them moves."""
    item = Item(torch.zeros(numel), torch.ones(numel), {}, address)
    selection = Selection("top_k", fraction=min((count + 0.5) / numel, 1.0), control=Control(norm=False))
    selective_step(
        [item], rule=SGDRule(1.0), selection=selection, strength=Strength("fixed", 1.0, 0.0), draw=draw, backend="cpu"
    )
    return item.param != 0


@pytest.mark.parametrize("numel", [100, 5_000, 200_000])
def test_the_choice_is_the_definitions_bit_for_bit(numel: int) -> None:
    for count in {1, numel // 50, numel // 3, numel - 1, numel}:
        some = torch.zeros(numel, dtype=torch.bool)
        some[:count] = True
        assert torch.equal(chosen_by_cpu(numel, count, Draw(1, 7), 4), random_subset(some, None, Draw(1, 7), 4))


def assert_the_definitions_choice(numel: int) -> None:
    for count in (1, numel // 50, numel // 3, numel - 1):
        some = torch.zeros(numel, dtype=torch.bool)
        some[:count] = True
        assert torch.equal(chosen_by_cpu(numel, count, Draw(1, 7), 4), random_subset(some, None, Draw(1, 7), 4))


@pytest.mark.parametrize("numel", [8_192, 10_003, 12_289])
def test_a_tensor_of_several_pieces_and_a_last_word_that_is_not_full(numel, brackets, monkeypatch) -> None:
    monkeypatch.setattr(cpu_draw, "PIECE", 2_048)
    assert_the_definitions_choice(numel)
    assert not brackets


def test_a_bracket_that_misses_has_a_wider_one_behind_it(brackets, monkeypatch) -> None:
    """The first bracket lies three deviations beside; the tensor is not ranked as a whole."""
    widths, bracket = [], cpu_draw.Target.bracket

    def shifted(self, width):
        widths.append(width)
        low, high = bracket(self, width)
        return (low, high) if width == cpu_draw.RESCUE else (high + 1, high + 1)

    monkeypatch.setattr(cpu_draw.Target, "bracket", shifted)
    some = torch.zeros(50_000, dtype=torch.bool)
    some[:17_000] = True
    assert torch.equal(chosen_by_cpu(50_000, 17_000, Draw(1, 7), 4), random_subset(some, None, Draw(1, 7), 4))
    assert widths == [cpu_draw.WIDTH, cpu_draw.RESCUE]
    assert not brackets


@pytest.mark.parametrize("first", [0, 2**32 - 2, 2**37])
def test_keys_are_in_the_order_of_the_definition(first: int) -> None:
    """Larger numbers first, and of equal ones the lower place, also of places that have more than 32 bits."""
    random = torch.tensor([5, 2**24 - 1, 0, 5, 2**24 - 1, -1, 0], dtype=torch.int32)
    places = torch.arange(first, first + len(random))
    keys = numbers.ordered(random, places.clone())
    assert keys.argsort(descending=True).tolist() == [1, 4, 0, 3, 2, 6, 5]
    assert torch.equal(numbers.places_of(keys[random >= 0]), places[random >= 0])


def test_the_number_of_threads_does_not_change_the_choice() -> None:
    threads, chosen = torch.get_num_threads(), []
    some = torch.zeros(400_000, dtype=torch.bool)
    some[:130_000] = True
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            chosen.append(chosen_by_cpu(400_000, 130_000, Draw(1, 7), 4))
    finally:
        torch.set_num_threads(threads)
    wanted = random_subset(some, None, Draw(1, 7), 4)
    assert all(torch.equal(each, wanted) for each in chosen)


def test_draws_are_those_that_were_written_down() -> None:
    """A checkpoint goes on with the same draws in every version."""
    assert chosen_by_cpu(24, 9, Draw(5, 3), 2).nonzero().view(-1).tolist() == [0, 2, 3, 5, 10, 11, 12, 14, 16]
    assert int(chosen_by_cpu(5_000, 1_234, Draw(5, 3), 2).nonzero().sum()) == 3_083_046


def test_equal_numbers_go_to_the_lower_index(brackets) -> None:
    """60,000 numbers of 24 bits: some hundred pairs are equal, and the limit is put between two of them."""
    numel, draw = 60_000, Draw(0, 0)
    bits = ranking_bits(draw, 0, numel)
    ordered = bits.sort(descending=True).values
    tied = (ordered[:-1] == ordered[1:]).nonzero().view(-1)
    for place in tied[:: max(len(tied) // 5, 1)].tolist():
        chosen = chosen_by_cpu(numel, place + 1, draw, 0)
        first, *others = (bits == ordered[place]).nonzero().view(-1).tolist()
        assert chosen[first]
        assert not any(chosen[i] for i in others)
    assert not brackets


@pytest.mark.parametrize("bracket", [(0, 0), (255, 255), (40, 41)])
def test_a_bracket_that_misses_is_noticed(bracket, make, copy, brackets, monkeypatch) -> None:
    """The last of half of the numbers lies at 128: none of these has it, and the whole tensor is ranked instead."""
    monkeypatch.setattr(cpu_draw.Target, "bracket", lambda self, width: bracket)
    selection, strength = Selection("top_k", control=Control()), Strength("fixed", 2.0, 0.5)
    assert_same(make(ADAM, (300, 50), seed=1), copy, ADAM, selection, strength)
    assert brackets == [15_000]


def test_the_norm_is_the_policys_and_the_cap_holds(make, copy) -> None:
    for selection, strength in CASES:
        item = make(ADAM, (130, 70), seed=5)
        kw = {"rule": ADAM, "strength": strength, "draw": Draw(0, 1), "statistics": True}
        (policy,) = selective_step([copy(item)], selection=selection, **kw)
        (control,) = selective_step([copy(item)], selection=replace(selection, control=Control()), **kw)
        torch.testing.assert_close(control.masked_sq, policy.masked_sq, rtol=6e-6, atol=0)  # see `assert_same`
        capped = replace(selection, control=Control(cap=0.5))
        (halved,) = selective_step([copy(item)], selection=capped, **kw)
        if float(policy.selected) < item.param.numel():  # else it is the policy's own step
            assert float(halved.masked_sq) < 0.5 * float(policy.masked_sq)


def test_a_norm_is_kept_only_where_a_choice_changes_it(make, copy, monkeypatch) -> None:
    """Multipliers of one size give every choice the policy's norm; unequal ones and a cap below 1 do not."""
    calls: list[str] = []
    monkeypatch.setattr(cpu_control.Matched, "_scale_to", counted(cpu_control.Matched._scale_to, "scaled", calls))
    selection = Selection("agreement", control=Control())
    capped = replace(selection, control=Control(cap=0.5))
    for chosen, strength, wanted in (
        (selection, Strength("fixed", 1.0, -1.0, still=True), []),
        (selection, Strength("fixed", -2.0, 2.0), []),
        (selection, Strength("fixed", 2.0, 1.0), ["scaled"]),
        (capped, Strength("fixed", 1.0, -1.0, still=True), ["scaled"]),
    ):
        calls.clear()
        item = make(ADAM, (90, 50), seed=5)
        item.grad.view(-1)[::5] = 0.0  # some stand still
        assert_same(item, copy, ADAM, chosen, strength)
        assert calls == wanted


@pytest.mark.parametrize(
    ("selected", "rest", "gain"),
    [(2.0, 0.5, 3.0), (1.0, -1.0, -2.0), (0.5, 2.0, None), (2.0, 0.0, None), (0.0, 0.0, None), (2.0, 1e-4, None)],
)
def test_a_mask_in_one_operation_is_that_of_two(selected, rest, gain, make, copy, monkeypatch) -> None:
    """Only where the multiplier of the selected is the larger one, and not much larger."""
    assert cpu_control.gain_of(selected, rest) == gain
    cap = 2.0 if abs(selected) != abs(rest) else 0.9  # below 1, a norm is formed for multipliers of one size, too
    chosen, strength = Selection("agreement", control=Control(cap=cap)), Strength("fixed", selected, rest, still=True)
    one = make(ADAM, (90, 50), seed=5)
    one.grad.view(-1)[::5] = 0.0  # some stand still
    two = copy(one)
    assert_same(copy(one), copy, ADAM, chosen, strength)
    made: list[None] = []
    monkeypatch.setattr(cpu_control, "gain_of", lambda *pair: made.append(None))
    kw = {"rule": ADAM, "selection": chosen, "strength": strength, "draw": Draw(3, 4), "backend": "cpu"}
    selective_step([two], **kw)
    monkeypatch.undo()
    selective_step([one], **kw)
    assert made  # the second path was taken
    # 2 eps of the parameter, and the 3e-6 of the scale on updates below 0.02, see `assert_same`
    torch.testing.assert_close(one.param, two.param, rtol=2 * EPS, atol=6e-8)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_number_that_is_not_finite_stays_where_it_is(backend, bad, make) -> None:
    item = make(GivenRule(), (40, 100))
    item.state["update"][3, 7] = bad
    selection = Selection("agreement", control=Control())
    selective_step(
        [item], rule=GivenRule(), selection=selection, strength=Strength("fixed", 2.0, 0.5), draw=Draw(0, 0),
        backend=backend,
    )  # fmt: skip
    assert (~torch.isfinite(item.param)).nonzero().tolist() in ([], [[3, 7]])
    # the twin: the scale that was not finite reached all of them
    update = item.state["update"]
    pair = torch.tensor(2.0, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    theirs = update > 0
    squares = (update * update).to(torch.float64)
    unguarded = ((4 * squares[theirs].sum() + squares[~theirs].sum()) / squares.sum()).sqrt()
    assert torch.isnan(unguarded)
    _, (above, _) = matched(Control(), theirs, pair, update, None, Draw(0, 0), 0)
    assert float(above) == 2.0


@pytest.mark.parametrize("rest", [0.0, 0.5])
def test_an_infinite_update_is_infinite_in_the_definition_too(rest, make, copy) -> None:
    """It is no NaN, whichever way a chunk is masked, and the others are stepped by the same multipliers."""
    item = make(GivenRule(), (40, 100))
    item.state["update"][3, :20] = torch.inf
    item.grad[3, :20] = 1.0  # all are selected by the policy
    selection = Selection("agreement", control=Control())
    other, ours, wanted = both(item, copy, GivenRule(), selection, Strength("fixed", 2.0, rest))
    assert torch.equal(item.param.isnan(), other.param.isnan())
    torch.testing.assert_close(ours.masked_sq, wanted.masked_sq, equal_nan=True)
    assert float(ours.strength_selected) == float(wanted.strength_selected)


@pytest.mark.parametrize("rest", [0.0, 0.5, -1.0])
@pytest.mark.parametrize("agree", [True, False])
@pytest.mark.parametrize("size", [(40, 100), (30,)])
def test_a_cap_below_1_holds_where_there_is_no_choice(size, agree, rest, make, copy) -> None:
    """All or none are selected, so that the control's coordinates are those of the policy."""
    item = make(GivenRule(), size)
    item.grad.copy_(item.state["update"] if agree else -item.state["update"])
    selection = Selection("agreement", control=Control(cap=0.5))
    other, ours, wanted = both(item, copy, GivenRule(), selection, Strength("fixed", 2.0, rest))
    assert float(ours.strength_rest) == float(wanted.strength_rest)
    assert float(ours.strength_selected) == float(wanted.strength_selected)
    torch.testing.assert_close(item.param, other.param)


def test_shards_refuse(make) -> None:
    item = make(ADAM, (6, 4))
    kw = {
        "rule": ADAM, "selection": Selection("agreement", control=Control()), "strength": Strength("fixed"),
        "draw": Draw(0, 0),
    }  # fmt: skip
    item.shard = Shard((6, 4), (((0, 6),), ((0, 4),)), None)
    with pytest.raises(ValueError, match="matched control, which looks at the whole of tensors"):
        begin_sharded([item], **kw)


@pytest.mark.parametrize("value", [0.99999, 1e-3, 0.7, 0.31622])
def test_squares_that_are_equal_add_up(value: float) -> None:
    """Those of Adam's first step: the roundings of a running sum all go one way, those of sums in pairs do not."""
    x = torch.full((CHUNK,), value)
    exact = float(x.double().square().sum())
    assert abs(sum_of_squares(x) / exact - 1) < 1e-6
    running = numpy.cumsum(x.square().numpy(), dtype=numpy.float32)[-1]
    assert abs(float(running) / exact - 1) > 1e-6
