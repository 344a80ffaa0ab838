"""One process that forks for the scripts of all tests in this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from forked_scripts import ForkedScripts
from optional import THEIR_WARNINGS


@pytest.fixture(scope="session")
def forked_scripts() -> Iterator[ForkedScripts]:
    scripts = ForkedScripts(THEIR_WARNINGS)
    yield scripts
    scripts.close()
