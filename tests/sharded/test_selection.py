"""Every layout selects what one device selects. The cases are in tests/support/sharded_cases_*.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from sharded_world import run_cases

FAST = [
    "sharded_cases_selection:" + name
    for name in (
        "every_policy", "other_bases", "delta_capture", "not_finite", "other_dtypes", "samples", "massive_ties",
        "local_scope_differs",
    )
]  # fmt: skip


def test_every_layout_selects_what_one_device_selects(tmp_path: Path) -> None:
    run_cases(FAST, 4, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_policy_over_every_base(tmp_path: Path) -> None:
    run_cases(["sharded_cases_selection:every_policy_and_base"], 4, tmp_path, 1400)
