"""Trainer: one training run, which can be stopped after any step and then goes on bit for bit."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from selective.compare.config import LoopConfig
from selective.compare.contenders import Run, make, parameter_names, shares
from selective.compare.setup import Setup
from selective.compare.task import Batches, evaluated, start_of, to_device

Record = dict[str, Any]  # plain JSON data, as `new_record` makes it
SHARES_IN_A_RUN = 60  # the columns of the heatmap


def schedule(loop: LoopConfig, steps: int) -> Callable[[int], float]:
    """The multiplier of the learning rate at step t = 0 .. steps - 1: a linear rise, then the fall of a cosine."""
    warmup = round(loop.warmup * steps)

    def multiplier(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
        return loop.final_lr + (1 - loop.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))

    return multiplier


def new_record(run: Run) -> Record:
    """An empty record of a run. A step is the number of steps done; losses are in the task's unit."""
    return {
        "key": run.key,
        "contender": run.contender.index,
        "lr": run.lr,
        "rest_lr": run.rest_lr,
        "seed": run.seed,
        "steps_done": 0,
        "complete": False,
        "diverged": False,  # a loss that is not finite ended the run
        "failed": None,  # why the run ended early, in a line: an error, or the signal that killed its process
        "train": {"step": [], "loss": []},  # loss of the batch before the step
        "validation": {"step": [], "loss": [], "lr": []},
        "seconds_to_validation": [],  # of training, until each of these evaluations; unknown is None
        "optimizer_ms": [],  # optimizer.step() alone, each step, in milliseconds
        "share": {"step": [], "by_parameter": {}},
        "training_seconds": 0.0,  # of all steps: batch, loss, gradients, optimizer; without evaluations and checkpoints
        "seconds": 0.0,  # of the whole run
        "parameters_sha256": None,  # of the final parameters
    }


class Trainer:
    """The model, optimizer and record of one run. `go` trains to the end or until it is told to stop."""

    def __init__(self, setup: Setup, run: Run) -> None:
        self.config, self.task, self.run = setup.config, setup.task, run
        self.record = new_record(run)
        self.model = start_of(self.task, run.seed).to(self.config.device)
        self.optimizer = make(setup, run, self.model)
        self.names = parameter_names(self.model, self.optimizer)
        self.scheduler = LambdaLR(self.optimizer, schedule(self.config.loop, self.config.steps))
        self.batches = Batches(self.task, run.seed)

    @property
    def done(self) -> int:
        return self.record["steps_done"]

    def go(
        self, stop: Callable[[], bool], report: Callable[[int, float], None], checkpoint: Path | None = None
    ) -> Record:
        """Train until the last step, a loss that is not finite, or `stop()`. Each step calls `report(step, loss)`."""
        before, begun = self.record["seconds"], time.perf_counter()
        if not self.record["validation"]["step"]:
            self.evaluate()
        while self.done < self.config.steps and not self.record["diverged"]:
            if stop():
                break
            report(self.done + 1, self.step())
            if checkpoint is not None and self.done % self.config.loop.checkpoint_every == 0:
                self.record["seconds"] = before + time.perf_counter() - begun
                self.save(checkpoint)
        else:
            self.record["complete"] = True
            self.record["parameters_sha256"] = fingerprint(self.model)
        self.record["seconds"] = before + time.perf_counter() - begun
        if checkpoint is not None and not self.record["complete"]:
            self.save(checkpoint)
        return self.record

    def step(self) -> float:
        """Train on one batch. Returns its loss before the step."""
        step, begun = self.done, time.perf_counter()
        value = self._update(step)
        self.record["training_seconds"] += time.perf_counter() - begun
        if self.record["diverged"]:
            return value
        self.record["train"]["step"].append(step)
        self.record["train"]["loss"].append(value)
        if step % max(1, self.config.steps // SHARES_IN_A_RUN) == 0:
            self._record_shares(step)
        self.scheduler.step()
        self.record["steps_done"] = step + 1
        if self.done % self.config.evaluate_every == 0 or self.done == self.config.steps:
            self.evaluate()
        return value

    def _update(self, step: int) -> float:
        """Move the parameters by one batch, unless its loss is not finite. Returns the loss."""
        batch = to_device(self.batches.at(step), self.config.device)
        loss = self.task.loss(self.model, batch)
        value = loss.item()
        if not math.isfinite(value):
            self.record["diverged"] = True
            return value
        self.optimizer.zero_grad()
        loss.backward()
        if self.config.loop.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.loop.clip)
        self._timed_step()
        return value

    def _timed_step(self) -> None:
        cuda = torch.device(self.config.device).type == "cuda"  # CUDA queues steps, so the timer has to wait
        if cuda:
            torch.cuda.synchronize(self.config.device)
        begun = time.perf_counter()
        self.optimizer.step()
        if cuda:
            torch.cuda.synchronize(self.config.device)
        self.record["optimizer_ms"].append(round(1e3 * (time.perf_counter() - begun), 4))

    def _record_shares(self, step: int) -> None:
        by_name = shares(self.optimizer, self.names)
        if by_name:
            self.record["share"]["step"].append(step)
            for name, share in by_name.items():
                self.record["share"]["by_parameter"].setdefault(name, []).append(round(share, 5))

    def evaluate(self) -> None:
        """Evaluate the model as it is now, and record the loss and how long training took until here."""
        value = evaluated(self.task, self.model, self.run.seed)
        if not math.isfinite(value):
            self.record["diverged"] = True
            return
        self.record["validation"]["step"].append(self.done)
        self.record["validation"]["loss"].append(value)
        self.record["validation"]["lr"].append(self.scheduler.get_last_lr()[0])
        self.record["seconds_to_validation"].append(round(self.record["training_seconds"], 4))

    def save(self, path: Path) -> None:
        buffer = io.BytesIO()
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "record": json.dumps(self.record),
            },
            buffer,
        )
        write_atomically(path, buffer.getvalue())

    def load(self, path: Path) -> None:
        """Load what `save` wrote, to go on from there."""
        saved = torch.load(path, map_location=self.config.device, weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        self.record = {**new_record(self.run), **json.loads(saved["record"])}
        times, evaluations = self.record["seconds_to_validation"], len(self.record["validation"]["step"])
        times += [None] * (evaluations - len(times))  # a checkpoint from before times were recorded


def fingerprint(network: nn.Module) -> str:
    """The SHA-256 of all parameters, which is equal for bit-identical runs."""
    digest = hashlib.sha256()
    for name, parameter in network.named_parameters():
        digest.update(name.encode())
        flat = parameter.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())  # as bytes: NumPy has no bfloat16
    return digest.hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that readers see the whole old file or the whole new one, even if the machine stops meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
