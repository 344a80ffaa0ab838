"""GPU tests run where there is a GPU and are reported as skipped elsewhere; there, Triton kernels are interpreted."""

import gc
import os
import sys
from collections.abc import Iterator

import pytest
import quick_interpreter
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Collect no garbage during the imports, which leave little: it would take seconds."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish() -> None:
    """Leave what was imported by now out of garbage collections, which many tests ask for: 0.4 s each otherwise."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let the interpreter free everything when it ends: Triton's library complains of what it does not free."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _graphs_of_its_own() -> Iterator[None]:
    """Each test may record as many CUDA graphs as a process may."""
    yield
    if graphs := sys.modules.get("selective.kernels.gpu.graphs"):
        graphs.BUDGET._recorded.clear()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    moving = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if moving:  # each worker would have another name for it, and pytest-xdist would run nothing
        raise pytest.UsageError(f"the name of a test has an address in memory; give it ids: {moving[0]}")
    if torch.cuda.is_available():
        return
    if "triton" in sys.modules:
        quick_interpreter.install()
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
