"""One process that forks the ranks of all tests in this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from sharded_world import Starter


@pytest.fixture(scope="session")
def run_cases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., None]]:
    starter = Starter(tmp_path_factory.mktemp("sharded") / "starter.log")
    yield starter.run
    starter.stop()
