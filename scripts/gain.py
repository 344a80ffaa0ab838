"""What rotations and selection gain where a model is worth a GPU: the runs behind "What it gains" in the docs.

    python scripts/gain.py --out docs/measurements/gain --seconds 550
    python scripts/gain.py --out docs/measurements/gain --table

A LLaMA-style model (by default 33.6M parameters) on the source of the installed Python packages, cut into 8,192 tokens
by a byte-level BPE that is trained here; 600 steps of 65,536 tokens, cosine with warm-up, clipping, bfloat16 autocast.
Everyone is swept over learning rates; the runs come in the order of `plan`, each is written to a file of its own, and
what is there is not run again: so it can be done in several sittings, each ended by `--seconds`, and by several
processes with the same `--out`, on one machine: each takes the first run that is neither done nor being done.
Needs the packages tokenizers and, for one rival, pytorch_optimizer.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import math
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from selective import (
    MGUP,
    AdaDiag,
    Cautious,
    Policy,
    Preconditioner,
    RandomMask,
    SelectiveUpdate,
    Soap,
)
from selective.compare.config import LoopConfig, ModelConfig
from selective.compare.intervals import steps_to, t_interval
from selective.compare.model import GPT
from selective.compare.model import loss as loss_of
from selective.compare.spaces import groups_by_kind
from selective.compare.train import fingerprint, schedule, write_atomically

DECAY = 0.1
MGUP_MILD = MGUP(alpha=1.5, gamma=0.5)  # the paper's advice for bases whose learning rate is tuned
MASKS = ("MGUP", "Cautious")
SPACES: dict[str, Preconditioner] = {
    "Soap": Soap(solver="cholesky"),  # the space that its QR spans, in less time
    "AdaDiag++": AdaDiag(sides="two", refresh_every=50),
    "AdaDiag": AdaDiag(sides="one", refresh_every=50),
}
RATES: dict[str, tuple[float, ...]] = {
    "AdamW": (7.5e-4, 1.5e-3, 3e-3, 6e-3),
    "Soap": (1.5e-3, 3e-3, 6e-3, 1.2e-2),
    "AdaDiag++": (1e-3, 2e-3, 4e-3),
    "AdaDiag": (1e-3, 2e-3, 4e-3),
    "Muon": (5e-3, 1e-2, 2e-2, 4e-2),
    "pytorch_optimizer SOAP": (1.5e-3, 3e-3, 6e-3, 1.2e-2),
    "Adafactor": (2e-2, 4e-2, 8e-2),
    "Adafactor in AdaDiag": (2e-2, 4e-2, 8e-2),
    "Adafactor in AdaDiag++": (2e-2, 4e-2, 8e-2),
}


@dataclass(frozen=True)
class Run:
    """One training run."""

    setup: str
    lr: float
    seed: int = 0

    @property
    def file(self) -> str:
        plain = "".join(c if c.isalnum() or c in "+-" else "-" for c in self.setup)
        return f"{plain}-lr{self.lr:g}-seed{self.seed}.json"


def plan(done: Callable[[], list[dict[str, Any]]]) -> Iterator[Run]:
    """The runs in their order; those that depend on what the others have found, as soon as all of that is there."""
    sweeps = ("AdamW", "Soap", "AdaDiag++", "AdaDiag", "Muon", "pytorch_optimizer SOAP")
    for setup in sweeps:
        yield from (Run(setup, lr) for lr in RATES[setup])
    found = done()
    swept = {(r["setup"], r["lr"]) for r in found if r["seed"] == 0}
    space = min(SPACES, key=lambda name: best(found, name)[1])
    known = all((setup, lr) in swept for setup in ("AdamW", *SPACES) for lr in RATES[setup])
    lr = best(found, space)[0]
    if known:
        for policy in MASKS:
            yield Run(f"{policy} in {space}", lr)
            yield Run(f"random like {policy} in {space}", lr)
    ran = {r["setup"] for r in found}
    if known and all(f"{policy} in {space}" in ran for policy in MASKS):
        mask = min(MASKS, key=lambda policy: best(found, f"{policy} in {space}")[1])
        for seed in (1, 2):
            yield Run("AdamW", best(found, "AdamW")[0], seed)
            for setup in (space, f"{mask} in {space}", f"random like {mask} in {space}"):
                yield Run(setup, lr, seed)
    for setup in ("Adafactor", "Adafactor in AdaDiag", "Adafactor in AdaDiag++"):
        yield from (Run(setup, lr) for lr in RATES[setup])


@contextmanager
def claimed(out: Path, run: Run) -> Iterator[bool]:
    """Whether this process is the one that does the run: until it is done, or the process is no more."""
    folder = Path(tempfile.gettempdir(), f"gain-{hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]}")
    folder.mkdir(exist_ok=True)
    with (folder / run.file).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield not (out / run.file).exists()


def next_run(out: Path, deadline: float) -> Iterator[Run]:
    """One run after the other, each claimed while it is worked on.

    Where all that is left is claimed, it waits until something is free, or until the deadline (`time.perf_counter`).
    """
    while True:
        left = [run for run in plan(lambda: results(out)) if not (out / run.file).exists()]
        if not left:
            return
        for run in left:
            with claimed(out, run) as mine:
                if mine:
                    yield run
                    break
        else:
            if time.perf_counter() > deadline:
                return
            time.sleep(1)


def best(done: list[dict[str, Any]], setup: str) -> tuple[float, float]:
    """Learning rate and final loss of a setup's best run with seed 0."""
    mine = [r for r in done if r["setup"] == setup and r["seed"] == 0]
    found = [(_final(r) if math.isfinite(_final(r)) else math.inf, r["lr"]) for r in mine]
    loss, lr = min(found, default=(math.inf, math.nan))
    return lr, loss


class Apart(nn.Module):
    """Linear layers that read the same input, as matrices of their own, as LLaMA has them: a rotation of queries, keys
    and values together would be another one."""

    def __init__(self, together: nn.Linear, count: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(part.detach().clone() for part in together.weight.chunk(count))

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, torch.cat(list(self.weights)))


def llama(config: ModelConfig, seed: int, vocabulary: int, fused: bool = False) -> GPT:
    """The model of `selective compare`, its projections apart unless `fused`: the same function at the start."""
    model = GPT(config, seed, vocabulary)
    if not fused:
        for block in model.blocks:
            for name, count in (("qkv", 3), ("mlp_in", 2)):
                together = getattr(block, name)
                assert isinstance(together, nn.Linear)
                setattr(block, name, Apart(together, count))
    return model


class Both(Optimizer):
    """Two optimizers as one: Muon takes matrices only."""

    def __init__(self, first: Optimizer, second: Optimizer) -> None:
        self.parts = (first, second)
        super().__init__([*first.param_groups, *second.param_groups], {})
        self.param_groups = [*first.param_groups, *second.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for part in self.parts:
            part.step()


def optimizer_of(run: Run, model: nn.Module) -> Optimizer:
    """What a run trains with."""
    groups, plain = (groups_by_kind(model, DECAY, rotated) for rotated in (True, False))
    fused = next(model.parameters()).is_cuda
    name, _, space_name = run.setup.rpartition(" in ")
    name, space = (name, SPACES[space_name]) if name else (run.setup, SPACES.get(run.setup))
    if run.setup == "AdamW":
        return torch.optim.AdamW(plain, lr=run.lr, betas=(0.9, 0.95), fused=fused)
    if run.setup == "Muon":
        rest = torch.optim.AdamW(plain[1:], lr=1.5e-3, betas=(0.9, 0.95), fused=fused)
        return Both(torch.optim.Muon(plain[:1], lr=run.lr, weight_decay=DECAY), rest)
    if run.setup == "pytorch_optimizer SOAP":
        from pytorch_optimizer import SOAP

        return SOAP(plain, lr=run.lr, betas=(0.95, 0.95), weight_decay=DECAY, precondition_frequency=10)
    if name.startswith("Adafactor"):
        base: Optimizer = torch.optim.Adafactor(plain if space is None else groups, lr=run.lr)
        return base if space is None else SelectiveUpdate(base, preconditioner=space, statistics=False)
    betas = (0.95, 0.95) if isinstance(space, Soap) else (0.9, 0.95)
    policies: dict[str, Policy] = {"MGUP": MGUP_MILD, "Cautious": Cautious()}
    policies |= {f"random like {key}": RandomMask.matching(policy) for key, policy in policies.items()}
    base = torch.optim.AdamW(groups, lr=run.lr, betas=betas, fused=fused)
    return SelectiveUpdate(base, policy=policies.get(name), preconditioner=space, seed=run.seed, statistics=False)


def text_of(root: Path, most: int) -> Iterator[str]:
    """The Python sources under a folder, whole files in the order of their names' hashes, up to so many characters."""
    files = sorted(root.rglob("*.py"), key=lambda p: hashlib.sha256(str(p.relative_to(root)).encode()).digest())
    size = 0
    for file in files:
        text = file.read_text(encoding="utf-8", errors="replace")
        size += len(text)
        if size > most:
            return
        yield text


def tokens_of(root: Path, vocabulary: int, most: int) -> Tensor:
    """The text as tokens, int32, of a byte-level BPE that is trained on a part of it."""
    from tokenizers import ByteLevelBPETokenizer

    texts = list(text_of(root, most))
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts[: max(1, len(texts) // 8)], vocab_size=vocabulary, show_progress=False)
    ids = [i for encoded in tokenizer.encode_batch(texts) for i in encoded.ids]
    return torch.tensor(ids, dtype=torch.int32)


class Trainer:
    """Model and text, which stay from run to run: the model is compiled once."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, options.device
        self.config = ModelConfig(
            layers=options.layers, width=options.width, heads=options.heads, context=options.context
        )
        tokens = tokens_of(options.text, options.vocabulary, options.characters)
        self.text = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
        tokens = tokens.to(self.device)
        cut = len(tokens) - max(len(tokens) // 50, 4 * (options.context + 1))
        self.train, self.held_out = tokens[:cut], tokens[cut:]
        self.model = self.start(0).to(self.device)
        self.forward: Callable[[nn.Module, Tensor], Tensor] = loss_of
        if self.device == "cuda":
            self.forward = torch.compile(loss_of)

    def start(self, seed: int) -> GPT:
        return llama(self.config, seed, self.options.vocabulary, self.options.fused)

    def windows(self, text: Tensor, starts: Tensor) -> Tensor:
        places = starts.to(self.device)[:, None] + torch.arange(self.options.context + 1, device=self.device)
        return text[places].long()

    def loss(self, windows: Tensor) -> Tensor:
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.device == "cuda"):
            return self.forward(self.model, windows)

    @torch.no_grad()
    def evaluate(self) -> float:
        """On the same windows each time."""
        room, count = len(self.held_out) - self.options.context - 1, 8
        starts = torch.linspace(0, room, self.options.batch * count).long().split(self.options.batch)
        return sum(float(self.loss(self.windows(self.held_out, part))) for part in starts) / count

    def go(self, run: Run) -> dict[str, Any]:
        """Train from the seed's start on the seed's batches."""
        options = self.options
        self.model.load_state_dict(self.start(run.seed).state_dict())
        optimizer = optimizer_of(run, self.model)
        rates = [group["lr"] for group in optimizer.param_groups]
        multiplier = schedule(LoopConfig(warmup=0.1, final_lr=0.1), options.steps)  # pyright: ignore[reportCallIssue]
        generator = torch.Generator().manual_seed(1000 + run.seed)
        record: dict[str, Any] = {"setup": run.setup, "lr": run.lr, "seed": run.seed, "steps": options.steps}
        record["validation"] = {"step": [], "loss": []}
        begun = time.perf_counter()
        for step in range(options.steps + 1):
            if step % options.evaluate_every == 0 or step == options.steps:
                record["validation"]["step"].append(step)
                record["validation"]["loss"].append(self.evaluate())
            if step == options.steps or not math.isfinite(record["validation"]["loss"][-1]):
                break
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * multiplier(step)
            starts = torch.randint(len(self.train) - options.context - 1, (options.batch,), generator=generator)
            optimizer.zero_grad()
            for part in self.windows(self.train, starts).split(options.micro_batch):
                (self.loss(part) * (len(part) / options.batch)).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
        record["seconds"] = time.perf_counter() - begun
        record["parameters_sha256"], record["text_sha256"] = fingerprint(self.model), self.text
        for p in self.model.parameters():
            p.grad = None
        return record


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*-seed*.json"))]


def table(folder: Path) -> str:
    """Every setup at its best rate: final loss, steps to AdamW's final loss, time; then all runs."""
    done = results(folder)
    _, wanted = best(done, "AdamW")
    lines = [
        "| setup | best lr | final loss | steps to AdamW's | s a run | other rates |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for setup in dict.fromkeys(r["setup"] for r in done):
        lr, loss = best(done, setup)
        mine = [r for r in done if r["setup"] == setup and r["lr"] == lr]
        first = next(r for r in mine if r["seed"] == 0)
        reached = "–"
        if math.isfinite(wanted):
            steps = steps_to(wanted, first["validation"]["step"], first["validation"]["loss"])
            reached = "–" if steps is None else f"{steps:.0f} of {first['steps']}"
        others = ", ".join(
            f"{r['lr']:g}: {r['validation']['loss'][-1]:.3f}"
            for r in done if r["setup"] == setup and r["seed"] == 0 and r["lr"] != lr
        )  # fmt: skip
        lines.append(f"| {setup} | {lr:g} | {loss:.3f} | {reached} | {first['seconds']:.0f} | {others} |")
    return "\n".join([*lines, *_over_seeds(done)])


def _over_seeds(done: list[dict[str, Any]]) -> list[str]:
    """Setups with several seeds, paired by seed with AdamW: mean and 95 % interval of the loss, of the difference, of
    how many times fewer steps it took to the same seed's AdamW's final loss."""
    rate = best(done, "AdamW")[0]
    adamw = {r["seed"]: r for r in done if r["setup"] == "AdamW" and r["lr"] == rate}
    lines = []
    for setup in dict.fromkeys(r["setup"] for r in done):
        lr = best(done, setup)[0]
        mine = [r for r in done if r["setup"] == setup and r["lr"] == lr and r["seed"] in adamw]
        if len(mine) < 2:
            continue
        ours, theirs = [_final(r) for r in mine], [_final(adamw[r["seed"]]) for r in mine]
        if not all(map(math.isfinite, [*ours, *theirs])):
            lines.append(f"| {setup} | {lr:g} | {len(mine)} | a run, or AdamW's with its seed, diverged | | |")
            continue
        differences = [a - b for a, b in zip(ours, theirs, strict=True)]
        steps = [
            steps_to(t, r["validation"]["step"], r["validation"]["loss"]) for t, r in zip(theirs, mine, strict=True)
        ]
        reached = [r["steps"] / s for s, r in zip(steps, mine, strict=True) if s]  # 0: no better than at the start
        fewer = f"{t_interval(reached)} ({len(reached)} of {len(mine)})" if reached else "not reached"
        lines.append(f"| {setup} | {lr:g} | {len(mine)} | {t_interval(ours)} | {t_interval(differences)} | {fewer} |")
    heads = [
        "",
        "| setup | lr | seeds | final loss | against AdamW | times fewer steps |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    return [*heads, *lines] if lines else []


def _final(run: dict[str, Any]) -> float:
    return run["validation"]["loss"][-1]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the results")
    add("--table", action="store_true", help="only print what there is")
    add("--seconds", type=float, default=math.inf, help="begin no run that would not end in time")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    add("--fused", action="store_true", help="queries, keys and values in one matrix, gate and value in another")
    add("--text", type=Path, default=Path(sysconfig.get_path("purelib")), help="folder with Python sources")
    add("--characters", type=int, default=200_000_000, help="of the text")
    for name, value in {"steps": 600, "batch": 128, "micro-batch": 32, "context": 512, "layers": 8, "width": 512,
                        "heads": 8, "vocabulary": 8192, "evaluate-every": 25}.items():  # fmt: skip
        add(f"--{name}", type=int, default=value)
    options = parser.parse_args(argv)
    begun = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    trainer: Trainer | None = None
    longest = 0.0
    for run in () if options.table else next_run(options.out, begun + options.seconds):
        if time.perf_counter() - begun + longest > options.seconds:
            print("out of time; the same command goes on from here")
            break
        trainer = trainer or Trainer(options)
        record = trainer.go(run)
        longest = max(longest, record["seconds"])
        where = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
        record |= {"torch": torch.__version__, "device": where, "date": time.strftime("%Y-%m-%d")}
        write_atomically(options.out / run.file, json.dumps(record).encode())
        print(f"{run.file}: {record['validation']['loss'][-1]:.4f}, {record['seconds']:.0f} s", flush=True)
    print(table(options.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
