"""Makes the pictures of the masked autoencoder: small squares of the pictures in two packages.

    python scripts/evidence/pictures.py

The packages with their versions and licences are listed in `sources.py`: clip art, and stamps of a painting program,
some of which are photographs. Each picture is cut to what is not transparent, laid on white, and scaled into a square.
Pictures of the same name are held out together, or not at all. It needs the package Pillow. Nothing of it is in the
repository.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if __name__ == "__main__":  # the folder `evidence` is imported from `scripts`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from evidence.fetch import fetched, files_of
from evidence.packed import FOLDER, pack, unpack
from evidence.sources import PICTURES, Source, facts_of

NAME, SIZE, HELD_OUT = "pictures", 64, 0.1
NOT_TAKEN = ("/shapes/stars/", "/special/gradients/")  # a thousand stars that differ in the number of their points
_VARIANT = re.compile(r"[-_ .]*(\d+|mirror|flip|left|right|icon|vector)$")


@dataclass(frozen=True)
class Pictures:
    """Pictures to train on and held-out ones, uint8 (pictures, 3, size, size), and their facts."""

    train: Tensor
    held_out: Tensor
    facts: dict[str, Any]


def family(path: str) -> str:
    """The name of a picture without folder, ending, numbers and the like, so that variants have the same."""
    name = path.rpartition("/")[2].rpartition(".")[0].lower()
    while (shorter := _VARIANT.sub("", name)) and shorter != name:
        name = shorter
    return name


def is_held_out(path: str) -> bool:
    """True for a tenth of the pictures, by a hash of their family."""
    return int.from_bytes(hashlib.sha256(family(path).encode()).digest()[:6], "big") / 2**48 < HELD_OUT


def squared(content: bytes, size: int = SIZE) -> Tensor | None:
    """A picture in a square, uint8 (3, size, size). None if it is of one colour, huge, or unreadable."""
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(content)) as opened:
            picture = opened.convert("RGBA")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    picture = picture.crop(picture.getchannel("A").getbbox())
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    flat = Image.alpha_composite(white, picture).convert("RGB")
    scaled = ImageOps.pad(flat, (size, size), Image.Resampling.LANCZOS, color=(255, 255, 255))
    pixels = torch.frombuffer(bytearray(scaled.tobytes()), dtype=torch.uint8).view(size, size, 3)
    return None if (pixels == pixels[0, 0]).all() else pixels.permute(2, 0, 1).contiguous()


def of_package(source: Source, folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The pictures of a package with their paths, in the order of the paths."""
    for path, content in sorted(files_of(fetched(source, folder), source.pattern)):
        if not any(part in path for part in NOT_TAKEN) and (pixels := squared(content)) is not None:
            yield path, pixels


def make(folder: Path = FOLDER) -> Path:
    """Fetch the packages, and write the pictures. One that is the same as an earlier one to the pixel is left out."""
    taken: dict[bytes, tuple[str, Tensor]] = {}
    sources = []
    for source in PICTURES:
        before = len(taken)
        for path, pixels in of_package(source, folder / "packages"):
            taken.setdefault(pixels.numpy().tobytes(), (path, pixels))
        sources.append({**facts_of(source), "pictures": len(taken) - before})
    train, held_out = (
        torch.stack([pixels for path, pixels in taken.values() if is_held_out(path) == out]) for out in (False, True)
    )
    rule = f"pictures whose name's hash is in the first {HELD_OUT:.0%}; variants of a name are on one side"
    write(NAME, train, held_out, {"sources": sources, "held_out_rule": rule}, folder)
    return folder / f"{NAME}.json"


def write(name: str, train: Tensor, held_out: Tensor, facts: dict[str, Any], folder: Path = FOLDER) -> None:
    """Write `NAME.pictures.xz`, the pixels of both parts, and `NAME.json`."""
    content = torch.cat((train, held_out)).numpy().tobytes()
    sizes = {"train": len(train), "held_out": len(held_out), "shape": list(train.shape[1:])}
    pack(name, "pictures", content, {**facts, **sizes}, folder)


def read(name: str = NAME, folder: Path = FOLDER) -> Pictures:
    """Read what `write` wrote. Raises as `unpack` does."""
    content, facts = unpack(name, "pictures", "python scripts/evidence/pictures.py", folder)
    pixels = torch.frombuffer(content, dtype=torch.uint8).view(-1, *facts["shape"])
    return Pictures(pixels[: facts["train"]], pixels[facts["train"] :], facts)


if __name__ == "__main__":
    argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0]).parse_args()
    print(make().read_text())
