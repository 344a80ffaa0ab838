"""The summary of runs: intervals against known values, and verdicts about runs that are made up."""

from __future__ import annotations

import pytest
from compare_helpers import records

from selective.compare import build, summarise
from selective.compare.intervals import steps_to, t_interval, t_quantile
from selective.compare.table import size


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (10, 2.228), (30, 2.042), (120, 1.980)],
)
def test_quantiles_are_those_of_the_printed_tables(degrees, quantile):
    assert t_quantile(0.975, degrees) == pytest.approx(quantile, abs=6e-4)  # the tables have three decimals


def test_interval_by_hand():
    """1, 2, 6: mean 3, s^2 = (4 + 1 + 9) / 2 = 7, half-width 4.30265 * sqrt(7 / 3) = 6.5724."""
    interval = t_interval([1.0, 2.0, 6.0])
    assert (interval.mean, interval.n) == (3.0, 3)
    assert interval.half == pytest.approx(6.5724, abs=1e-3)
    assert interval.sign == 0
    assert t_interval([-1.0, -1.1, -0.9]).sign == -1
    assert t_interval([1.0, 1.1, 0.9]).sign == 1
    assert t_interval([5.0]).half is None
    assert t_interval([5.0]).sign == 0
    with pytest.raises(ValueError, match="no values"):
        t_interval([])


def test_steps_to_a_loss():
    assert steps_to(2.0, [0, 10, 20], [4.0, 3.0, 1.0]) == pytest.approx(15.0)
    assert steps_to(3.0, [0, 10, 20], [4.0, 3.0, 1.0]) == 10
    assert steps_to(5.0, [0, 10], [4.0, 3.0]) == 0
    assert steps_to(0.5, [0, 10], [4.0, 3.0]) is None


CONFIG = build({"policies": ["MGUP"], "lr": [0.1, 1.0], "seeds": 3, "steps": 100})
BASE = {(0, 0.1): [2.5, 2.6, 2.7], (0, 1.0): [2.0, 2.1, 2.2]}


def summary_of(policy, control, config=CONFIG, base=BASE):
    worse = {(1, 0.1): [3.0] * len(policy), (2, 0.1): [3.0] * len(policy)}
    return summarise(config, records(config, {**base, **worse, (1, 1.0): policy, (2, 1.0): control}))


def test_rows_are_paired_at_the_best_learning_rates():
    summary = summary_of([1.9, 2.0, 2.1], [2.0, 2.1, 2.2])
    rows = {(row.contender.index, row.lr): row for row in summary.rows}
    assert [key for key, row in rows.items() if row.best] == [(0, 1.0), (1, 1.0), (2, 1.0)]
    policy = rows[1, 1.0]
    assert policy.loss.mean == pytest.approx(2.0)
    assert policy.loss.half == pytest.approx(4.30265 * 0.1 / 3**0.5, abs=1e-4)  # spread of the seeds
    assert policy.difference.mean == pytest.approx(-0.1)
    assert policy.difference.half == pytest.approx(0, abs=1e-9)  # cancels in pairs
    # 4 to 1.9, 2.0, 2.1 in a line of 100 steps, down to 2.0, 2.1, 2.2
    assert policy.steps == pytest.approx((200 / 2.1 + 190 / 2.0 + 180 / 1.9) / 3)
    assert policy.reached == 3
    assert rows[0, 1.0].steps == pytest.approx(100)
    assert (rows[0, 0.1].steps, rows[0, 0.1].reached) == (None, 0)
    assert policy.step_ms == 2.0


@pytest.mark.parametrize(
    ("policy", "control", "says"),
    [
        (
            [1.9, 2.0, 2.1],
            [2.0, 2.1, 2.2],
            ["beats AdamW", "beats its random control", "selection helped here, at n = 3"],
        ),
        (
            [1.9, 2.0, 2.1],
            [1.9, 2.01, 2.09],
            ["beats AdamW", "no difference shown from its random", "not shown to come"],
        ),
        ([1.9, 2.0, 2.1], [1.8, 1.9, 2.0], ["beats AdamW", "is worse than its random control", "not shown to come"]),
        ([2.0, 2.2, 2.1], [2.5, 2.6, 2.7], ["no difference shown from AdamW", "is not shown at this n"]),
        ([2.4, 2.5, 2.6], [2.4, 2.6, 2.5], ["is worse than AdamW", "no difference shown from its random"]),
    ],
)
def test_verdicts(policy, control, says):
    ((label, verdict),) = summary_of(policy, control).verdicts
    assert label == "MGUP()"
    for part in says:
        assert part in verdict
    assert ("selection helped" in verdict) == (says[-1].startswith("selection helped"))


def test_one_seed_gives_no_verdict():
    config = build({"policies": ["MGUP"], "lr": [0.1, 1.0], "seeds": 1, "steps": 100})
    summary = summary_of([1.9], [2.0], config, {(0, 0.1): [2.5], (0, 1.0): [2.0]})
    ((_, verdict),) = summary.verdicts
    assert verdict.startswith("no verdict from one seed (-0.1000 against AdamW, -0.1000 against its random control)")


def test_divergence_is_never_the_best_and_is_said():
    summary = summary_of([1.0, None, 1.0], [2.0, 2.1, 2.2])
    rows = {(row.contender.index, row.lr): row for row in summary.rows}
    assert rows[1, 1.0].diverged == 1
    assert rows[1, 1.0].loss is None
    assert rows[1, 0.1].best
    config = build({"policies": ["MGUP"], "lr": [1.0], "controls": False, "seeds": 2, "steps": 100})
    everywhere = summarise(config, records(config, {(0, 1.0): [2.0, 2.0], (1, 1.0): [None, None]}))
    assert everywhere.verdicts[0][1] == "diverged at every learning rate."
    alone = summarise(config, records(config, {(0, 1.0): [None, None], (1, 1.0): [2.0, 2.1]}))
    assert "AdamW diverged at every learning rate" in alone.verdicts[0][1]


def test_only_complete_seeds_count():
    made = records(CONFIG, {**BASE, (1, 0.1): [3.0] * 3, (2, 0.1): [3.0] * 3, (1, 1.0): [1.9] * 3, (2, 1.0): [2.0] * 3})
    made[-1]["complete"] = False
    summary = summarise(CONFIG, made)
    assert summary.seeds == (0, 1)
    assert any("2 of 3 seeds are complete" in note for note in summary.notes)
    assert summarise(CONFIG, made[:5]).rows == ()


def test_notes_name_what_weakens_the_result():
    notes = " ".join(summary_of([1.9, 2.0, 2.1], [2.0, 2.1, 2.2]).notes)
    assert "Best at the highest learning rate swept, 1" in notes
    single = build({"policies": ["MGUP"], "lr": [1.0], "controls": False, "seeds": 2, "steps": 100})
    one_rate = summarise(single, records(single, {(0, 1.0): [2.0, 2.1], (1, 1.0): [2.0, 2.0]}))
    assert any("One learning rate" in note for note in one_rate.notes)


def test_sizes():
    assert [size(n) for n in (0, 999, 1500, -2_000_000, 3 * 10**9)] == ["0 B", "999 B", "1.5 kB", "-2.0 MB", "3.0 GB"]
