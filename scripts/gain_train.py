"""The text, the model and the optimizers of the runs of `gain.py`."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from evidence.runs import Run
from evidence.tasks import TextTask
from evidence.tokens import Tokens
from evidence.training import Trainer
from gain_plan import DECAYS, SPACES, SQUARED, TIMED
from torch import Tensor, nn
from torch.optim import Optimizer

from selective import MGUP, Cautious, ChainedOptimizer, Policy, RandomMask, SelectiveUpdate, Soap
from selective.compare.config import ModelConfig
from selective.compare.spaces import JOINED, groups_by_kind

DECAY = 0.1
MGUP_MILD = MGUP(alpha=1.5, gamma=0.5)  # the paper's advice for bases whose learning rate is tuned


def optimizer_of(run: Run, model: nn.Module, steps: int) -> Optimizer:
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


def trainer_of(options: argparse.Namespace) -> Trainer:
    """The loop over the text of the options, whose last part is held out. All runs share its model."""
    everything = tokens_of(options.text, options.vocabulary, options.characters)
    cut = len(everything) - max(len(everything) // 50, 4 * (options.context + 1))
    facts = {"vocabulary": options.vocabulary, "sha256": hashlib.sha256(everything.numpy().tobytes()).hexdigest()}
    shape = ModelConfig(layers=options.layers, width=options.width, heads=options.heads, context=options.context)
    task = TextTask(
        Tokens(everything[:cut], everything[cut:], facts), shape, options.batch, options.micro_batch,
        evaluate_windows=8 * options.batch, name="gain", fused=options.fused,
    )  # fmt: skip
    return Trainer(task, optimizer_of, options.steps, options.evaluate_every, options.device)
