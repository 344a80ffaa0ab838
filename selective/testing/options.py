"""The command line of the suite under pytest: what `-p selective.testing` adds. pytest itself is imported when it asks.

The package re-exports both hooks: pytest looks for them in the module that `-p` names.
"""

from __future__ import annotations

from argparse import ArgumentTypeError
from pathlib import Path
from typing import Any

AN_OPTIMIZER = "torch.optim:AdamW(lr=0.01)"


def _factor(text: str) -> float:
    value = float(text)
    if not 1 <= value < float("inf"):
        raise ArgumentTypeError(f"{text} is no factor of at least 1")
    return value


def _file(text: str) -> str:
    folder = Path(text).resolve().parent
    if not folder.is_dir():
        raise ArgumentTypeError(f"there is no folder {folder}")
    return text


def pytest_addoption(parser: Any) -> None:
    """pytest's hook: the options."""
    group = parser.getgroup("conformance", "conformance of optimizer wrappers (selective.testing)")
    group.addoption(
        "--wrapper", metavar="SPEC",
        help='what to check: module:name, or "module:name(key=value)", called with a base optimizer and the keyword '
        "arguments; returns the wrapped one. Checks are run instead of tests, or after those of paths that are given",
    )  # fmt: skip
    group.addoption(
        "--wrapper-base", metavar="SPEC", action="append", default=None,
        help=f'what to wrap: module:name or "module:name(key=value)", called with the parameters; may be repeated '
        f"(default: {AN_OPTIMIZER})",
    )  # fmt: skip
    group.addoption(
        "--wrapper-model", choices=["mixed", "matrices"], default="mixed",
        help="what is trained: parameters of all kinds (the default), or only matrices, for bases such as Muon",
    )  # fmt: skip
    group.addoption(
        "--wrapper-cap", metavar="FACTOR", type=_factor, default=10.0,
        help="the largest factor by which the wrapper may enlarge a coordinate's step (row 29; default: 10)",
    )  # fmt: skip
    group.addoption(
        "--wrapper-copies", metavar="COPIES", type=float, default=None,
        help="the memory that the wrapper claims to keep beside its base, in copies of the parameters (row 23)",
    )  # fmt: skip
    group.addoption(
        "--wrapper-strict", action="store_true",
        help="hold it also to what the base alone gets wrong, where a wrapper can do better (exact dtypes of state)",
    )  # fmt: skip
    group.addoption("--wrapper-json", metavar="FILE", type=_file, help="write all outcomes to this file")


def pytest_configure(config: Any) -> None:
    """pytest's hook: where a wrapper is named, the checks become its items."""
    if config.option.wrapper is not None:
        from selective.testing.plugin import Conformance

        bases = config.option.wrapper_base or [AN_OPTIMIZER]
        config.pluginmanager.register(Conformance(config, bases), "selective-conformance")
