"""The suite itself: it passes what is right, and names what is broken. Every check has a wrapper that fails it."""

from __future__ import annotations

import functools
import gc

import pytest
import torch
from broken import BROKEN
from honest import HalfAgainst, Identity

from selective.testing import (
    CheckFailed,
    ConfigClaims,
    NotApplicable,
    Skipped,
    Subject,
    all_checks,
    check_wrapper,
    conformance_checks,
    itself,
    stack_checks,
)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


adamw = functools.partial(torch.optim.AdamW, lr=1e-2)  # one that another process can import


def build_config(config):
    """A config of two keys, checked by hand."""
    if config.get("kind") != "half":
        raise ValueError(f"kind: {config.get('kind')!r} is not one of 'half'")
    for key in set(config) - {"kind", "rest"}:
        raise ValueError(f"half.{key}: no such key")
    if not 0 <= config.get("rest", 0) <= 1:
        raise ValueError(f"half.rest: {config['rest']} must be <= 1")
    return dict(config)


CLAIMS = ConfigClaims(build_config, {"kind": "half", "rest": 0.5}, ("rest", 2.0, "1"))
PLAIN = Subject(name="AdamW itself", base=adamw, make=adamw, get_base=itself)
# What a plain optimizer has nothing to say about: these wrap bases of the suite's own, or are about wrapping.
NEEDS_WRAPPING = {
    "state_dtypes_survive_a_load",
    "nothing_foreign_in_the_base_state",
    "base_may_write_on_gradients",
    "modes_reach_the_base",
    "attributes_of_the_base_do_not_leak",
    "inexact_moments_are_understood",
    "configs_are_validated",
    "memory_is_as_claimed",
}
CHECKS = {check.name: check for check in all_checks()}


def wrapped(cls, **options):
    return Subject(name=cls.__name__, base=adamw, wrap=cls, strict=True, copies=0.0, **options)


def test_plain_adamw_passes_all_that_apply():
    report = check_wrapper(PLAIN)
    report.raise_if_failed()
    assert {o.check for o in report.not_applicable} == NEEDS_WRAPPING, str(report)


@pytest.mark.parametrize("cls", [Identity, HalfAgainst])
def test_honest_wrappers_pass_every_check(cls):
    report = check_wrapper(wrapped(cls, config=CLAIMS))
    report.raise_if_failed()
    assert len(report.passed) == len(conformance_checks), str(report)


@pytest.mark.parametrize("cls", BROKEN, ids=lambda cls: cls.__name__)
def test_broken_wrapper_fails_by_name(cls):
    skipped = []
    for name in BROKEN[cls]:
        with pytest.raises((CheckFailed, Skipped)) as failure:
            CHECKS[name](wrapped(cls))
        if failure.type is Skipped:
            skipped.append(str(failure.value))
            continue
        assert str(failure.value).startswith(f"{cls.__name__}: ")
        assert f"Why it matters: {CHECKS[name].why}" in str(failure.value)
    if skipped:
        pytest.skip("; ".join(skipped))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda config: {"kind": "half", "rest": 0.5}, "was accepted"),
        (lambda config: build_config({k: v for k, v in config.items() if k in ("kind", "rest")}), "an unknown key"),
        (lambda config: build_config({**config, "kind": "half"}), "an unknown kind"),
        (lambda config: build_config({**config, "rest": 0.5}), "rest = 2.0"),
    ],
    ids=["accepts-all", "drops-keys", "any-kind", "no-bounds"],
)
def test_careless_configs_fail_by_name(change, words):
    claims = ConfigClaims(change, CLAIMS.good, CLAIMS.out_of_range)
    with pytest.raises(CheckFailed, match=words):
        conformance_checks["configs_are_validated"](wrapped(Identity, config=claims))


def test_an_error_that_does_not_help_is_a_failure():
    def unhelpful(config):
        if set(config) != {"kind", "rest"} or config["kind"] != "half" or config["rest"] > 1:
            raise ValueError("bad config")

    with pytest.raises(CheckFailed, match="does not name 'no_such_key'"):
        conformance_checks["configs_are_validated"](
            wrapped(Identity, config=ConfigClaims(unhelpful, CLAIMS.good, CLAIMS.out_of_range))
        )


def test_what_the_process_has_frozen_stays_frozen():
    """... and what it has not frozen does not stay frozen."""
    memory = ["memory_does_not_grow", "memory_is_as_claimed"]
    frozen = gc.get_freeze_count()  # tests/conftest.py
    assert frozen > 10_000
    check_wrapper(wrapped(Identity), only=memory).raise_if_failed()
    assert gc.get_freeze_count() > 0.9 * frozen
    gc.unfreeze()
    try:
        check_wrapper(wrapped(Identity), only=memory).raise_if_failed()
        assert gc.get_freeze_count() == 0
    finally:
        gc.collect()
        gc.freeze()


def test_every_check_has_a_wrapper_that_fails_it():
    named = {name for names in BROKEN.values() for name in names} | {"configs_are_validated"}
    assert named == set(CHECKS)


def test_rows_and_texts():
    assert {check.row for check in all_checks()} == {
        1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 20, 23, 24, 25, 29, 30, 31, 32
    }  # fmt: skip
    for check in all_checks():
        assert check.doc.endswith("."), check.name
        assert check.why.endswith("."), check.name
    assert len(CHECKS) == len(all_checks()) == len(conformance_checks) + len(stack_checks)


def test_what_the_base_fails_too_is_not_held_against_the_wrapper():
    class DecaysFrozen(torch.optim.AdamW):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(0.999)

    subject = Subject(name="x", base=lambda ps: DecaysFrozen(ps), wrap=Identity)
    with pytest.raises(NotApplicable, match=r"the base alone fails it too: .*moved in step 0"):
        conformance_checks["first_gradient_may_come_late"](subject)


def test_waivers_are_reported_with_their_reason():
    waived = wrapped(Identity, waives={"resumes_bit_for_bit": "it keeps nothing"})
    report = check_wrapper(waived, only=["resumes_bit_for_bit", "is_an_optimizer"])
    assert [(o.check, o.verdict, o.message) for o in report.outcomes] == [
        ("is_an_optimizer", "passed", ""),
        ("resumes_bit_for_bit", "not applicable", "waived: it keeps nothing"),
    ]
    assert "not applicable  waived: it keeps nothing" in str(report)


def test_names_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="no check 'resume'"):
        check_wrapper(wrapped(Identity), only=["resume"])
    with pytest.raises(ValueError, match="no check 'resume'"):
        check_wrapper(wrapped(Identity, waives={"resume": "no"}))
    with pytest.raises(ValueError, match="neither `wrap` nor `make`"):
        Subject(name="nothing", base=adamw)


def test_a_report_says_what_failed_and_raises():
    report = check_wrapper(wrapped(BROKEN_BY_NAME["ClosureTwice"]), only=["closure_runs_once_first_with_gradients"])
    assert len(report.failed) == 1
    assert not report.passed
    assert "the closure ran 2 times in step 1" in str(report)
    with pytest.raises(CheckFailed, match="row 4, closure_runs_once_first_with_gradients"):
        report.raise_if_failed()


BROKEN_BY_NAME = {cls.__name__: cls for cls in BROKEN}


def test_the_suite_leaves_the_global_generators_alone():
    before = torch.get_rng_state()
    quick = [check.name for check in conformance_checks if check.row not in (16, 18, 20)]
    check_wrapper(wrapped(BROKEN_BY_NAME["DrawsFromTheGlobalGenerator"]), only=quick)
    assert torch.equal(torch.get_rng_state(), before)
