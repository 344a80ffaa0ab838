"""Hugging Face's `Trainer`: a small Llama from scratch, a checkpoint in the middle, an exact resume, a watched run.

The data are real: the bytes of a module of Python's standard library, in windows of 32.
"""

from __future__ import annotations

import inspect
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from selective import MGUP, SelectiveUpdate
from selective.callbacks import trainer_callback

STEPS, TOKENS = 60, 32


def texts() -> list[dict[str, torch.Tensor]]:
    text = torch.tensor(list(inspect.getsource(textwrap).encode()))
    return [{"input_ids": row, "labels": row} for row in text.unfold(0, TOKENS, TOKENS)]


def llama() -> LlamaForCausalLM:
    set_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=TOKENS, **shape))


def train(folder: Path, resume: Path | None = None) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=8, lr_scheduler_type="cosine",
        warmup_steps=10, weight_decay=0.1, save_steps=STEPS // 2, logging_steps=20, report_to=[], disable_tqdm=True,
        use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    # The Trainer makes the optimizer, with its own groups (no decay for vectors). An instance goes through
    # `optimizers=(optimizer, None)` instead.
    selective_adamw = SelectiveUpdate.bind(torch.optim.AdamW, policy=MGUP(alpha=1.5, gamma=0.5))
    made_with: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.95)}
    trainer = Trainer(
        llama(), arguments, train_dataset=texts(), optimizer_cls_and_kwargs=(selective_adamw, made_with),
        callbacks=[trainer_callback(every=20)],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


torch.set_num_threads(1)
with tempfile.TemporaryDirectory() as folder:
    whole = train(Path(folder))
    resumed = train(Path(folder, "again"), resume=Path(folder, f"checkpoint-{STEPS // 2}"))
for entry in whole.state.log_history:
    if "selective/share" in entry:
        print({name: round(value, 3) for name, value in entry.items()})
pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
assert all(torch.equal(p, q) for p, q in pairs)
print("resumed from the middle, it ends bit for bit where the whole run did: ok")
