"""Draws demo.png of README.md: what `make demo` found, from the file of that measurement and with the demo's own plots.

    python docs/pictures/demo.py [FILE]

The picture carries the SHA-256 of the file that it was drawn from, so that a test notices when the two part.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from selective.compare import build, summarise
from selective.compare.plots import write_plots

RESULTS = Path(__file__).parents[1] / "measurements" / "2026-11-30-demo.json"


def draw(results: Path, target: Path) -> None:
    content = results.read_bytes()
    found = json.loads(content)
    config = build(found["config"])
    marks = PngInfo()
    marks.add_text("results-sha256", hashlib.sha256(content).hexdigest())
    with tempfile.TemporaryDirectory() as folder:
        write_plots(config, summarise(config, found["runs"]), found["runs"], Path(folder))
        with Image.open(Path(folder, "loss.png")) as picture:
            picture.save(target, pnginfo=marks, optimize=True)


if __name__ == "__main__":
    draw(RESULTS, Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("demo.png"))
