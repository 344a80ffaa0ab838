"""Lightning: automatic optimization, a schedule, a checkpoint in the middle, an exact resume, and a watched run.

The data are real: predict the next character of a module of Python's standard library from the eight before it.
"""

from __future__ import annotations

import inspect
import logging
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from selective import SelectiveUpdate
from selective.callbacks import lightning_callback
from selective.watching import Sample

EPOCH, EPOCHS, BATCH, CONTEXT = 40, 3, 64, 8


def characters() -> DataLoader[Any]:
    text = torch.tensor([min(ord(c), 127) for c in inspect.getsource(textwrap)])
    windows = text.unfold(0, CONTEXT + 1, 1)
    mixed = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    windows = windows[mixed[: EPOCH * BATCH]]
    return DataLoader(TensorDataset(windows[:, :-1], windows[:, -1]), batch_size=BATCH)


class NextCharacter(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Embedding(128, 16), nn.Flatten(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 128)
        )

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = SelectiveUpdate(torch.optim.AdamW(self.parameters(), lr=3e-3), policy="Cautious")  # the only change
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCH * EPOCHS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def show(sample: Sample) -> None:
    print(f"step {sample.step}: share {sample.overview()['share']:.2f}, cosine {sample.overview()['cosine']:.2f}")


def fit(folder: str, resume: Path | None = None) -> NextCharacter:
    pl.seed_everything(0, verbose=False)
    module = NextCharacter()
    save = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    trainer = pl.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", gradient_clip_val=1.0, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[save, lightning_callback(show, every=EPOCH)],
    )  # fmt: skip
    trainer.fit(module, characters(), ckpt_path=resume)
    return module


logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
torch.set_num_threads(1)
with tempfile.TemporaryDirectory() as folder:
    whole = fit(folder)
    resumed = fit(folder, Path(folder) / "epoch=0.ckpt")
assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))
print("resumed after the first epoch, it ends bit for bit where the whole run did: ok")
