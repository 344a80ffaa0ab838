"""The options that `-p selective.testing` adds to pytest. Nothing here imports pytest: it calls these hooks itself.

The package re-exports both hooks, because pytest looks for them in the module that `-p` names.
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
    """pytest's hook that adds the options."""
    group = parser.getgroup("conformance", "conformance of optimizer wrappers (selective.testing)")
    group.addoption(
        "--wrapper", metavar="SPEC",
        help='wrapper to check: module:name, or "module:name(key=value)"; it is called with a base optimizer and the '
        "keyword arguments, and returns the wrapped one. The checks run instead of tests, or after the tests of paths "
        "that are given",
    )  # fmt: skip
    group.addoption(
        "--wrapper-base", metavar="SPEC", action="append", default=None,
        help=f'base to wrap: module:name or "module:name(key=value)", called with the parameters; may be repeated '
        f"(default: {AN_OPTIMIZER})",
    )  # fmt: skip
    group.addoption(
        "--wrapper-model", choices=["mixed", "matrices"], default="mixed",
        help="model to train: parameters of all kinds (the default), or only matrices, for bases such as Muon",
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
        help="also fail the wrapper for faults of the base that a wrapper can mend (exact dtypes of state)",
    )  # fmt: skip
    group.addoption("--wrapper-json", metavar="FILE", type=_file, help="write all outcomes to this file")


def pytest_configure(config: Any) -> None:
    """pytest's hook that makes the checks its items, if a wrapper is named."""
    if config.option.wrapper is not None:
        from selective.testing.plugin import Conformance

        bases = config.option.wrapper_base or [AN_OPTIMIZER]
        config.pluginmanager.register(Conformance(config, bases), "selective-conformance")
