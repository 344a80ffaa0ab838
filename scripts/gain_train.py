"""Trainer, which does the runs of `gain.py`: text, model, optimizers and the loop."""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gain_plan import DECAYS, SPACES, SQUARED, TIMED, Run
from torch import Tensor, nn
from torch.optim import Optimizer

from selective import MGUP, Cautious, ChainedOptimizer, Policy, RandomMask, SelectiveUpdate, Soap
from selective.compare.config import LoopConfig, ModelConfig
from selective.compare.model import GPT
from selective.compare.model import loss as loss_of
from selective.compare.spaces import JOINED, groups_by_kind
from selective.compare.train import fingerprint, schedule

DECAY = 0.1
MGUP_MILD = MGUP(alpha=1.5, gamma=0.5)  # the paper's advice for bases whose learning rate is tuned


class Apart(nn.Module):
    """Linear layers that read the same input, each with a matrix of its own, as in LLaMA.

    Queries, keys and values in one matrix would be rotated together, which is another rotation.
    """

    def __init__(self, together: nn.Linear, count: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(part.detach().clone() for part in together.weight.chunk(count))

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, torch.cat(list(self.weights)))


def llama(config: ModelConfig, seed: int, vocabulary: int, fused: bool = False) -> GPT:
    """The model of `selective compare`, with separate projections unless `fused`. Both start as the same function."""
    model = GPT(config, seed, vocabulary)
    if not fused:
        for block in model.blocks:
            for name, count in (("qkv", 3), ("mlp_in", 2)):
                together = getattr(block, name)
                assert isinstance(together, nn.Linear)
                setattr(block, name, Apart(together, count))
    return model


def optimizer_of(run: Run, model: nn.Module) -> Optimizer:
    """Build the optimizer of a run."""
    linear = {path.rpartition(".")[2] for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    joined = {name: count for name, count in JOINED.items() if name in linear}  # with --fused alone
    groups, plain = (groups_by_kind(model, DECAY, rotated, joined) for rotated in (True, False))
    fused = next(model.parameters()).is_cuda
    name, _, space_name = run.setup.rpartition(" in ")
    spaces = SPACES | SQUARED | TIMED
    name, space = (name, spaces[space_name]) if name else (run.setup, spaces.get(run.setup))
    if run.setup == "AdamW":
        return torch.optim.AdamW(plain, lr=run.lr, betas=(0.9, 0.95), fused=fused)
    if run.setup in DECAYS:
        base: Optimizer = torch.optim.AdamW(plain, lr=run.lr, betas=(0.9, 0.95), fused=fused)
        return SelectiveUpdate(base, decay=DECAYS[run.setup], seed=run.seed, statistics=False)
    if run.setup == "Muon":
        rest = torch.optim.AdamW(plain[1:], lr=1.5e-3, betas=(0.9, 0.95), fused=fused)
        return ChainedOptimizer([torch.optim.Muon(plain[:1], lr=run.lr, weight_decay=DECAY), rest])
    if run.setup == "pytorch_optimizer SOAP":
        from pytorch_optimizer import SOAP

        return SOAP(plain, lr=run.lr, betas=(0.95, 0.95), weight_decay=DECAY, precondition_frequency=10)
    if name.startswith("Adafactor"):
        base = torch.optim.Adafactor(plain if space is None else groups, lr=run.lr)
        return base if space is None else SelectiveUpdate(base, preconditioner=space, statistics=False)
    betas = (0.95, 0.95) if isinstance(space, Soap) else (0.9, 0.95)
    policies: dict[str, Policy] = {"MGUP": MGUP_MILD, "Cautious": Cautious()}
    policies |= {f"random like {key}": RandomMask.matching(policy) for key, policy in policies.items()}
    base = torch.optim.AdamW(groups, lr=run.lr, betas=betas, fused=fused)
    return SelectiveUpdate(base, policy=policies.get(name), preconditioner=space, seed=run.seed, statistics=False)


def text_of(root: Path, most: int) -> Iterator[str]:
    """Python sources under a folder: whole files in the order of their names' hashes, up to so many characters."""
    files = sorted(root.rglob("*.py"), key=lambda p: hashlib.sha256(str(p.relative_to(root)).encode()).digest())
    size = 0
    for file in files:
        text = file.read_text(encoding="utf-8", errors="replace")
        size += len(text)
        if size > most:
            return
        yield text


def tokens_of(root: Path, vocabulary: int, most: int) -> Tensor:
    """The text as int32 tokens of a byte-level BPE, which is trained on a part of it."""
    from tokenizers import ByteLevelBPETokenizer

    texts = list(text_of(root, most))
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts[: max(1, len(texts) // 8)], vocab_size=vocabulary, show_progress=False)
    ids = [i for encoded in tokenizer.encode_batch(texts) for i in encoded.ids]
    return torch.tensor(ids, dtype=torch.int32)


class Trainer:
    """The model and the text, which all runs share, so that the model is compiled once."""

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
        self.compile()

    def compile(self) -> None:
        """Compile what the model needs, for training and for evaluation, so that no run's time has it."""
        windows = self.windows(self.train, torch.zeros(self.options.micro_batch, dtype=torch.int64))
        self.loss(windows).backward()
        self.model.zero_grad()
        self.evaluate()

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device == "cuda":
            torch.cuda.synchronize()

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
        """The mean held-out loss, on the same windows each time."""
        room, count = len(self.held_out) - self.options.context - 1, 8
        starts = torch.linspace(0, room, self.options.batch * count).long().split(self.options.batch)
        return sum(float(self.loss(self.windows(self.held_out, part))) for part in starts) / count

    def go(self, run: Run) -> dict[str, Any]:
        """Do a run: train from its seed's start on its seed's batches. Returns the record."""
        options, steps = self.options, round(self.options.steps * run.part)
        self.model.load_state_dict(self.start(run.seed).state_dict())
        optimizer = optimizer_of(run, self.model)
        rates = [group["lr"] for group in optimizer.param_groups]
        multiplier = schedule(LoopConfig(warmup=0.1, final_lr=0.1), steps)  # pyright: ignore[reportCallIssue]
        generator = torch.Generator().manual_seed(1000 + run.seed)
        record: dict[str, Any] = {"setup": run.setup, "lr": run.lr, "seed": run.seed, "part": run.part, "steps": steps}
        # The seconds are those of training until then, without evaluations.
        record["validation"] = {"step": [], "loss": [], "seconds": []}
        begun = time.perf_counter()
        trained, since = 0.0, begun
        for step in range(steps + 1):
            if step % options.evaluate_every == 0 or step == steps:
                self.synchronize()
                trained += time.perf_counter() - since
                record["validation"]["step"].append(step)
                record["validation"]["seconds"].append(trained)
                record["validation"]["loss"].append(self.evaluate())
                since = time.perf_counter()
            if step == steps or not math.isfinite(record["validation"]["loss"][-1]):
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
