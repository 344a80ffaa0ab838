"""FSDP1 over gloo, on two processes: tests/support/sharded_cases_fsdp1.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

RunCases = Callable[..., None]  # conftest.py
CASES = ("refused_where_it_is_made", "refused_when_the_model_is_wrapped_later", "dense_groups_are_the_bases")


def test_fsdp1_is_refused_as_soon_as_it_is_seen(run_cases: RunCases, tmp_path: Path) -> None:
    run_cases([f"sharded_cases_fsdp1:{name}" for name in CASES], 2, tmp_path)


def test_without_the_check_it_fails_late(run_cases: RunCases, tmp_path: Path) -> None:
    run_cases(["sharded_cases_fsdp1:unrefused_it_fails_late"], 2, tmp_path)
