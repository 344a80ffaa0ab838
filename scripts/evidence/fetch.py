"""Fetches packages by the registries' ordinary clients, and reads the files in them."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from evidence.sources import Source

# Wheels of one platform, so that everyone gets the same files.
PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_17_x86_64", "manylinux_2_27_x86_64", "manylinux_2_28_x86_64", "any")


def fetched(source: Source, folder: Path) -> Path:
    """The archive of a package, which is downloaded into `folder` if it is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (archive := _archive(source, folder)):
        subprocess.run(_command(source), cwd=folder, check=True, stdout=subprocess.DEVNULL)
        archive = _archive(source, folder)
    if archive is None:
        raise FileNotFoundError(f"{source.package} {source.version}: {source.registry} served another version")
    return archive


def _archive(source: Source, folder: Path) -> Path | None:
    name = source.package.lstrip("@").replace("/", "-")
    patterns = {
        "PyPI": f"{name.replace('-', '_')}-{source.version}-*.whl",
        "Debian": f"{name}_{source.version.replace(':', '%3a')}_*.deb",
        "npm": f"{name}-{source.version}.tgz",
    }
    return next(iter(sorted(folder.glob(patterns[source.registry]))), None)


def _command(source: Source) -> list[str]:
    if source.registry == "Debian":
        return ["apt-get", "download", f"{source.package}={source.version}"]
    if source.registry == "npm":
        return ["npm", "pack", f"{source.package}@{source.version}"]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--python-version", "3.12"]
    return [*command, *(f"--platform={name}" for name in PLATFORMS), f"{source.package}=={source.version}"]


def files_of(archive: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """The files of a package whose path fits `pattern`, with their paths."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                if fnmatch(name, pattern):
                    yield name, wheel.read(name)
        return
    content = archive.read_bytes()
    if archive.suffix == ".deb":
        content = subprocess.run(["dpkg-deb", "--fsys-tarfile", archive], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(content)) as members:
        for member in members:
            if member.isfile() and fnmatch(member.name, pattern) and (file := members.extractfile(member)):
                yield member.name, file.read()
