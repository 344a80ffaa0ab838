"""Nothing lost: a run that is killed over and over, in its steps and in its checkpoints, ends as if it had not been."""

from __future__ import annotations

import random
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_runs import MOMENTS, Nursery
from whole_bytes import bytes_of, difference

STEPS_FOR_A_KILL = 14  # so that a run is long enough for all of them


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


def end_of(folder: Path) -> dict[str, Any]:
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    return {key: bytes_of(value) for key, value in saved.items()}


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments(kills: int, tmp_path: Path, nursery: Nursery) -> None:
    steps, draw, moments = STEPS_FOR_A_KILL * kills, random.Random(kills), Counter[str]()
    assert nursery.attempt(tmp_path / "whole", steps) == 0
    while sum(moments.values()) < kills:
        moment: str | None = draw.choice([*MOMENTS, None])
        if moment is None:  # from without, whatever it is doing; from loading the checkpoint on
            code = nursery.attempt(tmp_path / "killed", steps, seconds=draw.uniform(0, 0.2))
        else:
            code = nursery.attempt(tmp_path / "killed", steps, moment=moment, number=draw.randint(1, 8))
        if code == 0:  # it was faster than the kill: once more from the start
            assert difference(end_of(tmp_path / "whole"), end_of(tmp_path / "killed")) is None
            (tmp_path / "killed" / "checkpoint.pt").unlink()
            continue
        assert code == -signal.SIGKILL, f"ended with {code} after {sum(moments.values())} kills, at {moment}"
        moments[moment or "any"] += 1
    assert nursery.attempt(tmp_path / "killed", steps) == 0
    assert sum(n for moment, n in moments.items() if moment not in ("step", "any")) > kills // 3, moments
    found = difference(end_of(tmp_path / "whole"), end_of(tmp_path / "killed"))
    assert found is None, f"{found}; killed at {moments}"


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_each_moment_of_a_checkpoint(moment: str, tmp_path: Path, nursery: Nursery) -> None:
    """The first checkpoint, and one that has an older one to fall back on."""
    assert nursery.attempt(tmp_path / "whole", 10) == 0
    for number in (1, 2):
        folder = tmp_path / str(number)
        assert nursery.attempt(folder, 10, moment=moment, number=number) == -signal.SIGKILL
        assert nursery.attempt(folder, 10) == 0
        assert difference(end_of(tmp_path / "whole"), end_of(folder)) is None


@pytest.mark.parametrize("moment", ["open", "half written"])
def test_a_write_over_the_old_file_loses_the_run(moment: str, tmp_path: Path, nursery: Nursery) -> None:
    """The twin: the same kill, without the second file."""
    assert nursery.attempt(tmp_path, 10, atomic=False, moment=moment, number=3) == -signal.SIGKILL
    assert nursery.attempt(tmp_path, 10, atomic=False) == 1
    with pytest.raises((RuntimeError, EOFError, ValueError, OSError)):
        end_of(tmp_path)


def test_a_step_that_is_not_resumed_is_noticed(tmp_path: Path, nursery: Nursery) -> None:
    """The comparison sees what a run leaves out: here that its checkpoint lacks one step."""
    assert nursery.attempt(tmp_path / "whole", 10) == 0
    assert nursery.attempt(tmp_path / "other", 9) == 0
    assert difference(end_of(tmp_path / "whole"), end_of(tmp_path / "other")) is not None
