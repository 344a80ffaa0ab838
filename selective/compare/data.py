"""The text, as bytes: read, split, and cut into batches that depend on the seed and the step alone."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from selective.compare.config import ConfigError, DataConfig

NOT_SOURCE = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
SEPARATOR = b"\x00"  # between files; does not occur in Python source


@dataclass(frozen=True)
class Text:
    """Training and held-out bytes, each a 1-d uint8 tensor, and the name of their source."""

    train: Tensor
    validation: Tensor
    source: str

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of both parts, which a resumed comparison checks."""
        digest = hashlib.sha256()
        for part in (self.train, self.validation):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part.numpy().tobytes())
        return digest.hexdigest()


def load(config: DataConfig, context: int, batch: int) -> Text:
    """Read the text and check that it is enough for windows of `context` + 1 bytes. Raises ConfigError."""
    if config.file is None:
        train, validation = _standard_library(config)
        source = "Python standard library source"
    else:
        train, validation = _file(config)
        source = str(config.file)
    for name, part, needed in (("training", train, batch * (context + 1)), ("held-out", validation, context + 1)):
        if len(part) < needed:
            raise ConfigError(
                f"{source}: only {len(part):,} bytes of {name} text, at least {needed:,} are needed for windows of "
                f"{context + 1} bytes; give more text with --data (or raise data.max_bytes), or lower model.context"
            )
    return Text(_tensor(train), _tensor(validation), source)


def _tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def _file(config: DataConfig) -> tuple[bytes, bytes]:
    """Read the file and hold out its last share. A random cut would leak, because neighbouring lines are alike."""
    assert config.file is not None
    try:
        text = config.file.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"--data {config.file}: cannot be read ({error.strerror}); name a text file, or leave --data out to train "
            "on the Python standard library's source"
        ) from error
    if not text:
        raise ConfigError(f"--data {config.file}: the file is empty; name a file with text in it")
    cut = len(text) - round(len(text) * config.validation)
    return text[:cut], text[cut:]


def _standard_library(config: DataConfig) -> tuple[bytes, bytes]:
    """Read the standard library's files, and put each whole on one side by the hash of its name.

    If they exceed `max_bytes`, the files whose hash comes first are taken.
    """
    root = Path(sysconfig.get_path("stdlib"))
    train, validation, size = [], [], 0
    for share, path in sorted((_share(path, root), path) for path in source_files(root)):
        text = path.read_bytes()
        if not text or size + len(text) > config.max_bytes:
            continue
        size += len(text) + len(SEPARATOR)
        # The order is by one part of the hash and the side by another, so that the cap does not change the split.
        (validation if share[1] < config.validation else train).append(text)
    return SEPARATOR.join(train), SEPARATOR.join(validation)


def source_files(root: Path) -> Iterator[Path]:
    """Python files below `root`, without installed packages and tests (whose tables of literals are not prose)."""
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in NOT_SOURCE]  # packages may be many times as many files
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _share(path: Path, root: Path) -> tuple[float, float]:
    """Two numbers in [0, 1) from the file's name: its place in the order, and its place in the split."""
    digest = hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48, int.from_bytes(digest[6:12], "big") / 2**48


def batch(text: Tensor, seed: int, step: int, windows: int, context: int) -> Tensor:
    """Batch `step` of `seed`: int64 (windows, context + 1), a function of its arguments and of nothing else.

    So every contender sees the same batches, and a resumed run goes on with the right one without a saved generator.
    """
    digest = hashlib.sha256(f"batch {seed} {step}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    start = torch.randint(0, len(text) - context, (windows, 1), generator=generator)
    return text[start + torch.arange(context + 1)].long()


def held_out(text: Tensor, windows: int, context: int) -> Tensor:
    """At most `windows` windows, evenly spread and not overlapping: int64 (windows, context + 1)."""
    count = min(windows, len(text) // (context + 1))
    start = torch.arange(count) * (len(text) // count)
    return text[start[:, None] + torch.arange(context + 1)].long()
