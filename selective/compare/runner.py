"""Comparison: runs all that is not done yet, and keeps the results in a folder.

OUT/config.json     the configuration as it was resolved, what identifies the data, the measured bytes
OUT/runs/KEY.json   the record of each finished run
OUT/runs/KEY.pt     the checkpoint of each run that was interrupted or has failed
OUT/results.json    everything together, rewritten whenever a run ends
OUT/loss.png, OUT/share.png
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from selective.base.generators import generators_restored
from selective.compare import memory, workers
from selective.compare.check_task import try_out
from selective.compare.config import CompareConfig, ConfigError, build, differences, dump
from selective.compare.contenders import Run, contenders, runs
from selective.compare.devices import cores, worker_count
from selective.compare.setup import Given, prepare
from selective.compare.summary import Summary, as_json, summarise
from selective.compare.task import start_of
from selective.compare.train import Record, fingerprint, write_atomically

SCHEMA = 1  # the version of the form of results.json


class Comparison:
    """A comparison in its folder.

    Attributes:
        setup: the configuration, the task and the functions that make optimizers.
        records: every run that has begun, by key, as plain JSON data.
        contenders, runs: all of them, in order.

    Args:
        config: what is compared.
        folder: where the results are written.
        resume: go on with the comparison in the folder.
        overwrite: delete the comparison in the folder.
        given: the task and the functions that are handed over as objects, instead of by name in `config`.

    Raises:
        ConfigError: the comparison can't be run, or the folder holds another one.
    """

    def __init__(
        self,
        config: CompareConfig,
        folder: Path,
        resume: bool = False,
        overwrite: bool = False,
        given: Given | None = None,
    ) -> None:
        self.config, self.folder = config, folder
        _check_device(config.device)
        self._given = Given() if given is None else given
        self.setup = prepare(config, self._given)
        self.contenders = contenders(config)
        self.runs = runs(config)
        self.records: dict[str, Record] = {}
        self.bytes = self._open(resume, overwrite)

    def _open(self, resume: bool, overwrite: bool) -> list[dict[str, int | None]]:
        saved = self.folder / "config.json"
        if resume and saved.exists():
            description = read_json(saved)
            self._check_same(description)
            for run in self.runs:
                path = self.folder / "runs" / f"{run.key}.json"
                if path.exists():
                    self.records[run.key] = read_json(path)
            return description["bytes"]
        if resume:
            raise ConfigError(
                f"--resume: {self.folder} holds no comparison (no config.json); name its folder with --out"
            )
        if saved.exists() and not overwrite:
            raise ConfigError(
                f"{self.folder} already holds a comparison; --resume goes on with it, --overwrite deletes it, "
                "--out names another folder"
            )
        # Before anything is deleted, because a contender that can't be built fails here.
        if not self.setup.built_in:
            try_out(self.setup)
        facts = self._facts()
        measured = memory.measure(self.setup)
        if saved.exists():
            shutil.rmtree(self.folder / "runs", ignore_errors=True)
            for name in ("results.json", "loss.png", "share.png"):
                (self.folder / name).unlink(missing_ok=True)
        content = {"config": dump(self.config), **facts, "bytes": measured}
        try:
            write_atomically(saved, json.dumps(content, indent=1).encode())
        except OSError as error:
            raise ConfigError(
                f"--out {self.folder}: cannot be written to ({error.strerror}); name a folder of yours, or one that is "
                "not there yet"
            ) from error
        return measured

    def _facts(self) -> dict[str, Any]:
        """The JSON data that identifies model and data: of a task of the user's, also its model at the start."""
        facts = self.setup.facts()
        if self.setup.built_in:
            return facts
        with generators_restored():
            model = start_of(self.setup.task, self.config.seeds[0])
        return {"task": {**facts["task"], "start_sha256": fingerprint(model)}}

    def _check_same(self, description: dict[str, Any]) -> None:
        free = ("workers", "imports")  # settings that don't change the numbers
        before = {**dump(build({})), **description["config"]}  # settings that did not exist then had their defaults
        old, new = ({k: v for k, v in c.items() if k not in free} for c in (before, dump(self.config)))
        lines = differences(old, new)
        for name, facts in self._facts().items():
            lines += differences(description.get(name, {}), json.loads(json.dumps(facts)), f"{name}.")
        if lines:
            raise ConfigError(
                f"--resume: {self.folder} holds another comparison, whose runs cannot be set beside these:\n  "
                + "\n  ".join(lines)
                + "\nLeave these settings as they were, or start a new one with another --out"
            )

    def todo(self) -> list[Run]:
        return [run for run in self.runs if not self.records.get(run.key, {}).get("complete")]

    @property
    def complete(self) -> bool:
        return not self.todo()

    @property
    def failed(self) -> list[Record]:
        """The records of the runs that failed, each with its reason under "failed"."""
        return [record for record in self.records.values() if record.get("failed")]

    @property
    def summary(self) -> Summary:
        """The summary of the runs that are done."""
        return summarise(self.config, list(self.records.values()))

    def run(self, handle: Callable[[workers.Progress | Record], None]) -> bool:
        """Run what is not done, and write the results. Returns False if it was interrupted.

        A run that fails does not stop the others; `failed` lists it. It is tried again by the next call.
        """
        stop = workers.Stop()
        checkpoints = self.folder / "runs"

        def keep(message: workers.Progress | Record) -> None:
            if isinstance(message, dict):
                self._keep(message)
            handle(message)

        with stop.listening():
            for record in self.failed:
                del self.records[record["key"]]
            todo, count = self.todo(), worker_count(self.config)
            try:
                if min(count, len(todo)) > 1:
                    workers.apart(self.setup, self._given, todo, checkpoints, count, stop, keep)
                else:
                    workers.here(self.setup, todo, checkpoints, stop, keep)
            finally:
                self.write()
        return len(self.todo()) == len(self.failed)

    def _keep(self, record: Record) -> None:
        self.records[record["key"]] = record
        if record["complete"]:
            path = self.folder / "runs" / f"{record['key']}.json"
            write_atomically(path, json.dumps(record).encode())
            path.with_suffix(".pt").unlink(missing_ok=True)
        if record["complete"] or record["failed"]:
            self.write()

    def results(self) -> dict[str, Any]:
        """The content of results.json, as plain JSON data."""
        return {
            "schema": SCHEMA,
            "config": dump(self.config),
            **self.setup.facts(),
            "environment": environment(self.config),
            "memory": {"how": memory.HOW, "contenders": self.bytes},
            "contenders": [
                {
                    "index": c.index, "label": c.label, "role": c.role, "of": c.of, "rates": c.rates,
                    "rest_rates": c.rest_rates, "optimizer": c.maker,
                    "policy": None if c.policy is None else c.policy.model_dump(mode="json"),
                    "preconditioner": None if c.preconditioner is None else c.preconditioner.model_dump(mode="json"),
                }
                for c in self.contenders
            ],
            "complete": self.complete,
            "summary": as_json(self.summary),
            "runs": [self.records[run.key] for run in self.runs if run.key in self.records],
        }  # fmt: skip

    def write(self) -> None:
        write_atomically(self.folder / "results.json", json.dumps(self.results(), allow_nan=False).encode())


def _check_device(name: str) -> None:
    """Refuse a device that can't be used. torch's own errors would come late and speak of other things."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"device: {name!r} cannot be used here ({str(error).splitlines()[0]}); leave it out for the CPU, or write "
            "cuda where torch has been built for it"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not valid JSON ({error}); delete it to have that part run again") from error


def environment(config: CompareConfig) -> dict[str, Any]:
    """The versions and the machine that the numbers come from."""
    try:
        version = metadata.version("selective-update")
    except metadata.PackageNotFoundError:
        version = "not installed"
    return {
        "selective": version,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
        "processor": processor(),
        "device": torch.cuda.get_device_name(config.device) if config.device.startswith("cuda") else config.device,
        "cores": cores(),
        "threads": config.threads,
        "workers": worker_count(config),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
