"""`pytest -p selective.testing --wrapper ...`: on wrappers that are right, on broken twins, on what is no wrapper."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch._dynamo  # noqa: F401  # pytester drops what is imported later, and this can't be imported again
from optional import missing

from selective.testing import all_checks, plugin, spec  # noqa: F401  # plugin: the same holds for what is ours

pytest_plugins = ["pytester"]

HERE = Path(__file__).parent
# Each in one process with this one; what needs other processes, stacks or a compiler is below.
QUICK = "not row-16 and not row-18 and not row-20"
SLOW_ROWS = 5  # the checks of these rows
DCP = {
    "distributed_checkpoint_round_trip", "flattened_checkpoint_round_trip", "unstepped_distributed_checkpoint",
    "unstepped_flattened_checkpoint",
}  # fmt: skip
RESUME = {"resumes_bit_for_bit", "own_state_survives_a_load_in_bfloat16"}
# One for each group of checks at least, and every check that it fails.
TWINS: dict[str, set[str]] = {
    "NeedsALoss": {"has_the_signatures_of_torch", *DCP},
    "NoiseWithoutRate": {
        "learning_rate_zero_stops", "initialisation_step_moves_nothing_of_the_wrapper", "base_may_write_on_gradients",
        *DCP,
    },
    "CopiesGroups": {
        "schedulers_reach_the_base", "learning_rate_zero_stops", "param_groups_are_those_of_the_base",
        "add_param_group_reaches_the_base", "copies_step_as_the_original", "parameters_may_be_swapped",
        "initialisation_step_moves_nothing_of_the_wrapper", *DCP,
    },
    "IgnoresAddedGroups": {"add_param_group_reaches_the_base"},
    "ClosureTwice": {"closure_runs_once_first_with_gradients"},
    "ClosureSkipsSelection": {"closure_equals_manual_step"},
    "GlobalHooksTwice": {"step_hooks_fire_once_around_the_step"},
    "StateDictOfTheBase": {"state_dict_hooks_fire_once"},
    "CopiesWithoutTheBase": {"copies_step_as_the_original"},
    "LosesStateOnLoad": {"checkpoint_of_the_base_loads", *RESUME, *DCP},
    "CountsOutsideTheState": {
        "distributed_checkpoint_round_trip", "flattened_checkpoint_round_trip", *RESUME,
    },
    "OptionsInGroups": {"base_part_loads_into_the_base"},
    "StateAfterTheBase": {"base_state_is_left_to_the_base", "nothing_foreign_in_the_base_state"},
    "ClaimsToUnscale": {"grad_scaler_changes_nothing"},
    "DecaysEverything": {"first_gradient_may_come_late", "gradients_may_be_missing"},
    "GradientsAfterTheBase": {"base_may_write_on_gradients"},
    "StepsTheOldOnes": {"parameters_may_be_swapped"},
    "BlanketGetattr": {
        "attributes_of_the_base_do_not_leak", "copies_step_as_the_original", "grad_scaler_changes_nothing",
    },
    "NoModes": {"modes_reach_the_base"},
    "KeepsEveryUpdate": {"memory_does_not_grow"},
    "RoundsFourTimes": {"bfloat16_updates_do_not_vanish"},
    "SelectsByCodes": {"inexact_moments_are_understood"},
    "NoCap": {
        "compensation_stays_within_its_cap", "nothing_aligned_stays_finite", "learning_rate_zero_stops",
        "initialisation_step_moves_nothing_of_the_wrapper", *DCP,
    },
    "DrawsAndPutsBack": {"global_generators_are_not_read"},
    "SeedsFromPython": {"global_generators_do_not_move"},
    "GradientsFromBackward": {"accumulation_is_seen", "clipping_is_seen", "grad_scaler_changes_nothing"},
}  # fmt: skip

# The others are slow: each runs most of the suite, and `test_suite.py` runs each twin against one check of it.
OFTEN = ("IgnoresAddedGroups", "LosesStateOnLoad", "BlanketGetattr", "NoCap")


@pytest.fixture(autouse=True)
def _away_from_here(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, without this project's settings; processes find the twins, too."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH", "")])))
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def run(pytester: pytest.Pytester, wrapper: str, *options: str, apart: bool = False) -> Any:
    how = pytester.runpytest_subprocess if apart else pytester.runpytest_inprocess
    return how("-p", "selective.testing", "--wrapper", wrapper, "--wrapper-json", "found.json", *options)


def verdicts(pytester: pytest.Pytester, verdict: str) -> set[str]:
    found = json.loads((pytester.path / "found.json").read_text())
    return {one["check"] for one in found["outcomes"] if one["verdict"] == verdict}


STACKS = {
    "accelerate": "accelerate_prepares_it", "lightning": "lightning_trains_with_it",
    "transformers": "huggingface_trainer_trains_with_it",
}  # fmt: skip
IDENTITY = "def same(base):\n    return base\n"


@pytest.mark.parametrize("rows", [QUICK, pytest.param("", marks=pytest.mark.slow)], ids=["quick", "all"])
def test_ours_passes_all_of_it_in_an_empty_folder(pytester: pytest.Pytester, rows: str) -> None:
    wrapper = "selective:SelectiveUpdate(policy='MGUP')"
    result = run(pytester, wrapper, "--wrapper-strict", "--wrapper-copies=0", "-k", rows, apart=True)
    assert result.ret == 0
    assert verdicts(pytester, "failed") == set()
    assert verdicts(pytester, "not applicable") == {"configs_are_validated"}
    absent = set() if rows else {check for package, check in STACKS.items() if missing([package])}
    assert verdicts(pytester, "skipped") == absent
    left_out = SLOW_ROWS if rows else 0
    assert len(verdicts(pytester, "passed")) == len(all_checks()) - 1 - len(absent) - left_out
    result.stdout.fnmatch_lines(["*conformance of SelectiveUpdate(policy='MGUP') over AdamW(lr=0.01)*"])


def test_no_wrapper_at_all_passes_what_applies(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(mine=IDENTITY)
    result = run(pytester, "mine:same", "-k", QUICK, apart=True)
    assert result.ret == 0
    assert verdicts(pytester, "failed") == verdicts(pytester, "skipped") == set()
    assert verdicts(pytester, "not applicable") == {
        "state_dtypes_survive_a_load", "attributes_of_the_base_do_not_leak", "memory_is_as_claimed",
        "configs_are_validated",
    }  # fmt: skip
    result.stdout.fnmatch_lines(["*state_dtypes_survive_a_load: the base alone fails it too: *"])


@pytest.mark.parametrize(
    "twin", [twin if twin in OFTEN else pytest.param(twin, marks=pytest.mark.slow) for twin in TWINS]
)
def test_a_twin_fails_exactly_what_it_breaks(pytester: pytest.Pytester, twin: str) -> None:
    result = run(pytester, f"broken:{twin}", "-k", QUICK)
    assert verdicts(pytester, "failed") == TWINS[twin]
    assert result.ret == 1
    result.assert_outcomes(
        failed=len(TWINS[twin]), passed=len(verdicts(pytester, "passed")),
        skipped=len(verdicts(pytester, "not applicable")), deselected=SLOW_ROWS,
    )  # fmt: skip


def test_a_twin_that_compiles_again(pytester: pytest.Pytester) -> None:
    assert run(pytester, "broken:CompilesForEachRate", "-k", "row-20", apart=True).ret == 1
    assert verdicts(pytester, "failed") == {"schedules_do_not_recompile"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("twin", "failed"),
    [
        # the Trainer prepares with accelerate
        ("LoadMeansResumed", {"accelerate_prepares_it", "huggingface_trainer_trains_with_it"}),
        ("ClosureSkipsSelection", {"lightning_trains_with_it"}),
        ("DrawsFromTheGlobalGenerator", {"lightning_trains_with_it", "huggingface_trainer_trains_with_it",
                                         "replicas_stay_identical"}),
    ],
)  # fmt: skip
def test_a_twin_fails_in_stacks_and_replicas(pytester: pytest.Pytester, twin: str, failed: set[str]) -> None:
    result = run(pytester, f"broken:{twin}", "-k", "row-16 or row-18", apart=True)
    absent = {check for package, check in STACKS.items() if missing([package])}
    assert verdicts(pytester, "failed") == failed - absent
    assert result.ret == 1


def test_a_failure_says_what_was_found_and_what_comes_of_it(pytester: pytest.Pytester) -> None:
    result = run(pytester, "broken:ClosureTwice", "-k", "row-04")
    result.stdout.fnmatch_lines(
        [
            "*closure_runs_once_first_with_gradients?row-04?*",
            "found     the closure ran 2 times in step 1.",
            "so that   a second evaluation doubles the cost, *",
            "checked   The closure runs once a step, *",
        ]
    )
    result.stdout.no_fnmatch_line("*Traceback*")


CRASHES = """
class Lazy:
    def __init__(self, base):
        self.base = base
    def __getattr__(self, name):
        return getattr(self.base, name)
    def state_dict(self):
        raise RuntimeError("no checkpoints in the free version")
"""


def test_what_a_wrapper_raises_has_its_place_and_a_traceback_where_it_is_asked_for(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(crashes=CRASHES)
    result = run(pytester, "crashes:Lazy", "-k", "state_dict_has")
    result.stdout.fnmatch_lines(
        ["found     it raised RuntimeError: no checkpoints in the free version (*crashes.py:7)."]
    )
    result.stdout.no_fnmatch_line("*Traceback*")
    result = run(pytester, "crashes:Lazy", "-k", "state_dict_has", "--tb=short")
    result.stdout.fnmatch_lines(["Traceback*", '*crashes.py", line 7, in state_dict'])


NOT_WRAPPERS = """
import torch
number = 3
class Nothing:
    def __init__(self, base):
        pass
def crashes(base):
    raise KeyError("oh no")
def needs_more(base, k):
    return base
def leaves(base):
    raise SystemExit(7)
class Stumbles(torch.optim.SGD):
    def __init__(self, base):
        super().__init__(base.param_groups, lr=0.1)
    def step(self, closure=None):
        raise ValueError("not today")
"""


@pytest.mark.parametrize(
    ("wrapper", "says"),
    [
        ("mine", "expected module:name, or with keyword arguments"),
        ("mine:Nothing(3)", "expected module:name, or with keyword arguments*; arguments are given by name."),
        ("mine:Nothing(k=x)", "the values literals of Python"),
        ("no_such_module:X", "there is no module 'no_such_module' in "),
        ("mine:Missing", "mine has no 'Missing'; it has Nothing, crashes, needs_more, leaves, Stumbles."),
        ("mine:number", "it is of type int, and can't be called with an optimizer."),
        ("mine:Nothing", "returned an object of type Nothing, which is no optimizer: it has no step, zero_grad, "),
        ("mine:crashes", "crashes(base), with AdamW as the base, raised KeyError: 'oh no' (*mine.py:7)."),
        ("mine:needs_more", "raised TypeError: needs_more() missing 1 required positional argument: 'k'."),
        ("mine:leaves", "raised SystemExit: 7"),
        ("mine:Stumbles", "first plain step over AdamW raised ValueError: not today (*mine.py:16), so that there is "),
        ("wrong:X", "importing wrong raised ZeroDivisionError: division by zero (*wrong.py:1)."),
        ("lacks:X", "importing lacks raised ModuleNotFoundError: No module named 'of_theirs' (*lacks.py:1)."),
    ],
)
def test_what_is_no_wrapper_is_one_error(pytester: pytest.Pytester, wrapper: str, says: str) -> None:
    pytester.makepyfile(mine=NOT_WRAPPERS, wrong="1 / 0", lacks="import of_theirs")
    spec._load.cache_clear()
    result = run(pytester, wrapper)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    errors = [line for line in result.stderr.lines if line]
    assert len(errors) == 1, errors
    result.stderr.fnmatch_lines([f"ERROR: --wrapper {wrapper!r}: *{says}*".replace("[", "[[]")])
    result.stdout.no_fnmatch_line("*Traceback*")


def test_a_base_that_is_none_is_one_error(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(mine=IDENTITY)
    result = run(pytester, "mine:same", "--wrapper-base", "torch.optim:Adamw")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --wrapper-base 'torch.optim:Adamw': torch.optim has no 'Adamw'; it has *"])


def test_options_that_no_check_could_use_are_refused(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(mine=IDENTITY)
    for option, value in (("--wrapper-cap", "-1"), ("--wrapper-cap", "nan"), ("--wrapper-json", "nowhere/x.json")):
        result = run(pytester, "mine:same", option, value)
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        assert option in str(result.stderr)


def test_several_bases_keyword_arguments_and_one_check(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(ready="def make(base, *, times=1):\n    assert times == 3\n    return base\n")
    bases = ["--wrapper-base", "torch.optim:SGD(lr=0.1, momentum=0.9)", "--wrapper-base", "torch.optim:Adam"]
    result = run(pytester, "ready:make(times=3)", *bases, "-k", "clipping", "-v")
    result.assert_outcomes(passed=2, deselected=2 * len(all_checks()) - 2)
    result.stdout.fnmatch_lines(["make(times=3) over SGD(lr=0.1, momentum=0.9)::clipping_is_seen?row-31? PASSED*",
                                 "make(times=3) over Adam::clipping_is_seen?row-31? PASSED*"])  # fmt: skip


def test_what_is_not_claimed_can_be_left_out(pytester: pytest.Pytester) -> None:
    left_out = "NoModes over AdamW(lr=0.01)::modes_reach_the_base[row-17]"
    result = run(pytester, "broken:NoModes", "-k", "row-17", "--deselect", left_out)
    result.assert_outcomes(passed=1, deselected=len(all_checks()) - 1)
    assert result.ret == 0


HIDDEN = """
import torch
class Hidden(torch.optim.AdamW):
    def __init__(self, base):
        super().__init__(base.param_groups, lr=0.01)
"""


def test_a_base_that_is_nowhere_is_not_asked_for(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(hidden=HIDDEN)
    run(pytester, "hidden:Hidden", "-k", "row-10 or row-13").assert_outcomes(
        passed=2, skipped=2, deselected=len(all_checks()) - 4
    )
    assert verdicts(pytester, "not applicable") == {"checkpoint_of_the_base_loads", "base_part_loads_into_the_base"}


def test_tests_of_the_folder_run_where_they_are_named(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(mine=IDENTITY, test_theirs="def test_theirs():\n    pass\n")
    run(pytester, "mine:same", "-k", "theirs or clipping").assert_outcomes(passed=1, deselected=len(all_checks()) - 1)
    both = run(pytester, "mine:same", "test_theirs.py", "-k", "theirs or clipping")
    both.assert_outcomes(passed=2, deselected=len(all_checks()) - 1)


def test_without_a_wrapper_nothing_is_added(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_theirs="def test_theirs():\n    pass\n")
    pytester.runpytest_inprocess("-p", "selective.testing").assert_outcomes(passed=1)


@pytest.mark.slow
def test_in_several_processes_it_is_the_same(pytester: pytest.Pytester) -> None:
    pytest.importorskip("xdist")
    pytester.makepyfile(mine=IDENTITY)
    result = run(pytester, "mine:same", "-n", "2", "-k", "row-04 or row-17", apart=True)
    assert result.ret == 0
    assert verdicts(pytester, "passed") == {
        "closure_equals_manual_step", "closure_runs_once_first_with_gradients", "modes_reach_the_base",
    }  # fmt: skip
    assert verdicts(pytester, "not applicable") == {"attributes_of_the_base_do_not_leak"}


def test_claims_are_what_it_is_held_to(pytester: pytest.Pytester) -> None:
    run(pytester, "broken:KeepsACopy", "-k", "memory", "--wrapper-copies", "0").assert_outcomes(
        passed=1, failed=1, deselected=len(all_checks()) - 2
    )
    assert verdicts(pytester, "failed") == {"memory_is_as_claimed"}
    run(pytester, "broken:KeepsACopy", "-k", "memory", "--wrapper-copies", "1")
    assert verdicts(pytester, "failed") == set()
    run(pytester, "broken:RoundsOnLoad", "-k", "row-08")
    assert verdicts(pytester, "failed") == set()
    run(pytester, "broken:RoundsOnLoad", "-k", "row-08", "--wrapper-strict")
    assert verdicts(pytester, "failed") == {"state_dtypes_survive_a_load"}
