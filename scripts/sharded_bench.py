"""Times whole training steps in every layout: torch's fused AdamW, and `SelectiveUpdate` around it, in turns.

    python scripts/sharded_bench.py --processes 1 2 4 --layout fsdp hsdp fsdp-tp ddp --model llama-110m --out FILE
    python scripts/sharded_bench.py --processes 2 --shapes llama-60m --statistics

A row for each contender: the median milliseconds of a step (forward, backward, optimizer) and of the optimizer alone,
on the slowest rank, their ratios to AdamW's in the same layout, and the launches, collectives, bytes and host waits of
the optimizer's step. With `--shapes` there is no model: the optimizer steps parameters of these shapes. It starts the
processes itself, as `sharded.py` does, and runs under torchrun, too. On CPUs it counts, and reports no times.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sharded_checks.layouts import LAYOUTS, Bag, Layout, cut_like, unfit
from sharded_checks.model import SIZES, Llama
from sharded_checks.processes import Processes, Ranks, is_rank, join
from sharded_checks.results import about
from sharded_checks.waits import waiting
from torch.optim import Optimizer

from selective import MGUP, Cautious, CautiousMGUP, Eigenbasis, RandomMask, SelectiveUpdate
from selective.bench.clock import clock_of
from selective.bench.rotations import TimedCall
from selective.bench.shapes import SHAPES
from selective.bench.traffic import all_reduces
from selective.compare.model import loss as next_token_loss

Make = Callable[[Optimizer], Optimizer]
PLAIN = "torch AdamW"
SELDOM: dict[str, Any] = {"refresh_every": 10**6, "stagger": False}  # a step between refreshes
OPTIONS: dict[str, dict[str, Any]] = {
    "agreement": {"policy": CautiousMGUP()},
    "agreement, mean-preserving": {"policy": Cautious()},
    "exact top-K": {"policy": MGUP()},
    "random": {"policy": RandomMask()},
    "rotated, unsharded side": {"preconditioner": Eigenbasis(sides="unsharded", **SELDOM)},
    "rotated, gathered": {"preconditioner": Eigenbasis(sides="two", **SELDOM)},
}

COLUMNS = ("processes", "layout", "contender", "ms", "× AdamW", "optimizer, ms", "× AdamW", "launches", "collectives",
           "bytes", "host waits")  # fmt: skip


def contenders(wanted: list[str] | None, with_statistics: bool, layout: str) -> dict[str, Make]:
    """The contenders of these names; by default all. Nothing is unsharded where nothing is sharded."""
    names = [name for name in wanted or OPTIONS if not (layout == "ddp" and name == "rotated, unsharded side")]
    found: dict[str, Make] = {PLAIN: lambda base: base}
    for name in names:
        for reported in (False, True) if with_statistics and "policy" in OPTIONS[name] else (False,):
            options = {**OPTIONS[name], "statistics": reported}
            found[name + ", statistics" * reported] = lambda base, options=options: SelectiveUpdate(base, **options)
    return found


class Contender:
    """A model, or parameters alone, in one layout, with an optimizer over them."""

    def __init__(self, make: Make, layout: Layout, args: argparse.Namespace) -> None:
        self.layout, self.ranks, self.args = layout, layout.ranks, args
        if args.shapes is None:
            self.size = SIZES[args.model]
            self.module = layout.cut_model(Llama(self.size, self.ranks.device))
        else:
            values = torch.Generator(self.ranks.device).manual_seed(0)
            shapes = SHAPES[args.shapes][: args.tensors]
            self.module = layout.cut_bag(
                Bag(torch.randn(s, generator=values, device=self.ranks.device) * 0.02 for s in shapes)
            )
        params = list(self.module.parameters())
        self.optimizer = make(torch.optim.AdamW(params, lr=1e-4, fused=True))
        self.draws = torch.Generator().manual_seed(0)
        self.whole: list[float] = []
        self.own: list[float] = []

    def backward(self) -> None:
        """Make gradients: those of a batch, or given ones, which stay."""
        if self.args.shapes is not None:
            for number, p in enumerate(self.module.parameters()):
                if p.grad is None:
                    values = torch.Generator(self.ranks.device).manual_seed(number)
                    p.grad = cut_like(torch.randn(p.shape, generator=values, device=self.ranks.device), p)
            return
        share, shares = self.layout.batches
        windows = torch.randint(
            self.size.vocabulary, (shares, self.args.batch, self.size.context), generator=self.draws
        )
        with torch.autocast(self.ranks.device.type, torch.bfloat16):
            loss = next_token_loss(self.module, windows[share].to(self.ranks.device))
        loss.backward()

    def step(self) -> None:
        dist.barrier()
        began = self._now()
        self.backward()
        before = self._now()
        self.optimizer.step()
        after = self._now()
        if self.args.shapes is None:
            self.optimizer.zero_grad()
        self.whole.append((after - began) * 1e3)
        self.own.append((after - before) * 1e3)

    def _now(self) -> float:
        if self.ranks.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def counted(self) -> dict[str, Any]:
        """Count what the optimizer's step sends and launches, and its waits for the GPU. All ranks count together."""
        self.backward()
        with all_reduces() as sent:
            self.optimizer.step()
        row: dict[str, Any] = {"collectives": len(sent), "bytes": sum(sent), "launches": None, "waits": None}
        if self.ranks.on_gpu:
            row["waits"] = waiting(self.optimizer.step) or "no"
            clock = clock_of("cuda")
            probe = clock.launches(TimedCall(lambda: torch.zeros(1, device=self.ranks.device)))
            if all(self.ranks.gathered(probe is not None)):  # else ranks would take different numbers of steps
                row["launches"] = sum((clock.launches(TimedCall(self.optimizer.step)) or {}).values())
        return row


def rows_of(layout: Layout, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time the contenders of one layout, then count what they do: torch's profiler makes later launches slower."""
    makers = contenders(args.contender, args.statistics, layout.name)
    times = {name: _raced(makers, name, layout, args) if layout.ranks.on_gpu else {} for name in makers}
    rows = []
    for name, make in makers.items():
        contender = Contender(make, layout, args)
        for _ in range(args.warmup):
            contender.step()
        row = {"layout": layout.name, "processes": layout.ranks.size, "contender": name}
        rows.append({**row, **times[name], **contender.counted()})
        del contender
        gc.collect()  # FSDP's modules and parameters refer to each other
    return rows


def _raced(makers: dict[str, Make], name: str, layout: Layout, args: argparse.Namespace) -> dict[str, float]:
    """Time one contender in turns with torch's AdamW, so that both meet the same conditions.

    There are two models at a time; of AdamW itself one.
    """
    racing = {one: Contender(makers[one], layout, args) for one in dict.fromkeys((PLAIN, name))}
    for _ in range(args.warmup + args.steps):
        for contender in racing.values():
            contender.step()
    times = _times(racing[name], racing[PLAIN], args.warmup)
    del racing
    gc.collect()
    return times


def _times(contender: Contender, plain: Contender, warmup: int) -> dict[str, float]:
    """Medians on the slowest rank, and medians of the ratios of neighbouring steps."""
    mine, theirs = ((c.whole[warmup:], c.own[warmup:]) for c in (contender, plain))
    medians = [statistics.median(times) for times in mine]
    ratios = [
        statistics.median(a / b for a, b in zip(here, there, strict=True))
        for here, there in zip(mine, theirs, strict=True)
    ]
    slowest = [max(values) for values in zip(*contender.ranks.gathered(medians + ratios), strict=True)]
    names = ("step_ms", "optimizer_ms", "step_ratio", "optimizer_ratio")
    return {name: round(value, 4) for name, value in zip(names, slowest, strict=True)}


def on_this_rank(args: argparse.Namespace) -> None:
    """Time all layouts as one of the processes. The first one writes the rows."""
    ranks, rows = join(args.cpu), []
    try:
        for name in args.layout:
            reason = unfit(name, ranks.size)
            rows += rows_of(Layout(name, ranks), args) if reason is None else [_refused(name, ranks, reason)]
            if ranks.rank == 0:
                args.out.write_text(json.dumps({"about": about(ranks.device), "rows": rows}))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # so that no other rank waits
    dist.barrier()


def _refused(name: str, ranks: Ranks, reason: str) -> dict[str, Any]:
    return {"layout": name, "processes": ranks.size, "contender": None, "not_run": reason}


def printed(row: dict[str, Any]) -> str:
    """One row of the table. What was not measured is a dash."""
    if "not_run" in row:
        return f"| {row['processes']} | {row['layout']} | not run: {row['not_run']} |" + " |" * 7
    keys = ("step_ms", "step_ratio", "optimizer_ms", "optimizer_ratio", "launches", "collectives", "bytes", "waits")
    cells = [row["processes"], row["layout"], row["contender"], *(row.get(key) for key in keys)]
    return f"| {' | '.join(_cell(value) for value in cells)} |"


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--processes", type=int, nargs="+", help="numbers of processes, one after the other; default: all GPUs, or 4")
    add("--layout", nargs="+", choices=LAYOUTS, default=["fsdp"])
    add("--model", choices=SIZES, default="llama-110m" if torch.cuda.is_available() else "tiny")
    add("--shapes", choices=sorted(SHAPES), help="no model: parameters of these shapes")
    add("--tensors", type=int, help="number of tensors to take of the shapes")
    add("--contender", nargs="+", choices=OPTIONS, help="default: all")
    add("--statistics", action="store_true", help="policies with statistics, too")
    for name, default in {"batch": 8, "steps": 30, "warmup": 5}.items():
        add(f"--{name}", type=int, default=default)
    add("--out", type=Path, help="JSON file of the rows")
    add("--cpu", action="store_true", help="gloo, also where there are GPUs")
    add("--seconds", type=float, default=3000, help="limit of the processes of one run")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = options(argv)
    if is_rank():
        args.out = args.out or Path("sharded_bench.json")
        on_this_rank(args)
        sys.stdout.flush()
        os._exit(0)  # gloo's threads have aborted the interpreter's end
    found: dict[str, Any] = {"command": "python scripts/sharded_bench.py " + " ".join(argv), "rows": []}
    for number, count in enumerate(args.processes or [(0 if args.cpu else torch.cuda.device_count()) or 4]):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "rows.json"
            code = Processes([sys.executable, str(Path(__file__).resolve()), *argv, "--out", str(out)], count).wait(
                args.seconds
            )
            here = json.loads(out.read_text()) if out.exists() else {"about": {}, "rows": []}
        if number == 0:
            print(", ".join(here["about"].values()), args.shapes or args.model)
            print("| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * len(COLUMNS))
        print("\n".join(printed(row) for row in here["rows"]), flush=True)
        found = {**found, "about": here["about"], "rows": found["rows"] + here["rows"]}
        if args.out is not None:
            args.out.write_text(json.dumps(found, indent=1) + "\n")
        if code:
            print(f"{count} processes ended with {code}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
