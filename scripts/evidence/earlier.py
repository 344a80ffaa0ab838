"""The results of earlier runs, those of `gain.py` and of the demo, in the form of the records here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from evidence.runs import Record, Results
from selective.compare import build, summarise


def of_gain(folder: Path) -> Results:
    """The records of a folder that `gain.py` wrote. Their task is the name of the folder."""
    return Results(_of_gain(json.loads(file.read_text()), folder.name) for file in sorted(folder.glob("*-seed*.json")))


def _of_gain(record: dict[str, Any], task: str) -> Record:
    """The record with what the first ones lack: `part`, and times and divergence in a place of their own."""
    validation = record["validation"]
    lacking = {"part": 1.0, "rest_lr": None, "diverged": not math.isfinite(validation["loss"][-1]),
               "seconds_to_validation": validation.get("seconds")}  # fmt: skip
    whole = {**lacking, **record, "task": task}
    return {"alone": whole["seconds_to_validation"] is not None, **whole}


def of_demo(file: Path) -> dict[int, dict[int, Record]]:
    """The runs of a comparison at everyone's best rate, by the number of the contender and by seed."""
    result = json.loads(file.read_text())
    rows = summarise(build(result["config"]), result["runs"]).rows
    best = {row.contender.index: row.lr for row in rows if row.best}
    return {
        contender: {r["seed"]: r for r in result["runs"] if (r["contender"], r["lr"]) == (contender, lr)}
        for contender, lr in best.items()
    }
