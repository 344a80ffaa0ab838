"""Measures rows over one model: each alone at first, and then all in turns, so that drift reaches all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from selective.bench.clock import CudaClock, HostClock, clock_of, count_launches, device_seconds
from selective.bench.contenders import Contender
from selective.bench.measure import Outcome, outcome_of
from selective.bench.shapes import MODELS
from selective.bench.training.facts import state_bytes, ways_of
from selective.bench.training.groups import groups_of
from selective.bench.training.records import RowMeasurement, TrainingResult
from selective.bench.training.rows import FUSED, Row
from selective.bench.training.steps import AlternatingGradients, host_seconds, in_a_row, wall_seconds
from selective.bench.workload import Stepping, Workload

# Steps, the first included. Of rotated rows so many that every matrix has its first basis, also where they take turns.
WARM_UP, WARM_UP_ROTATED = 4, 12
MEMORY_SHARE = 0.6  # of the device's memory for the states of rows that are timed in turns


@dataclass(eq=False)
class _Timed:
    """A row that is ready, with its optimizer."""

    row: Row
    measurement: RowMeasurement
    stepping: Stepping
    round_seconds: float = 0.0  # of its last round, by the clock on the wall


Proof = Callable[[Row], tuple[Outcome, str | None, float | None]]
"""Checks a row. Returns the outcome, the reason why there will be no time, and the seconds of a first, cold step."""


class TrainingRig:
    """Parameters and gradients of one model, and the rows that are ready to be timed in turns.

    Args:
        model: a key of `MODELS`.
        proof: checks a row's result before it is measured.
        rounds: the number of rounds. A row's first one is right after it was made ready.
        new_gradients: every step finds its gradients in other tensors, as after `zero_grad()`.
        untouched: the share of an embedding's rows that has no gradient.
        deadline: by `time.monotonic`; no row is begun, and no round but its first, that would not end before it.
        tell: is called with a line of text for each row and round.
        save: is called with the result whenever it has grown.
    """

    def __init__(
        self, model: str, device: str, *, proof: Proof, rounds: int = 5, new_gradients: bool = False,
        untouched: float = 0.0, deadline: float | None = None,
        tell: Callable[[RowMeasurement | str], None] | None = None,
        save: Callable[[TrainingResult], None] | None = None,
    ) -> None:  # fmt: skip
        self.clock: HostClock = clock_of(device)
        self.kinds = [kind for kind, _ in MODELS[model]]
        embeddings = {place: untouched for place, kind in enumerate(self.kinds) if kind == "embeddings" and untouched}
        self.workload = Workload([shape for _, shape in MODELS[model]], device, untouched=embeddings)
        self.result = TrainingResult(
            model, device, len(self.workload.params), self.workload.elements, rounds, new_gradients, untouched
        )
        self.proof, self.deadline = proof, deadline
        self._tell, self._save = tell, save
        self.others = [g.clone() for g in self.workload.grads] if new_gradients else []
        self.fused: _Timed | None = None  # torch's fused step, which is timed in every round
        self.turns: list[_Timed] = []
        self.most_bytes = _most_bytes(device)

    def run(self, rows: Sequence[Row]) -> TrainingResult:
        """Measure all rows, torch's fused step before all others. After Ctrl-C, what was measured by then."""
        try:
            with self.clock.graphs_of_all():
                self._all(rows)
        except KeyboardInterrupt:
            self.result.interrupted = True
        return self.result

    def _all(self, rows: Sequence[Row]) -> None:
        for row in sorted(rows, key=lambda row: row.name != FUSED):
            if self._is_late(self._round_seconds()):
                self._add(RowMeasurement(row.name, "no time left", "the time was up before it was begun"))
                continue
            self._one(row)
            if sum(self._held(timed) for timed in self.turns) > self.most_bytes:
                self._take_turns()
        self._take_turns()

    def _is_late(self, coming: float) -> bool:
        """True if something that takes so many seconds would not end before the deadline."""
        return self.deadline is not None and time.monotonic() + coming > self.deadline

    def _round_seconds(self) -> float:
        """The time of a round of all rows that are ready."""
        return sum(timed.round_seconds for timed in self.turns)

    def _held(self, timed: _Timed) -> int:
        return (timed.measurement.state_bytes or 0) + (timed.measurement.kept_bytes or 0)

    def _add(self, measurement: RowMeasurement) -> None:
        self.result.measurements.append(measurement)
        if self._tell is not None:
            self._tell(measurement)
        if self._save is not None:
            self._save(self.result)

    def _one(self, row: Row) -> None:
        """Check a row, make it ready and time its first round. Any error becomes this row's reason."""
        measurement = RowMeasurement(row.name)
        if row.contender.missing is not None:
            measurement.outcome, measurement.refused = "missing", row.contender.missing
        else:
            measurement.outcome, measurement.refused, measurement.cold_seconds = self.proof(row)
        if measurement.refused is None:
            try:
                timed = _Timed(row, measurement, self._ready(row, measurement))
                if row.name == FUSED:
                    self.fused = timed
                else:
                    self.turns.append(timed)
                self._round([timed] if timed in self.turns else [])
            except Exception as wrong:  # other people's optimizers may raise anything
                self._fail(row, measurement, wrong)
        self.workload.hand_out()
        self.clock.settle()
        self._add(measurement)

    def _fail(self, row: Row, measurement: RowMeasurement, wrong: Exception) -> None:
        """Give a row the reason why it has no time, and drop its optimizer."""
        measurement.outcome, measurement.refused = outcome_of(wrong, row.contender)
        for times in (measurement.seconds, measurement.fused_seconds, measurement.host, measurement.fused_host):
            times.clear()
        self.turns = [timed for timed in self.turns if timed.measurement is not measurement]
        if self.fused is not None and self.fused.measurement is measurement:
            self.fused = None

    def _ready(self, row: Row, measurement: RowMeasurement) -> Stepping:
        """The row's optimizer after warming up, with everything measured for which it need not be timed in turns."""
        clock = self.clock
        before = clock.held_bytes()
        stepping = self._made(row, row.contender)
        measurement.first_seconds = self._warm_up(stepping, 1)
        rest = [self._warm_up(stepping, 1) for _ in range(_warm_up(row) - 1)]
        measurement.warm_up_seconds, measurement.steps_in_a_row = sum(rest), in_a_row(statistics.median(rest))
        optimizer = stepping.optimizer
        measurement.captures = ways_of(optimizer)
        measurement.state_bytes = state_bytes(optimizer)
        after = clock.held_bytes()
        if before is not None and after is not None:
            measurement.kept_bytes = after - before - measurement.state_bytes
        most = clock.extra_bytes(stepping, row.period)
        measurement.peak_bytes = most + (measurement.kept_bytes or 0)
        trace = clock.trace(stepping, row.period)
        launches = None if trace is None else count_launches(trace)
        if trace is not None and launches is not None:
            measurement.launches = {name: count / row.period for name, count in launches.items()}
            measurement.device_seconds = device_seconds(trace) / row.period
        if row.with_statistics is not None and isinstance(clock, CudaClock):
            reporting = self._made(row, row.with_statistics)
            self._warm_up(reporting, _warm_up(row))
            measurement.host_with_statistics = host_seconds(clock, reporting)
        return stepping

    def _made(self, row: Row, contender: Contender) -> Stepping:
        self.workload.hand_out()
        optimizer = contender.make_optimizer(groups_of(self.workload.params, self.kinds, row.policy_on))
        return (
            AlternatingGradients(optimizer, self.workload, self.others)
            if self.others
            else Stepping(optimizer, self.workload)
        )

    def _warm_up(self, stepping: Stepping, steps: int) -> float:
        """Take steps on new gradients. Returns the seconds of all of them, until the device is done."""
        taken = 0.0
        for _ in range(steps):
            self.workload.fresh_gradients()
            stepping.prepare()
            self.clock.synchronize()
            begun = time.perf_counter()
            stepping.step()
            self.clock.synchronize()
            taken += time.perf_counter() - begun
            stepping.clears_grad = stepping.clears_grad or any(p.grad is None for p in self.workload.params)
        return taken

    def _take_turns(self) -> None:
        """The rounds after the first one of the rows that are ready, in which the order alternates; then drop them."""
        for number in range(1, self.result.rounds):
            if not self.turns or self._is_late(self._round_seconds()):
                break
            if self._tell is not None:
                self._tell(f"{self.result.model}: round {number + 1} of {self.result.rounds}, {len(self.turns)} rows")
            self._round(self.turns[:: -1 if number % 2 else 1])
            if self._save is not None:
                self._save(self.result)
        self.turns.clear()
        self.clock.settle()

    def _round(self, rows: Sequence[_Timed]) -> None:
        """Time torch's fused step and each of these rows, on new gradients. A row that raises an error has no time."""
        if self.fused is None:
            raise RuntimeError(f"{FUSED} has no time, with which this row's would be compared")
        self.workload.fresh_gradients()
        fused = self._times(self.fused)
        for timed in (self.fused, *rows):
            measurement = timed.measurement
            try:
                wall, host = fused if timed is self.fused else self._times(timed)
            except Exception as wrong:  # other people's optimizers may raise anything
                self._fail(timed.row, measurement, wrong)
                continue
            measurement.seconds.append(wall)
            measurement.fused_seconds.append(fused[0])
            if host is not None and fused[1] is not None:
                measurement.host.append(host)
                measurement.fused_host.append(fused[1])

    def _times(self, timed: _Timed) -> tuple[float, float | None]:
        """The seconds of a step, by the clock on the wall and of the host alone."""
        begun = time.monotonic()
        self.workload.hand_out()
        wall = wall_seconds(self.clock, timed.stepping, timed.measurement.steps_in_a_row)
        host = host_seconds(self.clock, timed.stepping)
        timed.round_seconds = time.monotonic() - begun
        return wall, host


def _warm_up(row: Row) -> int:
    return WARM_UP if row.period == 1 and row.space is None else WARM_UP_ROTATED


def _most_bytes(device: str) -> float:
    """The bytes of state that may be held at a time."""
    if device == "cuda":
        return MEMORY_SHARE * torch.cuda.mem_get_info()[0]
    return 4 * 2**30
