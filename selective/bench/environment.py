"""The facts about machine and versions without which a measurement can't be read later."""

from __future__ import annotations

import datetime
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent


def environment(device: str) -> dict[str, Any]:
    """Versions, processors, date, and the commit where the package is in a checkout."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "device": device,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
    }


def commit(folder: Path = HERE) -> str | None:
    """The commit of the checkout `folder`, with "+" if files differ from it; None if it is no checkout.

    git has to know this very folder: an environment inside of somebody's checkout is not part of it.
    """

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if not git("ls-files", "."):
        return None
    head, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    return head and head + ("+" if changed else "")


def small_for_cache(device: str, bytes_touched: float) -> bool:
    """True if a step's data stays in the device's cache until the next step. Known for CUDA only."""
    if device != "cuda":
        return False
    return bytes_touched < 4 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
