"""The comparison that every test of a stack stands on can fail: it names what differs."""

from __future__ import annotations

import pytest
import torch
from stack_loops import CASES, assert_same, by_hand, differences, net, train, wrap


@pytest.mark.parametrize("case", CASES)
def test_the_plain_loop_repeats_itself_and_every_case_is_another(case: str) -> None:
    found = by_hand(case, 4)
    assert_same(found, by_hand(case, 4))
    assert all(differences(found, by_hand(other, 4)) for other in CASES if other != case)


def test_a_parameter_a_state_entry_and_a_rate_are_compared() -> None:
    expected = by_hand("mgup", 3)
    model, optimizer = by_hand("mgup", 3)
    with torch.no_grad():
        model[0].weight[0, 0] += 1e-6
    assert differences((model, optimizer), expected) == ["0.weight"]
    model, optimizer = by_hand("mgup", 3)
    optimizer.state[model[2].bias]["selective/step"] += 1
    optimizer.state[model[2].bias]["exp_avg"] += 1e-6
    counts = [f"state[{index}][selective/step]" for index in range(4)]  # the wrapper's, and so one for all
    assert sorted(differences((model, optimizer), expected)) == sorted(["state[3][exp_avg]", *counts])
    optimizer.param_groups[0]["lr"] = 0.5
    assert differences((model, optimizer), expected)[-1:] == ["lr [0.5], expected [0.01]"]


def test_a_run_that_lost_its_state_differs_at_the_next_step() -> None:
    model, optimizer = by_hand("random-soap", 3)
    resumed = net()
    resumed.load_state_dict(model.state_dict())
    cold = wrap(resumed, "random-soap")
    train(model, optimizer, range(3, 5))
    train(resumed, cold, range(3, 5))
    assert differences((resumed, cold), (model, optimizer))
